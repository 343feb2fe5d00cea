"""Requests for the gate, in pieces that say what they are: text, instruction of a skill, or neither."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loramix.models.gate_window import GAP, is_cut, limits
from loramix.models.message_reading import ANSWER, TEXT

MARK = re.compile(r"\[([\w-]+): ([^\]]*)\]")
"""Words of a template with their tag: ``[sentiment: is it any good?]``."""
OTHER = ""
UNKNOWN = "?"
"""Tag of a piece in which text and instruction cannot be told apart."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a message."""

    text: str
    tag: str = OTHER
    """``text``, the class whose instruction it is, ``answer``, ``?`` (unknown), or empty: neither."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A message."""

    role: str
    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        """The message as it is sent."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Request:
    """A conversation that ends with a user's message, and what the gate should say of it."""

    turns: tuple[Turn, ...]
    target: Mapping[str, float]
    """Probability by skill or ``base``; sums to 1."""
    group: str
    """Requests of one wording share it."""
    kind: str
    """Where it comes from, for tables."""

    @property
    def text(self) -> str:
        """The last message."""
        return self.turns[-1].text


def user(*pieces: Piece) -> Turn:
    """A user's message without its empty pieces."""
    return Turn("user", tuple(piece for piece in pieces if piece.text))


def filled(template: str, text: str, tag: str) -> tuple[Piece, ...]:
    """A template around a text as pieces.

    Args:
        template: with ``{input}`` once.
        text: what stands there.
        tag: of the template's words.
    """
    before, _, after = template.partition("{input}")
    return tuple(p for p in (Piece(before, tag), Piece(text, TEXT), Piece(after, tag)) if p.text)


def asked_by(template: str) -> tuple[str, ...]:
    """The classes that a marked template asks for, in the order of the steps."""
    return tuple(dict.fromkeys(tag for tag, _ in MARK.findall(template) if tag != ANSWER))


def parsed(template: str, text: str) -> tuple[Piece, ...]:
    """A marked template around a text as pieces."""
    found: list[Piece] = []
    for i, part in enumerate(template.split("{input}")):
        if i:
            found.append(Piece(text, TEXT))
        at = 0
        for mark in MARK.finditer(part):
            found += [Piece(part[at : mark.start()], OTHER), Piece(mark[2], mark[1])]
            at = mark.end()
        found.append(Piece(part[at:], OTHER))
    return tuple(piece for piece in found if piece.text)


def plain(pieces: Iterable[Piece]) -> str:
    """The text of pieces."""
    return "".join(piece.text for piece in pieces)


def cut(pieces: Iterable[Piece], limit: tuple[int, int] | None) -> tuple[Piece, ...]:
    """Pieces without the middle that the gate does not read, as `loramix.models.gate_window.window` cuts a text."""
    pieces = tuple(pieces)
    length = sum(len(piece.text) for piece in pieces)
    if limit is None or not is_cut(length, limit):
        return pieces
    found: list[Piece] = []
    at = 0
    for piece in pieces:
        end = at + len(piece.text)
        if at < limit[0]:
            found.append(Piece(piece.text[: limit[0] - at], piece.tag))
        if at < limit[0] <= end:
            found.append(Piece(GAP, OTHER))
        if end > length - limit[1]:
            found.append(Piece(piece.text[max(0, length - limit[1] - at) :], piece.tag))
        at = end
    return tuple(found)


def read_turns(request: Request) -> list[Turn]:
    """The turns of a request that the gate reads, cut as it reads them."""
    turns = request.turns
    kept = limits([turn.role for turn in turns], [len(turn.text) for turn in turns])
    return [Turn(turns[i].role, cut(turns[i].pieces, limit)) for i, limit in kept]
