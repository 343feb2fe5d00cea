"""The worker's end of the pipe to the server; pieces of an answer are sent at a bounded rate."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from loramix.errors import LoramixError
from loramix.runtime.stream import Stream
from loramix.server import protocol as m

PACE_S = 0.02
"""Least time in seconds between two pieces of an answer; each one wakes server and client on the decoding cores."""


@dataclass
class _AnswerState:
    """State of one answer: what was sent, and what is still to be sent."""

    buffered: bool = False
    """Send everything after the first piece at the end."""
    sent_at: float | None = None
    """Time of the last piece."""
    n_scores: int = 0
    """Number of scores sent so far."""
    text: str = ""
    """Text that is still to be sent."""
    stream: Stream | None = None
    """Source of the scores; None if nothing is to be sent."""
    scored: int = 0
    """Number of scores that belong to the sent and the pending text."""

    def is_due(self, pace_s: float) -> bool:
        return not self.buffered and self.sent_at is not None and time.monotonic() - self.sent_at >= pace_s


class Pipe:
    """An `AnswerListener` that writes to the server; pieces that come faster than `PACE_S` are merged.

    Args:
        descriptor: file descriptor to write to.
        pace_s: least time in seconds between two pieces of an answer.
    """

    def __init__(self, descriptor: int, pace_s: float = PACE_S) -> None:
        self._descriptor, self._pace_s = descriptor, pace_s
        self._answers: defaultdict[int, _AnswerState] = defaultdict(_AnswerState)

    def send(self, reply: m.Reply) -> None:
        """Write a reply."""
        m.write_all(self._descriptor, m.frame(reply))

    def buffer_until_end(self, number: int) -> None:
        """Send only the first piece of this answer at once, and the rest when it ends."""
        self._answers[number].buffered = True

    def started(self, number: int, stream: Stream) -> None:
        """See `AnswerListener`."""
        self.send(m.Started(number=number, route=stream.route.to_json(), timings=stream.route.timings))

    def text_added(self, number: int, stream: Stream, text: str) -> None:
        """See `AnswerListener`; the first piece is sent at once."""
        state = self._answers[number]
        state.text, state.stream, state.scored = state.text + text, stream, len(stream.scores)
        # pieces of different skills are not merged: the page colours by piece
        separate = stream.route.then and not state.buffered
        if state.sent_at is None or separate or state.is_due(self._pace_s):
            self._send_piece(number)

    def flush(self) -> None:
        """Send the pending pieces that are due."""
        for number, state in self._answers.items():
            if state.is_due(self._pace_s):
                self._send_piece(number)

    def _send_piece(self, number: int) -> None:
        state = self._answers[number]
        if state.stream is None:
            return
        scores = state.stream.scored(state.n_scores, state.scored)
        text, state.text, state.stream, state.n_scores = state.text, "", None, state.scored
        state.sent_at = time.monotonic()
        self.send(m.Piece(number=number, text=text, scores=scores))

    def ended(self, number: int, stream: Stream, contributions: dict[str, Any] | None = None) -> None:
        """See `AnswerListener`; with the measured contributions, if requested."""
        answer = stream.answer
        assert answer is not None
        self._send_piece(number)
        state = self._answers[number]
        if len(stream.scores) > state.n_scores:  # scores of tokens that produced no text
            state.stream, state.scored = stream, len(stream.scores)
            self._send_piece(number)
        self._answers.pop(number)
        mixes = [mix.to_json() for mix in answer.mixes] if len(set(answer.mixes)) > 1 else []
        self.send(
            m.Ended(
                number=number,
                finish_reason=answer.finish_reason,
                usage=answer.usage,
                timings=answer.timings,
                mixes=mixes,
                step_labels=answer.step_labels,
                parts=answer.parts,
                contributions=contributions,
            )
        )

    def failed(self, number: int, error: LoramixError) -> None:
        """See `AnswerListener`."""
        self._send_piece(number)
        self._answers.pop(number)
        self.send(m.Failed(number=number, message=str(error), status=error.http_status))
