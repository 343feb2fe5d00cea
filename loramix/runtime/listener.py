"""Callbacks for concurrent answers, and the form of an error that a client may see."""

from __future__ import annotations

import logging
from typing import Protocol

from loramix.errors import LoramixError, NativeError
from loramix.runtime.stream import Stream

_log = logging.getLogger(__name__)


class AnswerListener(Protocol):
    """Callbacks for concurrent answers; ``number`` identifies the answer."""

    def started(self, number: int, stream: Stream) -> None:
        """Called when the prompt has been routed."""

    def text_added(self, number: int, stream: Stream, text: str) -> None:
        """Called for each piece of text."""

    def ended(self, number: int, stream: Stream) -> None:
        """Called when the answer is complete."""

    def failed(self, number: int, error: LoramixError) -> None:
        """Called when the answer failed."""


def as_loramix_error(error: Exception) -> LoramixError:
    """Return the error in a form that a client may see; log unexpected errors with their traceback."""
    if isinstance(error, LoramixError):
        return error
    _log.error("an answer failed", exc_info=error)
    return NativeError(f"the answer failed ({type(error).__name__}); the server's log says more.")
