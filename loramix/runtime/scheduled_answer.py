"""The scheduler's records: an answer waiting to be routed, and an answer being generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from loramix.runtime.decoder import DecodeRequest
from loramix.runtime.llama.context import Context
from loramix.runtime.stream import Stream


@dataclass(eq=False)
class ScheduledAnswer:
    """A running answer and the location of its KV."""

    number: int
    stream: Stream
    request: DecodeRequest
    sequence: int | None = None
    """Its sequence in the batch context, if its KV is there."""
    in_context: bool = False
    """Whether its KV is in the engine's own context."""
    prefilled: int = 0
    """Tokens of its prompt that were prefilled before the last chunk."""

    @property
    def needs_prefill(self) -> bool:
        """Whether its tokens must be prefilled before it can continue."""
        return self.sequence is None and not self.in_context

    @property
    def is_between_branches(self) -> bool:
        """Whether it has decoded a branch of its labels and needs another, for which its context must be kept."""
        return self.stream.choosing_label and len(self.request.tokens) > self.request.n_prompt


class PendingAnswer(NamedTuple):
    """An answer whose prompt has not been routed yet."""

    open_stream: Callable[[], Stream]
    request: DecodeRequest | None
    """The prefill that routing needs; None if it needs none."""

    @property
    def is_long(self) -> bool:
        """Whether the prefill takes more than one chunk."""
        return self.request is not None and len(self.request.tokens) > Context.N_BATCH
