"""Prompts as messages, and a skill's instruction templates, whose ``{input}`` is plain text.

How a base writes a conversation is `loramix.chat_template`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from loramix.errors import InvalidPrompt

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
        role, content = message.get("role"), message.get("content")
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
    if "\0" in "".join(message["content"] for message in checked):
        raise InvalidPrompt("the prompt holds a NUL character; remove it.")
    return checked


def fill(template: str, text: str) -> str:
    """Put ``text`` into an instruction template's ``{input}``; nothing else in it is special."""
    return template.replace("{input}", text)
