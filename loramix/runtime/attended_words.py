"""The words of a prompt that the gate looked at: its attention over tokens, summed over words of the messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from loramix.runtime.token_places import runs_of

MAX_WORDS = 5
MAX_LETTERS = 32
_WORD = re.compile(rb"\S+")

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
    totals: dict[str, float] = {}
    for run in runs_of(tokens, first, contents, piece):
        text = b"".join(run.pieces)
        weights = _per_byte(attention[run.tokens], run.pieces)
        for part in run.parts:
            for found in _WORD.finditer(text, part.start, part.end):
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


def _shown(raw: bytes) -> str:
    """A word without punctuation around it and without control characters."""
    word = "".join(filter(str.isprintable, raw.decode("utf-8", "ignore")))
    word = re.sub(r"^\W+|\W+$", "", word)
    return word if len(word) <= MAX_LETTERS else word[: MAX_LETTERS - 1] + "…"
