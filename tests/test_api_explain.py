"""``/v1/explain``: what the chat answers, measured, beside other answers and through the same queue."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import ASK, Served, served, wait_until

from loramix import Engine
from loramix.pack.edit import remove_skill
from loramix.runtime.contributions import contributions

MIX = {"sentiment": 1.0, "summarize": 0.5}


def explain(server: Served, **body: Any) -> Any:
    return server.post("/v1/explain", **{"model": "tiny", "messages": [ASK], **body})


def test_it_measures_what_the_chat_answers(tiny_server: Served, tiny_engine: Engine) -> None:
    body = {"max_tokens": 6, "loramix": {"mix": MIX}}
    found = explain(tiny_server, **body)
    assert found.status_code == 200, found.text
    found, chat = found.json(), tiny_server.chat(**body).json()
    assert found["text"] == chat["choices"][0]["message"]["content"]
    assert found["loramix"]["mix"] == MIX and found["usage"]["completion_tokens"] == 6
    answer = tiny_engine.generate(ASK["content"], mix=MIX, max_tokens=6)
    wanted = contributions(tiny_engine, answer).to_json()
    told = found["contributions"]
    assert told["tokens"] == wanted["tokens"] and told["strongest"] == wanted["strongest"]
    for name, values in wanted["values"].items():
        np.testing.assert_allclose(told["values"][name], values, rtol=0.02, atol=1e-3)


def test_the_bare_base_has_nothing_to_measure(tiny_server: Served) -> None:
    found = explain(tiny_server, max_tokens=3, loramix={"policy": "base"}).json()
    assert found["contributions"]["skills"] == [] and found["contributions"]["values"] == {}


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 513},
        {"max_tokens": 0},
        {"model": "other"},
        {"messages": []},
        {"loramix": {"mix": {"nobody": 1.0}}},
        {"loramix": {"mix": {"sentiment": 5.0}}},
    ],
)
def test_what_cannot_be_meant_is_refused(tiny_server: Served, body: dict[str, Any]) -> None:
    answer = explain(tiny_server, **body)
    assert 400 <= answer.status_code < 500 and answer.json()["error"]["message"]


def test_others_are_answered_meanwhile(tiny_server: Served) -> None:
    body = {"max_tokens": 60, "loramix": {"mix": MIX}}
    alone, chat = explain(tiny_server, **body).json(), tiny_server.chat("tiny:summarize").json()
    with ThreadPoolExecutor(6) as threads:
        many = [threads.submit(explain, tiny_server, **body) for _ in range(3)]
        chats = [threads.submit(tiny_server.chat, "tiny:summarize") for _ in range(3)]
        for job in many:
            found = job.result().json()
            assert found["text"] == alone["text"]
            assert found["contributions"]["strongest"] == alone["contributions"]["strongest"]
        for job in chats:
            assert job.result().json()["choices"] == chat["choices"]


def test_who_leaves_is_measured_no_more(tiny_server: Served) -> None:
    host, port = tiny_server.url.removeprefix("http://").split(":")
    body = json.dumps({"model": "tiny:sentiment", "messages": [ASK], "max_tokens": 400}).encode()
    head = f"POST /v1/explain HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    restarts = tiny_server.http.get("/health").json()["restarts"]
    for pause in (0.0, 0.05, 0.2):  # in the queue, while it answers, while it is measured
        with socket.create_connection((host, int(port))) as link:
            link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(pause)
    assert explain(tiny_server, max_tokens=2).status_code == 200
    wait_until(lambda: not tiny_server.http.get("/health").json()["active"])
    assert tiny_server.http.get("/health").json()["restarts"] == restarts


def test_a_pack_reloaded_meanwhile_is_measured_anew(pack: Path, tmp_path: Path) -> None:
    with served(pack, "--ctx", "512", "--threads", "1", LORAMIX_CACHE=str(tmp_path)) as server:
        body = {"max_tokens": 120, "loramix": {"mix": {"sentiment": 1.0}}}
        before = explain(server, **body).json()["contributions"]
        with ThreadPoolExecutor(2) as threads:
            kept = threads.submit(explain, server, **body)
            gone = threads.submit(explain, server, **{**body, "loramix": {"mix": {"summarize": 1.0}}})
            remove_skill(pack, "summarize")
            assert server.http.post("/v1/packs/tiny/reload").json()["changed"]
            assert kept.result().json()["contributions"] == before
            assert gone.result().status_code in (200, 404)  # it was whole before, or its skill is gone
        assert server.http.get("/health").json()["restarts"] == 0
