"""Bodies that nobody should send: a 4xx each, quickly, and the server goes on (case L8)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving import ASK, Served, openapi_cases

CHAT: dict[str, Any] = {"model": "tiny", "messages": [ASK], "max_tokens": 2}
COMPLETION: dict[str, Any] = {"model": "tiny", "prompt": "a dog", "max_tokens": 2}
GENERATE: dict[str, Any] = {
    "model": "tiny",
    "prompt": "a dog",
    "stream": False,
    "options": {"num_predict": 2},
}
EMBED: dict[str, Any] = {"model": "tiny", "input": "a dog"}

BAD: list[tuple[str, dict[str, Any]]] = [
    *(("/v1/chat/completions", {**CHAT, **change}) for change in (
        {"n": 10**6}, {"n": 0}, {"n": -1}, {"n": 9}, {"n": "many"},
        {"max_tokens": -2}, {"max_tokens": 0}, {"max_tokens": 10**10}, {"max_tokens": True}, {"max_tokens": 1.5},
        {"max_completion_tokens": 10**30}, {"max_completion_tokens": "all"},
        {"temperature": -0.1}, {"temperature": 3}, {"temperature": 1e400}, {"temperature": "hot"},
        {"top_p": 1.1}, {"top_p": -1}, {"top_p": []},
        {"seed": 2**70}, {"seed": "luck"},
        {"stop": [""]}, {"stop": ["a"] * 17}, {"stop": "x" * 300}, {"stop": [1]}, {"stop": {"a": 1}},
        {"logprobs": "yes please"}, {"logprobs": True, "top_logprobs": 21}, {"top_logprobs": -1},
        {"messages": []}, {"messages": [ASK] * 10_000}, {"messages": "hello"}, {"messages": [1]},
        {"messages": [{"role": "user"}]}, {"messages": [{"role": "tool"}]},
        {"messages": [{"role": "user", "content": ""}]}, {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": "a\u0000b"}]},
        {"messages": [{"role": "user", "content": "word " * 2000}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]},
        {"model": "nobody"}, {"model": "tiny:nobody"}, {"model": "../tiny"}, {"model": ""}, {"model": None},
        {"model": "x" * 1000}, {"model": "tiny\r\nINFO: forged \x1b[31m"},
        {"response_format": {"type": "xml"}}, {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "https://x.example"}}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"minLength": 10**9}}}},
        {"tools": [{"type": "function"}]}, {"logit_bias": {"1": 100}}, {"frequency_penalty": 3},
        {"loramix": {"policy": "all"}}, {"loramix": {"mix": {"nobody": 1}}}, {"loramix": {"mix": {"sentiment": -1}}},
        {"loramix": {"mix": {"sentiment": 1e9}}}, {"loramix": {"mix": {"base": 1}}}, {"loramix": {"path": "/etc"}},
        {"loramix": {"mix": {f"s{i}": 1 for i in range(99)}}},
        {"top_logprobs": 2}, {"top_logprobs": 2, "logprobs": False}, {"options": {"temperature": 1}},
        {"num_predict": -3}, {"num_predict": "all"},
    )),
    *(("/v1/completions", {**COMPLETION, **change}) for change in (
        {"prompt": []}, {"prompt": ["a"] * 9}, {"prompt": [[1, 2]]}, {"prompt": ["a"] * 3, "n": 4},
        {"echo": True}, {"suffix": "end"}, {"logprobs": 6},
    )),
    *(("/v1/embeddings", {**EMBED, **change}) for change in (
        {"input": []}, {"input": ""}, {"input": "x" * 9000}, {"input": ["a"] * 300}, {"encoding_format": "hex"},
    )),
    ("/v1/route", {}), ("/v1/route", {"prompt": "a", "messages": [ASK]}), ("/v1/route", {"prompt": ""}),
    *(("/api/generate", {**GENERATE, **change}) for change in (
        {"options": {"num_predict": -3}}, {"options": {"temperature": -1}}, {"options": {"top_k": -2}},
        {"options": []}, {"format": "xml"}, {"raw": True}, {"images": ["aGk="]}, {"model": 3}, {"stream": "no no"},
        {"top_logprobs": 2}, {"max_tokens": "all", "options": {}}, {"n": 2},
        {"response_format": {"type": "json_object"}}, {"temperature": -1}, {"mirostat": 2}, {"grammar": "root"},
        {"options": {"max_tokens": -5}},
    )),
    ("/api/chat", {"model": "tiny", "messages": [ASK], "system": "Be brief."}),
    ("/api/chat", {"model": "tiny", "messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}),
    ("/api/show", {}), ("/api/show", {"model": "nobody"}), ("/api/embed", {"model": "tiny"}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_bodies(tiny_server: Served, number: int) -> None:
    path, body = BAD[number]
    content = json.dumps(body)
    answer = tiny_server.http.post(path, content=content, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert (error if path.startswith("/api") else error["message"]).strip()


def test_a_stream_that_cannot_begin_has_a_status(tiny_server: Served) -> None:
    long = [{"role": "user", "content": "word " * 2000}]
    schema = {"type": "json_schema", "json_schema": {"schema": {"minLength": 10**9}}}
    for change in ({"messages": long}, {"response_format": schema}, {"n": 2, "messages": long}):
        assert tiny_server.chat(**{**CHAT, **change, "stream": True}).status_code == 400
    assert tiny_server.post("/api/chat", model="tiny", messages=long).status_code == 400


def test_a_conversation_that_fills_the_context_is_refused_with_the_limit(tiny_server: Served) -> None:
    """Clients keep their own history: what to leave out is theirs to say."""
    talk = [{"role": role, "content": "word " * 20} for _ in range(30) for role in ("user", "assistant")]
    talk.append({"role": "user", "content": "and now?"})
    for stream in (False, True):
        for path, error in (("/v1/chat/completions", "message"), ("/api/chat", "")):
            answer = tiny_server.post(path, model="tiny", messages=talk, stream=stream)
            found = answer.json()["error"]
            assert answer.status_code == 400
            assert "context holds 512" in (found[error] if error else found)
            assert tiny_server.post(path, model="tiny", messages=talk[-3:], stream=stream).status_code == 200


def test_the_server_goes_on(tiny_server: Served) -> None:
    assert len(BAD) >= 60
    assert tiny_server.chat(max_tokens=2).status_code == 200
    assert tiny_server.http.get("/health").json()["restarts"] == 0


def test_paths_and_methods(tiny_server: Served) -> None:
    for method, path, status in (
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models/tiny", 405),
        ("POST", "/api/pull", 404),
        ("POST", "/api/create", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/..%2f..%2fetc/passwd", 404),
        ("GET", "/docs", 404),
        ("POST", "/v1/packs/other/reload", 404),
    ):
        answer = tiny_server.http.request(method, path)
        assert answer.status_code == status, path
        assert answer.json()["error"]


def test_nothing_that_was_sent_is_in_the_log(tiny_server: Served) -> None:
    """Neither a prompt nor a forged line: model names and paths with line breaks and colours were among them."""
    tiny_server.http.get("/v1/models/a%0d%0aINFO:%20forged%1b%5b31m")
    tiny_server.chat(messages=[{"role": "user", "content": "zebra\nINFO: forged"}], max_tokens=2)
    log = "".join(tiny_server.log)
    assert "forged" not in log and "zebra" not in log and "\x1b" not in log


def test_requests_made_from_its_openapi(tiny_server: Served) -> None:
    """A few of what ``python benchmarks/serve.py openapi`` sends."""
    found = openapi_cases(tiny_server.url, 2, "tiny")
    assert found["cases"] >= 20 and found["failures"] == []
