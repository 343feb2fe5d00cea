"""The scheduler's records: an answer whose prompt waits to be routed, and one that is being generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from loramix.runtime.decoder import DecodeRequest
from loramix.runtime.llama.context import Context
from loramix.runtime.stream import Stream


@dataclass(eq=False)
class ScheduledAnswer:
    """An answer under way, and where its KV is."""

    number: int
    stream: Stream
    wanted: DecodeRequest
    sequence: int | None = None
    """Where its KV is in the batch context."""
    held: bool = False
    """Whether its KV is in the engine's own context."""
    read: int = 0
    """Tokens of its prompt that were read ahead of the last piece."""

    @property
    def waits(self) -> bool:
        """Whether its tokens must be read before it can go on."""
        return self.sequence is None and not self.held


class PendingAnswer(NamedTuple):
    """An answer whose prompt is not routed yet."""

    open_stream: Callable[[], Stream]
    wanted: DecodeRequest | None
    """What routing reads."""

    @property
    def is_long(self) -> bool:
        """Whether it takes more than one piece."""
        return self.wanted is not None and len(self.wanted.tokens) > Context.N_BATCH
