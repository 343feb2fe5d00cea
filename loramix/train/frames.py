"""Templates that put a short request before or after a text, as people type them."""

from __future__ import annotations

import random

_BOTH = (
    "{ask}\n{input}",
    "{ask}\n\n{input}",
    "{ask}\n\n{input}",
    "{ask} {input}",
    '{ask} "{input}"',
    "{ask}\n'{input}'",
    '{ask}\n\n"{input}"',
    "{ask} Text: {input}",
    "{ask}\n\nText: {input}",
    "{ask}\n---\n{input}",
    "{ask} -> {input}",
    "{input}\n\n{ask}",
    "{input}\n\n{ask}",
    "{input}\n{ask}",
    '"{input}" {ask}',
    '"{input}"\n\n{ask}',
    "{input} - {ask}",
    "Text: {input}\n\n{ask}",
    "hi, {ask} {input}",
    "hey {ask}\n{input}",
    "ok so {ask} {input}",
    "quick question, {ask} {input}",
)
"""Frames for questions and commands; the request has its own punctuation."""
_COMMAND = (
    "{ask}: {input}",
    "{ask}: {input}",
    "{ask}:\n{input}",
    "{ask}:\n\n{input}",
    '{ask}: "{input}"',
    "please {ask}: {input}",
    "please {ask}\n\n{input}",
    "{ask} please. {input}",
    "{ask} pls: {input}",
    "can you {ask}? {input}",
    "could you {ask}?\n\n{input}",
    "can you please {ask}: {input}",
    "i need you to {ask}: {input}",
    "i want you to {ask}. {input}",
    "would you {ask} for me? {input}",
    "{input}\n\nplease {ask}",
    "{input}\n\ncan you {ask}?",
    "{ask}, thanks. {input}",
    "here it is: {input}\n\n{ask}",
)
"""Frames for commands only, without punctuation."""


def framed(ask: str, text: str, rng: random.Random) -> str:
    """Join a request and its text.

    Args:
        ask: a question that ends with ``?``, or a command without punctuation at its end.
        text: the text of the request.
        rng: source of the random frame, letter case and full stop.

    Returns:
        The prompt.
    """
    question = ask.endswith("?")
    frame = rng.choice(_BOTH if question or rng.random() < 0.4 else _COMMAND)
    if not question and frame in _BOTH and rng.random() < 0.5:
        ask += "."
    if question and rng.random() < 0.1:
        ask = ask[:-1]  # as in hasty typing
    before, _, after = frame.partition("{input}")
    parts = [part.replace("{ask}", ask) for part in (before, after)]
    if rng.random() < 0.7:
        parts = [_capital(part) for part in parts]
    return text.join(parts)


def _capital(part: str) -> str:
    """Capitalize the first letter, except of a placeholder."""
    start = len(part) - len(part.lstrip())
    return part[:start] + part[start : start + 1].upper() + part[start + 1 :]
