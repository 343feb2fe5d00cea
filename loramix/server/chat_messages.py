"""Chat messages of both protocols, converted to the engine's form: three roles and plain text.

Tool turns in a history become text: the call at the end of the assistant's message, then its result.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, model_validator

from loramix.server.fields import Body, Refusal, invalid_field, must_be

MAX_MESSAGES = 512
MAX_PARTS = 64
MAX_CALLS = 64
_KINDS = {
    "image_url": "an image",
    "image": "an image",
    "input_image": "an image",
    "input_audio": "sound",
    "audio": "sound",
    "video_url": "a video",
    "file": "a file",
}
_THOUGHTS = ("thinking", "reasoning", "redacted_thinking")
"""Parts in which other models kept their reasoning; left out, like ``reasoning_content``."""


def _text_of(content: Any) -> Any:
    """Join the text parts of a content list."""
    if not isinstance(content, list):
        return content
    if len(content) > MAX_PARTS:
        raise invalid_field(f"has {len(content)} parts; it may have at most {MAX_PARTS}.")
    pieces = []
    for number, part in enumerate(content):
        if isinstance(part, str):
            pieces.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in _KINDS:
            raise invalid_field(f"is {_KINDS[kind]}, and only text is supported; leave it out.", number)
        if isinstance(kind, str) and kind in _THOUGHTS:
            continue
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(text, str):
            raise invalid_field('is not a text part; it must be {"type": "text", "text": "…"}.', number)
        pieces.append(text)
    return "".join(pieces)


Content = Annotated[str, BeforeValidator(_text_of), must_be("text, or a list of parts of text")]


class Function(Body):
    """Function of a tool call."""

    name: Annotated[str, must_be("a function's name", max_length=200)] = "tool"
    arguments: Annotated[Any, must_be("JSON, as text or as an object")] = ""


class Call(Body):
    """A tool call in a history."""

    what = "a tool call with its function"
    ignored: ClassVar[frozenset[str]] = frozenset({"id", "type", "index"})
    function: Annotated[Function, must_be("an object with name and arguments")] = Function()

    def text(self) -> str:
        """Return the call as text for the model."""
        arguments = self.function.arguments
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return f"[called {self.function.name}({arguments})]"


class ChatMessage(Body):
    """One message."""

    what = "a message with role and content"
    ignored: ClassVar[frozenset[str]] = frozenset(
        {
            "audio",
            "annotations",
            "reasoning",
            "reasoning_content",
            "thinking",
            "tool_call_id",
        }
    )
    refusals: ClassVar = {
        "images": Refusal("holds images, and only text is supported; leave them out.", ([],)),
    }
    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool", "function"],
        must_be('"system", "developer", "user", "assistant", "tool" or "function"'),
    ]
    content: Annotated[Content | None, must_be("text, or a list of parts of text")] = None
    refusal: Annotated[str | None, must_be("text")] = None
    name: Annotated[str | None, must_be("a name")] = None
    tool_name: Annotated[str | None, must_be("a tool's name")] = None
    tool_calls: Annotated[
        list[Call] | None, must_be(f"a list of at most {MAX_CALLS} tool calls", max_length=MAX_CALLS)
    ] = None
    function_call: Annotated[Function | None, must_be("an object with name and arguments")] = None

    @model_validator(mode="after")
    def _has_text(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise invalid_field("is missing; it must be text, or a list of parts of text.", "content")
        return self

    @property
    def is_tool_result(self) -> bool:
        """Whether the message is the result of a tool."""
        return self.role in ("tool", "function")

    def text(self) -> str:
        """Return the content and the tool calls as text for the model."""
        content = self.content or self.refusal or ""
        if self.is_tool_result:
            name = self.tool_name or self.name
            return f"[result of {name}: {content}]" if name else f"[result: {content}]"
        calls = list(self.tool_calls or ())
        if self.function_call is not None:
            calls.append(Call(function=self.function_call))
        return "\n".join([*([content] if content or not calls else []), *(call.text() for call in calls)])


Messages = Annotated[
    list[ChatMessage],
    must_be(f"a list of 1 to {MAX_MESSAGES} messages", min_length=1, max_length=MAX_MESSAGES),
]


def engine_messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Convert a conversation to the engine's form: roles system, user and assistant with plain text.

    Tool results, and the assistant's reply to them, are appended to the assistant's message before them. Tool
    results at the end of the conversation become the user message that is answered.
    """
    converted: list[dict[str, str]] = []
    end = len(messages)
    while end and messages[end - 1].is_tool_result:
        end -= 1
    continues = False
    for message in messages[:end]:
        role = (
            "system"
            if message.role == "developer"
            else "assistant"
            if message.is_tool_result
            else message.role
        )
        if (
            converted
            and converted[-1]["role"] == role == "assistant"
            and (continues or message.is_tool_result)
        ):
            converted[-1]["content"] += "\n" + message.text()
        else:
            converted.append({"role": role, "content": message.text()})
        continues = message.is_tool_result
    if results := [message.text() for message in messages[end:]]:
        converted.append({"role": "user", "content": "\n".join(results)})
    return converted
