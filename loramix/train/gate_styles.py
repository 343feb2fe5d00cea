"""Styles of typing and speaking, applied to requests of all classes, so that the style says nothing about the class."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from loramix.models.message_reading import TEXT
from loramix.train.gate_pieces import OTHER, Piece, plain
from loramix.train.gate_wordings import Styles, of_part

NEIGHBOURS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_WORD = re.compile(r"[A-Za-z]{4,}")
_MARKS = re.compile(r"[.,;:!?\"'`*#<>()\[\]{}|=_-]+")


def styled(
    pieces: tuple[Piece, ...], styles: Styles, rng: random.Random, *, dev: bool | None = False
) -> tuple[Piece, ...]:
    """The message as it is, or in one of the styles.

    Args:
        pieces: of a message.
        styles: see `loramix.train.gate_wordings`.
        rng: draws.
        dev: whether openings and closings are those that training does not see.
    """
    draw = rng.random()
    for share, style in (
        (0.17, polite),
        (0.1, with_typos),
        (0.08, spoken),
        (0.06, text_first),
        (0.03, shouted),
    ):
        if draw < share:
            return style(pieces, styles, rng, dev)
        draw -= share
    return pieces


def polite(
    pieces: tuple[Piece, ...], styles: Styles, rng: random.Random, dev: bool | None
) -> tuple[Piece, ...]:
    """With a greeting or some context before it, and thanks or a remark after it."""
    openings = rng.sample(of_part(styles.openings, dev=dev), rng.choice((0, 1, 1, 2, 3)))
    closings = rng.sample(of_part(styles.closings, dev=dev), rng.choice((0, 1, 1, 2)))
    gap = rng.choice((" ", "\n", "\n\n"))
    before = " ".join(openings) + gap if openings else ""
    after = rng.choice((" ", "\n\n")) + " ".join(closings) if closings else ""
    return tuple(p for p in (Piece(before), *pieces, Piece(after)) if p.text)


def with_typos(
    pieces: tuple[Piece, ...], styles: Styles, rng: random.Random, dev: bool | None
) -> tuple[Piece, ...]:
    """Typed in a hurry: the instruction has typos, and often no capitals."""
    lower = rng.random() < 0.5
    return tuple(
        piece
        if piece.tag == TEXT
        else Piece(
            typos(piece.text.lower() if lower else piece.text, rng, rng.choice((0.1, 0.2, 0.3))), piece.tag
        )
        for piece in pieces
    )


def typos(text: str, rng: random.Random, rate: float) -> str:
    """Swap, drop, double or mistype a letter in a share of the words."""

    def spoil(match: re.Match[str]) -> str:
        word = match[0]
        if rng.random() >= rate:
            return word
        i = rng.randrange(len(word) - 1)
        kind = rng.randrange(4)
        if kind == 0:
            return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
        if kind == 1:
            return word[:i] + word[i + 1 :]
        if kind == 2:
            return word[:i] + word[i] + word[i:]
        row = next((row for row in NEIGHBOURS if word[i].lower() in row), "ea")
        place = row.find(word[i].lower())
        return word[:i] + row[max(0, min(len(row) - 1, place + rng.choice((-1, 1))))] + word[i + 1 :]

    return _WORD.sub(spoil, text)


def spoken(
    pieces: tuple[Piece, ...], styles: Styles, rng: random.Random, dev: bool | None
) -> tuple[Piece, ...]:
    """As speech recognition writes it: no punctuation, no capitals, filler words."""
    whole = rng.random() < 0.6  # else the text was pasted, and only the request spoken
    found = []
    for piece in pieces:
        if piece.tag == TEXT and not whole:
            found.append(piece)
            continue
        words = _MARKS.sub(" ", piece.text).lower().split()
        if piece.tag != TEXT:
            words = [
                w
                for word in words
                for w in ((rng.choice(styles.voice_middles), word) if rng.random() < 0.06 else (word,))
            ]
        if words:
            found.append(Piece(" ".join(words) + " ", piece.tag))
    if rng.random() < 0.6:
        found.insert(0, Piece(rng.choice(of_part(styles.voice_starts, dev=dev)) + " "))
    if rng.random() < 0.4:
        found.append(Piece(rng.choice(of_part(styles.voice_ends, dev=dev))))
    found[-1] = Piece(found[-1].text.rstrip() or found[-1].text, found[-1].tag)
    return tuple(found)


def text_first(
    pieces: tuple[Piece, ...], styles: Styles, rng: random.Random, dev: bool | None
) -> tuple[Piece, ...]:
    """The text first, announced, then the request; as it is where the request stands on both sides."""
    texts = [piece for piece in pieces if piece.tag == TEXT]
    asks = [piece for piece in pieces if piece.tag not in (TEXT, OTHER)]
    if len(texts) != 1 or len(asks) != 1 or len(pieces) != 2:
        return pieces
    before = (
        rng.choice(of_part(styles.first_here, dev=dev)) + rng.choice(("\n", "\n\n"))
        if rng.random() < 0.7
        else ""
    )
    between = "\n\n" + (rng.choice(of_part(styles.then, dev=dev)) + " " if rng.random() < 0.6 else "")
    ask = Piece(asks[0].text.strip().rstrip(":"), asks[0].tag)
    return tuple(p for p in (Piece(before), texts[0], Piece(between), ask) if p.text)


def shouted(
    pieces: tuple[Piece, ...], styles: Styles, rng: random.Random, dev: bool | None
) -> tuple[Piece, ...]:
    """The request in capitals."""
    return tuple(piece if piece.tag == TEXT else Piece(piece.text.upper(), piece.tag) for piece in pieces)


def long_text(texts: Sequence[str], characters: int) -> str:
    """Several texts one after the other, cut at a word."""
    joined = "\n\n".join(texts)
    return (
        joined if len(joined) <= characters else joined[:characters].rpartition(" ")[0] or joined[:characters]
    )


def words_of(pieces: Sequence[Piece]) -> list[str]:
    """Words of a message that a question can be about."""
    found = _WORD.findall(plain(pieces))
    return found[:80] or ["it"]
