"""The server under load and under faults: queue, deadlines, leaving clients, dead workers, signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import ASK, PATIENCE_S, Served, served, wait_until
from tiny import random_gate

from loramix.models import bases
from loramix.pack.edit import remove_skill, set_gate
from loramix.server.app import GRACE_S

MIXES = ["tiny:base", "tiny:sentiment", "tiny:summarize", "tiny"]
LONG = {"model": "tiny:base", "messages": [ASK], "max_tokens": 400, "temperature": 2, "seed": 1}
SCHEMA = {"name": "long", "schema": {"type": "string", "minLength": 2000}}
ENDLESS = {**LONG, "response_format": {"type": "json_schema", "json_schema": SCHEMA}}
"""All 400 tokens on any CPU: free text of a random model ends where the kernels' rounding takes it."""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"LORAMIX_CACHE": str(tmp_path_factory.getbasetemp() / "cache")}


@pytest.fixture(scope="module")
def small(tiny_pack: Path, own: dict[str, str]) -> Iterator[Served]:
    """One answer at a time, two that wait."""
    options = ["--parallel", "1", "--queue", "2", "--ctx", "512", "--threads", "1", "--queue-timeout", "300"]
    with served(tiny_pack, *options, **own) as server:
        yield server


def idle(server: Served) -> bool:
    found = server.http.get("/health")
    return found.status_code == 200 and not found.json()["active"] and not found.json()["waiting"]


def open_stream(server: Served, path: str = "/v1/chat/completions", **body: Any) -> socket.socket:
    """Send a request for a stream, and read until its first piece."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps({**ENDLESS, "stream": True, **body}).encode()
    link = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    link.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    seen = b""
    while seen.count(b'"content":') < 3:
        piece = link.recv(4096)
        assert piece, seen
        seen += piece
    return link


def open_held(server: Served) -> tuple[socket.socket, int]:
    """A stream whose worker is stopped in its middle, and that worker; a quick one may have said all before."""
    (worker,) = server.workers()
    for _ in range(100):
        link = open_stream(server)
        os.kill(worker, signal.SIGSTOP)
        if all(server.http.get("/health").json()["active"] for _ in range(3)):  # what was said has been read
            return link, worker
        os.kill(worker, signal.SIGCONT)
        link.close()
    raise AssertionError("every answer was whole before the worker stopped")


def test_answers_of_many_threads_are_those_of_one(tiny_server: Served) -> None:
    """Case L1 in small; ``python benchmarks/serve.py isolation`` does all 8 x 50 requests on the default pack."""
    asked = [
        {"model": MIXES[i % 4], "messages": [{"role": "user", "content": f"dog {i % 20}"}], "max_tokens": 6}
        for i in range(100)
    ]

    def text(body: dict[str, Any]) -> str:
        answer = tiny_server.post("/v1/chat/completions", **body)
        for _ in range(200):
            if answer.status_code != 429:
                break
            time.sleep(0.02)
            answer = tiny_server.post("/v1/chat/completions", **body)
        found: str = answer.json()["choices"][0]["message"]["content"]
        return found

    alone = [text(body) for body in asked[:20]]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(text, asked))
    assert together == alone * 5


def test_a_full_queue_refuses_at_once(small: Served) -> None:
    """Case L3: what is served and what is refused is all there was."""
    before = small.http.get("/health").json()["restarts"]

    def ask(i: int) -> tuple[int, str | None, float]:
        began = time.monotonic()
        path, body = "/v1/chat/completions", {**LONG, "max_tokens": 60}
        if i % 2:
            path, body = "/api/chat", {**LONG, "stream": False, "options": {"num_predict": 60}}
        answer = httpx.post(f"{small.url}{path}", json=body, timeout=PATIENCE_S)
        return answer.status_code, answer.headers.get("retry-after"), time.monotonic() - began

    with ThreadPoolExecutor(24) as threads:
        found = list(threads.map(ask, range(24)))
    statuses = Counter(status for status, _, _ in found)
    assert set(statuses) <= {200, 429, 503} and statuses[200] >= 3 and statuses[429] and statuses[503]
    assert sum(statuses.values()) == 24
    assert all(retry for status, retry, _ in found if status != 200)
    wait_until(lambda: idle(small))
    assert small.http.get("/health").json()["restarts"] == before


def test_clients_that_leave_make_room(small: Served) -> None:
    """Case L5: the worker has one place and would need it for each."""
    for i in range(10):
        link = (
            open_stream(small, path="/api/chat", response_format=None, format=SCHEMA["schema"])
            if i % 2
            else open_stream(small)
        )
        link.close()
    wait_until(lambda: idle(small))
    (worker,) = small.workers()
    os.kill(worker, signal.SIGSTOP)  # no answer is whole before its client leaves, however quick the machine
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(small.post, "/v1/chat/completions", **LONG)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{small.url}/v1/chat/completions", json=LONG, timeout=0.3)
        os.kill(worker, signal.SIGCONT)
        other.result()
    wait_until(lambda: idle(small))
    assert small.chat(max_tokens=2).status_code == 200


def test_deadlines(tiny_pack: Path, own: dict[str, str]) -> None:
    """Case L6: 504, an error of the right form, and a free place."""
    options = ["--parallel", "1", "--threads", "1", "--ctx", "512"]
    with served(tiny_pack, *options, "--timeout", "2", "--queue-timeout", "0.3", **own) as server:
        (worker,) = server.workers()
        os.kill(worker, signal.SIGSTOP)
        with ThreadPoolExecutor(2) as threads:
            late = list(threads.map(lambda _: server.post("/v1/chat/completions", **LONG), range(2)))
        assert [answer.status_code for answer in late] == [504, 504]
        said = sorted(answer.json()["error"]["message"] for answer in late)
        assert "0.3 s in the queue" in said[0] and "2 s in all" in said[1]
        os.kill(worker, signal.SIGCONT)
        wait_until(
            lambda: server.chat(max_tokens=1).status_code == 200
        )  # the deadlines are short for it, too


def test_a_deadline_in_the_middle_of_a_stream(tiny_pack: Path, own: dict[str, str]) -> None:
    with served(tiny_pack, "--threads", "1", "--ctx", "512", "--timeout", "6", **own) as server:
        link, worker = open_held(server)
        lines = [line for line in read_all(link).decode().splitlines() if line.startswith("data: ")]
        assert "in all" in json.loads(lines[-2].removeprefix("data: "))["error"]["message"]
        assert lines[-1] == "data: [DONE]"
        os.kill(worker, signal.SIGCONT)
        wait_until(lambda: idle(server))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_a_dead_worker_costs_only_what_it_had(small: Served, number: signal.Signals) -> None:
    before = small.http.get("/health").json()["restarts"]
    link, worker = open_held(small)
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(small.chat, max_tokens=3)
        wait_until(lambda: small.http.get("/health").json()["waiting"])
        os.kill(worker, number)
        os.kill(worker, signal.SIGCONT)
        answer = other.result()
    lines = [line for line in read_all(link).decode().splitlines() if line.startswith("data: ")]
    assert number.name in json.loads(lines[-2].removeprefix("data: "))["error"]["message"]
    assert lines[-1] == "data: [DONE]"
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3
    assert small.http.get("/health").json()["restarts"] == before + 1
    assert small.workers() != [worker]


def read_all(link: socket.socket) -> bytes:
    """What still comes, up to the end of the answer."""
    seen = b""
    while not seen.endswith(b"0\r\n\r\n") and (piece := link.recv(65_536)):
        seen += piece
    link.close()
    return seen


def test_a_slow_reader_holds_up_nobody(tiny_server: Served) -> None:
    link = open_stream(tiny_server)
    assert all(tiny_server.chat(max_tokens=2).status_code == 200 for _ in range(3))
    link.close()


def test_a_signal_lets_running_answers_end(tiny_pack: Path, own: dict[str, str]) -> None:
    """Case S5: nothing new is taken, the stream comes whole, exit code 0, no process left."""
    with served(tiny_pack, "--ctx", "512", "--threads", "1", **own) as server:
        link, worker = open_held(server)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("Shutting down")
        wait_until(lambda: refuses(server.url))
        os.kill(worker, signal.SIGCONT)
        assert b"[DONE]" in (rest := read_all(link)) and b"error" not in rest
        assert server.process.wait(PATIENCE_S) == 0
        assert not Path(f"/proc/{worker}").exists()


def refuses(url: str) -> bool:
    try:
        httpx.get(f"{url}/health", timeout=1)
    except httpx.TransportError:
        return True
    return False


def test_a_second_signal_ends_at_once(tiny_pack: Path, own: dict[str, str]) -> None:
    with served(tiny_pack, "--ctx", "512", "--threads", "1", **own) as server:
        link, worker = open_held(server)
        server.process.send_signal(signal.SIGINT)
        server.wait_for("Shutting down")
        began = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE_S) == 0
        assert time.monotonic() - began < GRACE_S, "the first signal ends it too, but later"
        assert not Path(f"/proc/{worker}").exists()
        link.close()


def test_keys_hot_reload_and_metrics(pack: Path, tiny_base: Path, own: dict[str, str]) -> None:
    key = "a-long-key-of-no-meaning"
    options = ["--host", "0.0.0.0", "--threads", "1", "--ctx", "256"]
    with served(pack, *options, LORAMIX_API_KEY=key, **own) as server:
        assert server.chat(max_tokens=1).status_code == 401
        server.http.headers["authorization"] = f"Bearer {key}"
        assert server.chat(model="tiny:summarize", max_tokens=1).status_code == 200
        packs = server.http.get("/v1/packs").json()["data"]
        assert [skill["name"] for skill in packs[0]["skills"]] == ["sentiment", "summarize"]
        assert server.post("/v1/packs/tiny/reload").json() == {"name": "tiny", "changed": False}
        remove_skill(pack, "summarize")
        set_gate(pack, random_gate(["sentiment"], bases.digest(tiny_base)))
        assert server.post("/v1/packs/tiny/reload").json() == {"name": "tiny", "changed": True}
        assert server.chat(model="tiny:summarize", max_tokens=1).status_code == 404
        assert set(server.post("/v1/route", prompt="a dog").json()["probabilities"]) == {"sentiment", "base"}
        text = server.http.get("/metrics").text
        assert (
            'loramix_requests_total{path="/v1/chat/completions",status="401"}' not in text
        )  # never got there
        assert 'loramix_requests_total{path="/v1/chat/completions",status="404"} 1.0' in text
        assert 'loramix_routes_total{policy="fixed",skill="summarize"} 1.0' in text
        assert 'loramix_seconds_count{phase="first_token"} 1.0' in text
        assert key not in "".join(server.log)


def test_a_pack_that_cannot_be_served_says_so(tmp_path: Path, pack: Path, own: dict[str, str]) -> None:
    (pack / "gate.npz").unlink(missing_ok=True)
    for file in pack.glob("*.npz"):
        file.unlink()
    with pytest.raises(AssertionError, match=r"error: .*npz does not exist"), served(pack, **own):
        pass
