"""Requests in the forms that Open WebUI, the Agents SDK and Instructor send them, against one server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving import ASK, Served

CHATS = ("/v1/chat/completions", "/api/chat")
TOOL = {
    "type": "function",
    "function": {
        "name": "search_notes",
        "description": "Search the user's notes.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
}
PIXEL = "iVBORw0KGgo="
PANEL: dict[str, Any] = {
    "temperature": 0.7,
    "seed": 5,
    "stop": ["\u0001"],
    "top_k": 30,
    "top_p": 0.95,
    "min_p": 0.0,
    "frequency_penalty": 0.4,
    "presence_penalty": -0.3,
    "repeat_penalty": 1.2,
    "repeat_last_n": -1,
    "mirostat": 0,
    "mirostat_eta": 0.1,
    "mirostat_tau": 5.0,
    "tfs_z": 1,
    "num_ctx": 2048,
    "num_batch": 256,
    "num_keep": 5,
    "use_mmap": True,
    "num_thread": 2,
    "reasoning_effort": "low",
}
"""All settings of its panel for a chat, with values that the server can honour or ignore."""


def ask(server: Served, path: str, *, stream: bool = False, panel: Any = None, **body: Any) -> Any:
    """A chat with settings where each protocol has them."""
    panel = {} if panel is None else panel
    limits: dict[str, Any] = {"max_tokens": 4, **panel}
    if path.startswith("/api"):
        limits = {"options": {"num_predict": 4, **panel}}
    return server.post(path, **{"model": "tiny", "messages": [ASK], "stream": stream, **limits, **body})


def text(path: str, answer: Any) -> str:
    """What an answer says."""
    assert answer.status_code == 200, answer.text
    found = answer.json()
    said: str = (found if path.startswith("/api") else found["choices"][0])["message"]["content"]
    return said


@pytest.mark.parametrize("path", CHATS)
def test_all_settings_of_the_panel(tiny_server: Served, path: str) -> None:
    extra: dict[str, Any] = {"think": False, "keep_alive": "5m"}
    said = text(path, ask(tiny_server, path, panel=PANEL, **extra))
    assert said == text(path, ask(tiny_server, path, panel=PANEL, **extra))  # the seed counts
    streamed = ask(tiny_server, path, stream=True, panel=PANEL, **extra)
    assert streamed.status_code == 200 and "error" not in streamed.text
    nulls = dict.fromkeys(PANEL)
    assert text(path, ask(tiny_server, path, panel=nulls, think=None, tools=None)) == text(
        path, ask(tiny_server, path)
    )


def test_repeat_last_n_is_honoured_in_both_protocols(tiny_server: Served) -> None:
    def said(**panel: Any) -> str:
        asked = {"max_tokens": 12, "num_predict": 12, **panel}
        first, second = (text(path, ask(tiny_server, path, panel=asked)) for path in CHATS)
        assert first == second
        return first

    usual = said()
    assert said(repeat_penalty=50, repeat_last_n=0) == usual
    assert said(repeat_penalty=50, repeat_last_n=-1) == said(repeat_penalty=50, repeat_last_n=2048) != usual
    for path in CHATS:
        answer = ask(tiny_server, path, panel={"repeat_last_n": -2})
        assert answer.status_code == 400 and "repeat_last_n is -2; it must be" in answer.text


@pytest.mark.parametrize("path", CHATS)
@pytest.mark.parametrize("stream", [True, False])
def test_tools_that_are_on_by_default_get_the_setting_that_helps(
    tiny_server: Served, path: str, stream: bool
) -> None:
    answer = ask(tiny_server, path, stream=stream, tools=[TOOL] * 40)
    assert answer.status_code == 400
    error = answer.json()["error"]
    message = error if path.startswith("/api") else error["message"]
    assert message.startswith("tools requests tools") and "set Function Calling to Legacy" in message
    assert message.count(".") == 1  # one sentence


def test_a_forced_tool_gets_the_same_sentence(tiny_server: Served) -> None:
    forced = {"type": "function", "function": {"name": "search_notes"}}
    for choice in (forced, "required", "auto"):
        answer = tiny_server.chat(tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "tools"


@pytest.mark.parametrize(
    "path, bias", [("/v1/chat/completions", {"50": -10}), ("/api/chat", "50:-10"), ("/api/chat", {"50": -10})]
)
def test_a_bias_is_refused_in_both_protocols(tiny_server: Served, path: str, bias: Any) -> None:
    answer = ask(tiny_server, path, panel={"logit_bias": bias})
    assert answer.status_code == 400 and "logit_bias is not supported here" in answer.text
    assert text(path, ask(tiny_server, path, panel={"logit_bias": {}}))


def test_a_picture_is_named_in_both_protocols(tiny_server: Served) -> None:
    parts = [
        {"type": "text", "text": "what is it?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
    ]
    for stream in (True, False):
        found = tiny_server.chat(messages=[{"role": "user", "content": parts}], stream=stream)
        assert found.status_code == 400 and "messages[0].content[1] is an image" in found.text
        images = {"role": "user", "content": "what is it?", "images": [PIXEL]}
        found = ask(tiny_server, "/api/chat", stream=stream, messages=[images])
        assert found.status_code == 400 and "messages[0].images holds images" in found.text


@pytest.mark.parametrize("path", CHATS)
def test_a_history_that_another_model_began(tiny_server: Served, path: str) -> None:
    arguments: Any = {"query": "tea"}
    call = {"index": 0, "function": {"name": "search_notes", "arguments": arguments}}
    if path.startswith("/v1"):
        function = {"name": "search_notes", "arguments": json.dumps(arguments)}
        call = {"id": "c7", "type": "function", "function": function}
    history = [
        {"role": "system", "content": "Be kind."},
        ASK,
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "go on"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c7", "content": "green tea at four"},
        ASK,
    ]
    plain = [
        *history[:4],
        {
            "role": "assistant",
            "content": '[called search_notes({"query": "tea"})]\n[result: green tea at four]',
        },
        ASK,
    ]
    assert text(path, ask(tiny_server, path, messages=history)) == text(
        path, ask(tiny_server, path, messages=plain)
    )


def test_retrieval_asks_for_vectors(tiny_server: Served) -> None:
    pieces = ["a dog " * 20, "a cat"]
    theirs = tiny_server.post("/api/embed", model="tiny", input=pieces, truncate=True).json()["embeddings"]
    openai = tiny_server.post("/v1/embeddings", model="tiny", input=pieces).json()["data"]
    assert len(theirs) == 2
    for vector, row in zip(theirs, openai, strict=True):
        assert vector == pytest.approx(
            row["embedding"], abs=1e-3
        )  # what is cached decides how sums are rounded
    long = tiny_server.post("/api/embed", model="tiny", input=["word " * 4000], truncate=True)
    assert long.status_code == 200 and len(long.json()["embeddings"]) == 1
    short = tiny_server.post("/api/embed", model="tiny", input="word " * 4000, truncate=False)
    assert short.status_code == 400 and "tokens" in short.json()["error"]


def test_what_is_not_here_is_named(tiny_server: Served) -> None:
    for path in ("/v1/responses", "/v1/messages", "/v1/audio/speech", "/api/pull"):
        answer = tiny_server.post(path, model="tiny", input="hello", stream=None)
        assert answer.status_code == 404 and f"there is no POST {path} here" in answer.text
    unload = tiny_server.post("/api/generate", model="tiny", keep_alive=0, prompt="")
    assert unload.status_code == 200 and unload.json()["done"]
