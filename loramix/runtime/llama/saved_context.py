"""Copies of a context's contents: the state at a prompt's end, and tokens with their KV."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class PromptEnd(NamedTuple):
    """Cached logits and hidden states at a prompt's end, so that the same prompt is not decoded again."""

    length: int
    """Number of prompt tokens."""
    logits: npt.NDArray[np.float32]
    states: dict[int, npt.NDArray[np.float32]]
    """Hidden state (D,) of the last token by tapped layer."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self.logits.nbytes + sum(row.nbytes for row in self.states.values())


@dataclass(frozen=True)
class SavedContext:
    """A copy of a context's tokens and KV, for any context of the same model, mix and taps."""

    tokens: tuple[int, ...]
    kv: npt.NDArray[np.uint8] = field(repr=False)
    states: dict[int, npt.NDArray[np.float32]] = field(repr=False)
    prompt_length: int
    """See `Context.prompt_length`."""
    prompt_end: PromptEnd | None = field(repr=False, default=None)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        prompt_end = self.prompt_end.nbytes if self.prompt_end else 0
        return self.kv.nbytes + prompt_end + sum(rows.nbytes for rows in self.states.values())
