"""The words of a prompt that the gate looked at: its attention over tokens, summed over words of the messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

MAX_WORDS = 5
MAX_LETTERS = 32
_EDGE = 16  # bytes by which the cut end of a long message is found
_WORD = re.compile(rb"\S+")

Span = tuple[int, int]
Words = tuple[tuple[str, float], ...]
"""Words with their share of the gate's attention, from 0 to 1, the largest first."""


def attended_words(
    attention: npt.NDArray[np.float32],
    tokens: Sequence[int],
    first: int,
    contents: Sequence[str],
    piece: Callable[[int], bytes],
) -> Words:
    """Sum attention over words; what the chat template adds is left out.

    Args:
        attention: (T,) weight of each token; sums to 1.
        tokens: the T ids that were read.
        first: tokens before the cut of a long prompt; T or more if nothing was cut.
        contents: texts of the messages that were read, oldest first.
        piece: returns a token's bytes.

    Returns:
        At most `MAX_WORDS` words; equal words are counted together.
    """
    texts = [content.encode("utf-8", "replace") for content in contents if content]
    pieces = [piece(token) for token in tokens]
    totals: dict[str, float] = {}
    runs = [(slice(0, first), _spans_from_start), (slice(first, None), _spans_from_end)]
    for part, find in runs[: 1 if len(tokens) <= first else 2]:
        run = b"".join(pieces[part])
        weights = _per_byte(attention[part], pieces[part])
        for start, end in find(run, texts):
            for found in _WORD.finditer(run, start, end):
                word = _shown(found[0])
                if word:
                    totals[word] = totals.get(word, 0.0) + float(weights[found.start() : found.end()].sum())
    return tuple(sorted(totals.items(), key=lambda item: -item[1])[:MAX_WORDS])


def _per_byte(attention: npt.NDArray[np.float32], pieces: Sequence[bytes]) -> npt.NDArray[np.float64]:
    """Spread each token's weight over its bytes that are no white space."""
    weights = []
    for weight, piece in zip(attention, pieces, strict=True):
        visible = np.frombuffer(piece, np.uint8) > 32
        weights.append(visible * (float(weight) / max(1, visible.sum())))
    return np.concatenate(weights) if weights else np.zeros(0)


def _spans_from_start(run: bytes, texts: Sequence[bytes]) -> Iterator[Span]:
    """Where the messages are in the text from its start on; the last one found may be cut."""
    at = 0
    for text in map(bytes.strip, texts):
        place = run.find(text, at)
        if place < 0:
            place = run.find(text[:_EDGE], at)
            if place >= 0:
                yield place, len(run)
            return
        at = place + len(text)
        yield place, at


def _spans_from_end(run: bytes, texts: Sequence[bytes]) -> Iterator[Span]:
    """Where the messages are in the text from its end back; the last one found may be cut."""
    end = len(run)
    for text in map(bytes.strip, reversed(texts)):
        place = run.rfind(text, 0, end)
        if place < 0:
            place = run.rfind(text[-_EDGE:], 0, end)
            if place >= 0:
                yield 0, place + min(_EDGE, len(text))
            return
        yield place, place + len(text)
        end = place


def _shown(raw: bytes) -> str:
    """A word without punctuation around it and without control characters."""
    word = "".join(filter(str.isprintable, raw.decode("utf-8", "ignore")))
    word = re.sub(r"^\W+|\W+$", "", word)
    return word if len(word) <= MAX_LETTERS else word[: MAX_LETTERS - 1] + "…"
