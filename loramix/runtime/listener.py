"""Who hears what becomes of answers that run side by side, and what a client may see of an error."""

from __future__ import annotations

import logging
from typing import Protocol

from loramix.errors import LoramixError, NativeError
from loramix.runtime.stream import Stream

_log = logging.getLogger(__name__)


class AnswerListener(Protocol):
    """Who hears what becomes of the answers."""

    def started(self, number: int, stream: Stream) -> None:
        """The route is known."""

    def said(self, number: int, stream: Stream, text: str) -> None:
        """A piece of text."""

    def ended(self, number: int, stream: Stream) -> None:
        """The answer is whole."""

    def failed(self, number: int, error: LoramixError) -> None:
        """It will not be."""


def as_loramix_error(error: Exception) -> LoramixError:
    """The error as a client may see it; what nobody foresaw is logged whole."""
    if isinstance(error, LoramixError):
        return error
    _log.error("an answer failed", exc_info=error)
    return NativeError(f"the answer failed ({type(error).__name__}); the server's log says more.")
