r"""Rewrites regular expressions of JSON Schema (JavaScript syntax) for llguidance (Rust syntax).

Where the two differ, the rewritten pattern allows less, or the pattern is rejected. llguidance has no look-around.
Its classes with all control characters but without '"' or '\' accept these in escaped form (derivre's
``json_quote``), so no class contains the character NUL.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MAX_REPEATS = 10_000
_DOT = r"[^\n\r\u2028\u2029\x00]"
_OUTSIDE = {".": _DOT, r"\s": r"[ \t-\r]", r"\S": r"[^\s\ufeff\x00]"}
_INSIDE = {r"\s": r" \t-\r", r"\S": r"[^\s\ufeff\x00]"}
_INSIDE_NEGATED = {r"\s": r"\s\ufeff", r"\S": r"\S\x85"}
_CLASSES = (r"\s", r"\S", r"\w", r"\W", r"\d", r"\D")
_REPEATS = re.compile(r"\{([0-9]+)(?:,([0-9]+))?")
_NUL = re.compile(r"\\x00|\\u0000|\\u\{0+\}|\0")


class _Part(NamedTuple):
    place: int
    raw: str
    depth: int
    """Groups around it."""
    text: str
    """Rewritten."""


def rewritten(pattern: str) -> list[str]:
    """Rewrite a pattern of JSON Schema as patterns that together allow the same strings, or fewer.

    Args:
        pattern: a regular expression, matched anywhere in a string.

    Returns:
        One pattern, or one per look-ahead at the beginning and one for the rest.

    Raises:
        ValueError: the pattern cannot be rewritten; the message gives the reason.
    """
    parts = _parts(pattern)
    found: list[str] = []
    start = 1
    while pattern.startswith("^") and pattern.startswith("(?=", start):
        outer = next(part.depth for part in parts if part.place == start)
        end = next(
            part.place for part in parts if part.place > start and (part.raw, part.depth) == (")", outer)
        )
        found.append(f"^(?:{_text(parts, start + 3, end)})")
        start = end + 1
    if not found or any((part.raw, part.depth) == ("|", 0) for part in parts):
        return [_text(parts, 0, len(pattern))]  # with alternatives the condition belongs to one of them alone
    return [*found, "^" + _text(parts, start, len(pattern))]


def _text(parts: list[_Part], start: int, end: int) -> str:
    return "".join(part.text for part in parts if start <= part.place < end)


def _parts(pattern: str) -> list[_Part]:
    """Split a pattern into characters, escapes and classes."""
    parts: list[_Part] = []
    place = depth = 0
    while place < len(pattern):
        raw = text = _escape(pattern, place) if pattern[place] == "\\" else pattern[place]
        if raw == "[":
            raw = pattern[place : _class_end(pattern, place + 1)]
            text = _class(raw)
        elif _NUL.fullmatch(raw) or raw == r"\0":
            raise ValueError("it holds the character NUL")
        elif raw in (r"\A", r"\z", r"\Z"):
            raise ValueError(f"{raw} is no anchor in JSON Schema; use ^ and $")
        elif (repeats := _REPEATS.match(pattern, place)) and max(map(int, repeats.groups("0"))) > MAX_REPEATS:
            raise ValueError(f"it repeats more than {MAX_REPEATS} times")
        depth -= raw == ")"
        parts.append(_Part(place, raw, depth, _OUTSIDE.get(raw, text)))
        depth += raw == "("
        place += len(raw)
    if depth:
        raise ValueError("its parentheses do not match")
    return parts


def _escape(pattern: str, place: int) -> str:
    r"""Return the escape at a position; ``\x00`` and ``\u0000`` completely."""
    nul = _NUL.match(pattern, place)
    return nul[0] if nul else pattern[place : place + 2]


def _class_end(pattern: str, place: int) -> int:
    """Return the position after a class's closing bracket; ``place`` is after the opening one."""
    place += pattern.startswith("^", place)
    if pattern.startswith("]", place):
        raise ValueError("a character class is empty; write ']' in it as \\]")
    while place < len(pattern):
        if pattern[place] == "]":
            return place + 1
        if pattern[place] == "[":
            raise ValueError("write '[' in a character class as \\[")
        if pattern[place : place + 2] in ("&&", "--", "~~"):
            raise ValueError(f"'{pattern[place : place + 2]}' in a character class has two meanings")
        place += 2 if pattern[place] == "\\" else 1
    raise ValueError("a character class does not end")


def _class(raw: str) -> str:
    """Rewrite a character class."""
    negated = raw.startswith("[^")
    words, text, place = (_INSIDE_NEGATED if negated else _INSIDE), "", 1 + negated
    while place < len(raw) - 1:
        item = _escape(raw, place) if raw[place] == "\\" else raw[place]
        if item == "-" and (place in (1 + negated, len(raw) - 2) or raw[place - 2 : place] in _CLASSES):
            item = r"\-"  # no range
            place -= 1
        place += len(item)
        if _NUL.fullmatch(item) or item == r"\0":
            if raw.startswith("-", place) and place < len(raw) - 2:
                text += r"\x01"  # the beginning of a range
            elif not negated:
                raise ValueError("it holds the character NUL")
        else:
            text += words.get(item, item)
    return rf"[^{text}\x00]" if negated else f"[{text}]"
