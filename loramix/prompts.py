"""Prompts as messages, and a skill's instruction templates with a literal ``{input}``.

`loramix.templates.chat_template` renders messages as the base's text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from loramix.errors import InvalidPrompt
from loramix.formats.textfile import has_lone_surrogate

Message: TypeAlias = Mapping[str, str]
_ROLES = ("system", "user", "assistant")


def as_messages(prompt: str | Sequence[Message]) -> list[dict[str, str]]:
    """Turn a prompt or OpenAI-style messages into a checked list of messages.

    Args:
        prompt: the user's text, or messages with ``role`` (system, user, assistant) and ``content``.

    Raises:
        InvalidPrompt: empty, of an unknown role, or not ending with a user's message.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise InvalidPrompt("a prompt must be text, or a list of messages with role and content.")
    checked: list[dict[str, str]] = []
    for message in messages:
        role, content = message.get("role"), _text_of(message.get("content"))
        if role not in _ROLES or not isinstance(content, str):
            raise InvalidPrompt(
                f"a message with role {role!r} and content of type {type(content).__name__} cannot be used: "
                f"it needs a role of {', '.join(_ROLES)} and text."
            )
        checked.append({"role": role, "content": content})
    if not checked or checked[-1]["role"] != "user":
        raise InvalidPrompt("the conversation must end with a user's message; add one.")
    if not checked[-1]["content"].strip():
        raise InvalidPrompt("the prompt is empty; write what you want done, and the text to do it with.")
    whole = "".join(message["content"] for message in checked)
    if "\0" in whole:
        raise InvalidPrompt("the prompt holds a NUL character; remove it.")
    if has_lone_surrogate(whole):
        raise InvalidPrompt(
            "the prompt holds bytes that are not UTF-8 text, or half a character; remove them."
        )
    return checked


def _text_of(content: Any) -> Any:
    """Join the text of OpenAI-style parts; return any other content unchanged.

    Raises:
        InvalidPrompt: a part is not text; the message names its type.
    """
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        return content
    for part in content:
        if not isinstance(part.get("text"), str) or part.get("type", "text") not in ("text", "input_text"):
            kind = str(part.get("type") or "without a type")
            what = next((word for word in ("image", "audio", "video", "file") if word in kind), "other")
            raise InvalidPrompt(
                f"a message holds a part of type {kind[:40]!r} ({what}): the base reads text alone; leave that part "
                "out, or put what it says into words."
            )
    return "".join(part["text"] for part in content)


def fill(template: str, text: str) -> str:
    """Replace ``{input}`` in an instruction template with ``text``; no other characters are special."""
    return template.replace("{input}", text)
