"""Messages as clients of either protocol send them, and as the engine reads them: roles of three kinds, plain text.

Turns of tools in a history become text: a call at the end of the assistant's message, its result behind it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, model_validator

from loramix.server.fields import Body, Refusal, refused, says

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


def _text_of(content: Any) -> Any:
    """Join a list's parts of text."""
    if not isinstance(content, list):
        return content
    if len(content) > MAX_PARTS:
        raise refused(f"has {len(content)} parts; it may have {MAX_PARTS} at most.")
    pieces = []
    for number, part in enumerate(content):
        if isinstance(part, str):
            pieces.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind in _KINDS:
            raise refused(f"is {_KINDS[kind]}, and only text is read here; leave it out.", number)
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text", "refusal") or not isinstance(text, str):
            raise refused('is no part of text; it must be {"type": "text", "text": "…"}.', number)
        pieces.append(text)
    return "".join(pieces)


Content = Annotated[str, BeforeValidator(_text_of), says("text, or a list of parts of text")]


class Function(Body):
    """What a tool's call names."""

    name: Annotated[str, says("a function's name", max_length=200)] = "tool"
    arguments: Annotated[Any, says("JSON, as text or as an object")] = ""


class Call(Body):
    """A call of a tool, in a history."""

    what = "a tool call with its function"
    ignored: ClassVar[frozenset[str]] = frozenset({"id", "type", "index"})
    function: Annotated[Function, says("an object with name and arguments")] = Function()

    def text(self) -> str:
        """As the base reads it."""
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
        "images": Refusal("holds images, and only text is read here; leave them out.", ([],)),
    }
    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool", "function"],
        says('"system", "developer", "user", "assistant", "tool" or "function"'),
    ]
    content: Annotated[Content | None, says("text, or a list of parts of text")] = None
    refusal: Annotated[str | None, says("text")] = None
    name: Annotated[str | None, says("a name")] = None
    tool_name: Annotated[str | None, says("a tool's name")] = None
    tool_calls: Annotated[
        list[Call] | None, says(f"a list of at most {MAX_CALLS} tool calls", max_length=MAX_CALLS)
    ] = None
    function_call: Annotated[Function | None, says("an object with name and arguments")] = None

    @model_validator(mode="after")
    def _has_text(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise refused("is missing; it must be text, or a list of parts of text.", "content")
        return self

    @property
    def of_tool(self) -> bool:
        """Whether it is what a tool gave."""
        return self.role in ("tool", "function")

    def text(self) -> str:
        """Its content and calls, as the base reads them."""
        said = self.content or self.refusal or ""
        if self.of_tool:
            name = self.tool_name or self.name
            return f"[result of {name}: {said}]" if name else f"[result: {said}]"
        calls = list(self.tool_calls or ())
        if self.function_call is not None:
            calls.append(Call(function=self.function_call))
        return "\n".join([*([said] if said or not calls else []), *(call.text() for call in calls)])


Messages = Annotated[
    list[ChatMessage], says(f"a list of 1 to {MAX_MESSAGES} messages", min_length=1, max_length=MAX_MESSAGES)
]


def plain(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """A conversation as the engine takes it: system, user, assistant, and text.

    What tools gave goes on with the assistant's message before it, and so does what the assistant said to it;
    at the end of the conversation it is the user's message, which is to be answered.
    """
    found: list[dict[str, str]] = []
    end = len(messages)
    while end and messages[end - 1].of_tool:
        end -= 1
    goes_on = False
    for message in messages[:end]:
        role = "system" if message.role == "developer" else "assistant" if message.of_tool else message.role
        if found and found[-1]["role"] == role == "assistant" and (goes_on or message.of_tool):
            found[-1]["content"] += "\n" + message.text()
        else:
            found.append({"role": role, "content": message.text()})
        goes_on = message.of_tool
    if results := [message.text() for message in messages[end:]]:
        found.append({"role": "user", "content": "\n".join(results)})
    return found
