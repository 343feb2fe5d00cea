"""What is kept of a context: the state at a prompt's end, and tokens with their KV copied out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class PromptEnd(NamedTuple):
    """Cached logits and hidden states at a prompt's end, so that the same prompt is not decoded again."""

    length: int
    """Of the prompt."""
    logits: npt.NDArray[np.float32]
    states: dict[int, npt.NDArray[np.float32]]
    """Its last token's, by tapped layer."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self.logits.nbytes + sum(row.nbytes for row in self.states.values())


@dataclass(frozen=True)
class Saved:
    """A context's tokens with their KV, copied out; fits any context of the same model, mix and taps."""

    tokens: tuple[int, ...]
    kv: npt.NDArray[np.uint8] = field(repr=False)
    states: dict[int, npt.NDArray[np.float32]] = field(repr=False)
    whole: int
    """See `Context.whole`."""
    behind: PromptEnd | None = field(repr=False, default=None)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        behind = self.behind.nbytes if self.behind else 0
        return self.kv.nbytes + behind + sum(rows.nbytes for rows in self.states.values())
