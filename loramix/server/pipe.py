"""The worker's end of the pipe to the server: replies out, pieces of an answer sent at a bounded pace."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from loramix.errors import LoramixError
from loramix.runtime.stream import Stream
from loramix.server import protocol as m

PACE_S = 0.02
"""Least time between two pieces of one answer: each wakes server and client on cores that decode."""


@dataclass
class _Said:
    """What the server knows of an answer, and what waits to be sent."""

    whole: bool = False
    """Nobody wants it before it ends."""
    at: float | None = None
    """When its last piece was sent."""
    n_scores: int = 0
    """Scores that were sent."""
    text: str = ""
    stream: Stream | None = None
    """None where nothing waits."""
    scored: int = 0
    """Scores that belong to what was sent and to what waits."""

    def is_due(self, pace_s: float) -> bool:
        return not self.whole and self.at is not None and time.monotonic() - self.at >= pace_s


class Pipe:
    """Says to the server what becomes of the answers; pieces that come faster than `PACE_S` go together.

    Args:
        descriptor: the pipe's end to write to.
        pace_s: see `PACE_S`.
    """

    def __init__(self, descriptor: int, pace_s: float = PACE_S) -> None:
        self._descriptor, self._pace_s = descriptor, pace_s
        self._answers: defaultdict[int, _Said] = defaultdict(_Said)

    def send(self, reply: m.Reply) -> None:
        """Write a reply."""
        m.write_all(self._descriptor, m.frame(reply))

    def expect_whole(self, number: int) -> None:
        """After its first piece nobody wants that answer before it ends."""
        self._answers[number].whole = True

    def started(self, number: int, stream: Stream) -> None:
        """See `AnswerListener`."""
        self.send(m.Started(number=number, route=stream.route.to_json(), timings=stream.route.timings))

    def text_added(self, number: int, stream: Stream, text: str) -> None:
        """See `AnswerListener`; the first piece goes at once."""
        said = self._answers[number]
        said.text, said.stream, said.scored = said.text + text, stream, len(stream.scores)
        # the next skill's first piece stays apart from the last one's: the page tints by piece
        apart = stream.route.then and not said.whole
        if said.at is None or apart or said.is_due(self._pace_s):
            self._say(number)

    def flush(self) -> None:
        """Send what has waited long enough."""
        for number, said in self._answers.items():
            if said.is_due(self._pace_s):
                self._say(number)

    def _say(self, number: int) -> None:
        said = self._answers[number]
        if said.stream is None:
            return
        scores = said.stream.scored(said.n_scores, said.scored)
        text, said.text, said.stream, said.n_scores = said.text, "", None, said.scored
        said.at = time.monotonic()
        self.send(m.Said(number=number, text=text, scores=scores))

    def ended(self, number: int, stream: Stream, contributions: dict[str, Any] | None = None) -> None:
        """See `AnswerListener`; with what was measured, where that was asked for."""
        answer = stream.answer
        assert answer is not None
        self._say(number)
        said = self._answers[number]
        if len(stream.scores) > said.n_scores:  # of tokens that gave no text of their own
            said.stream, said.scored = stream, len(stream.scores)
            self._say(number)
        self._answers.pop(number)
        mixes = [mix.to_json() for mix in answer.mixes] if len(set(answer.mixes)) > 1 else []
        self.send(
            m.Ended(
                number=number,
                finish_reason=answer.finish_reason,
                usage=answer.usage,
                timings=answer.timings,
                mixes=mixes,
                contributions=contributions,
            )
        )

    def failed(self, number: int, error: LoramixError) -> None:
        """See `AnswerListener`."""
        self._say(number)
        self._answers.pop(number)
        self.send(m.Failed(number=number, message=str(error), status=error.http_status))
