"""Conversations with roles, parts and turns of tools, as clients send them and as the engine reads them."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest
from serving import ASK, Served

from loramix.prompts import as_messages
from loramix.server.chat_messages import ChatMessage, engine_messages

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
CALLED = '[called weather({"city": "Bonn"})]'


def turns(*messages: dict[str, Any]) -> list[tuple[str, str]]:
    """Role and text of what the engine gets, checked as the engine does."""
    found = engine_messages([ChatMessage.model_validate(message) for message in messages])
    return [(message["role"], message["content"]) for message in as_messages(found)]


def test_what_tools_said_goes_on_with_the_assistants_turn() -> None:
    assert turns(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it warm?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "22 °C"},
        {"role": "assistant", "content": "It is 22 °C."},
        {"role": "user", "content": "Thanks. And tomorrow?"},
    ) == [
        ("system", "Be brief."),
        ("user", "Is it warm?"),
        ("assistant", f"{CALLED}\n[result: 22 °C]\nIt is 22 °C."),
        ("user", "Thanks. And tomorrow?"),
    ]


def test_results_at_the_end_are_what_is_answered() -> None:
    assert turns(
        {"role": "user", "content": "Is it warm?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "name": "weather", "content": [{"type": "text", "text": "22"}]},
        {"role": "tool", "tool_name": "weather", "content": "23"},
    ) == [
        ("user", "Is it warm?"),
        ("assistant", f"I look.\n{CALLED}\n{CALLED}"),
        ("user", "[result of weather: 22]\n[result of weather: 23]"),
    ]


def test_older_and_ollamas_forms_of_calls() -> None:
    function = {"name": "add", "arguments": {"a": 1, "b": "é"}}  # Ollama's arguments are objects
    for turn in ({"tool_calls": [{"function": function}]}, {"function_call": function}):
        assert turns(
            {"role": "user", "content": "1 + é?"},
            {"role": "assistant", "content": "", **turn},
            {"role": "function", "name": "add", "content": "3"},
            {"role": "user", "content": "So?"},
        )[1] == ("assistant", '[called add({"a": 1, "b": "é"})]\n[result of add: 3]')
    bare = {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "function": {"name": "now"}}]}
    assert (
        turns({"role": "user", "content": "?"}, bare, {"role": "user", "content": "!"})[1][1]
        == "[called now()]"
    )


def test_roles_and_parts_of_text() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "input_text", "text": "dog"}, "!"]
    assert turns(
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": "x", "name": "Ann"},
        {"role": "assistant", "content": None, "refusal": "I will not.", "audio": None, "tool_calls": []},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant"},
        {"role": "user", "content": parts, "images": None},
    ) == [
        ("system", "Be kind."),
        ("user", "x"),
        ("assistant", "I will not."),
        ("assistant", "No."),
        ("assistant", ""),
        ("user", "a dog!"),
    ]
    # a result that nobody called for, and one between two users' messages
    assert turns({"role": "tool", "content": "1"}, {"role": "user", "content": "x"})[0] == (
        "assistant",
        "[result: 1]",
    )
    assert turns({"role": "tool", "content": "1"}) == [("user", "[result: 1]")]


@pytest.mark.parametrize(
    "message, words",
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "content[0] is an image",
        ),
        ({"role": "user", "content": ["x", {"type": "input_audio"}]}, "content[1] is sound"),
        ({"role": "user", "content": [{"type": "file", "file": {}}]}, "content[0] is a file"),
        ({"role": "user", "content": "x", "images": ["aGk="]}, "images holds images"),
        ({"role": "user", "content": [{"type": "text"}]}, "content[0] is not a text part"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}] * 65}, "content has 65 parts"),
        ({"role": "user"}, "content is missing"),
        ({"role": "tool", "content": None}, "content is missing"),
        ({"role": "critic", "content": "x"}, 'role is "critic"; it must be "system"'),
        ({"content": "x"}, "role is missing"),
        ({"role": "assistant", "tool_calls": [{"function": "x"}]}, 'tool_calls[0].function is "x"'),
    ],
)
def test_what_cannot_be_read_is_named(tiny_server: Served, message: dict[str, Any], words: str) -> None:
    with pytest.raises(pydantic.ValidationError):
        ChatMessage.model_validate(message)
    for path in ("/v1/chat/completions", "/v1/explain", "/api/chat"):
        answer = tiny_server.post(path, model="tiny", messages=[ASK, message])
        error = answer.json()["error"]
        text = error if path.startswith("/api") else error["message"]
        assert answer.status_code == 400 and f"messages[1].{words}" in text
        if not path.startswith("/api"):
            assert text.startswith(error["param"])


@pytest.mark.parametrize(
    "path, field, free",
    [
        ("/v1/chat/completions", {"tools": [{"type": "function"}]}, {"tool_choice": "none"}),
        ("/v1/chat/completions", {"functions": [{"name": "f"}]}, {"function_call": "none"}),
        (
            "/v1/chat/completions",
            {"tools": [{}], "tool_choice": "required"},
            {"tools": [], "tool_choice": "auto"},
        ),
        ("/api/chat", {"tools": [{"type": "function"}]}, {"tools": []}),
        ("/api/chat", {"tools": [{}], "stream": True}, {"tools": None}),
    ],
)
def test_a_request_for_tools_gets_a_sentence(
    tiny_server: Served, path: str, field: dict[str, Any], free: dict[str, Any]
) -> None:
    least = {"model": "tiny", "messages": [ASK], "stream": False, "max_tokens": 1}
    answer = tiny_server.post(path, **{**least, **field})
    assert answer.status_code == 400
    assert f"{next(iter(field))} requests tools, which these models cannot call" in answer.text
    assert tiny_server.post(path, **{**least, **field, **free}).status_code == 200


def test_a_history_with_tools_is_answered(tiny_server: Served) -> None:
    history = [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "22"},
    ]
    said = tiny_server.chat(messages=history, max_tokens=4).json()["choices"][0]["message"]["content"]
    same = [ASK, {"role": "assistant", "content": CALLED}, {"role": "user", "content": "[result: 22]"}]
    assert said == tiny_server.chat(messages=same, max_tokens=4).json()["choices"][0]["message"]["content"]
    answer = tiny_server.post(
        "/api/chat", model="tiny", messages=history, stream=False, options={"num_predict": 4}
    )
    assert answer.json()["message"]["content"] == said


@pytest.mark.parametrize("kind", ["thinking", "reasoning", "redacted_thinking"])
def test_thoughts_of_another_model_are_left_out(kind: str) -> None:
    parts = [{"type": kind, kind: "hm"}, {"type": "text", "text": "yes"}]
    assert turns({"role": "assistant", "content": parts}, {"role": "user", "content": "x"}) == [
        ("assistant", "yes"),
        ("user", "x"),
    ]
