"""Measurement of finished answers, one token at a time, interleaved with the decoding of other answers.

Sits between the scheduler and the pipe; see `loramix.runtime.contributions`.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from loramix.errors import LoramixError
from loramix.runtime.contributions import Contributions, measure_by_token
from loramix.runtime.engine import Engine
from loramix.runtime.listener import as_loramix_error
from loramix.runtime.stream import Stream
from loramix.server.pipe import Pipe


@dataclass(eq=False)
class _Job:
    number: int
    stream: Stream
    steps: Generator[None, None, Contributions] | None = None


class Explainer:
    """An `AnswerListener` that delays the end of some answers until their contributions are measured.

    Args:
        engine: the engine that decodes.
        pipe: receives all events.
    """

    def __init__(self, engine: Engine, pipe: Pipe) -> None:
        self._engine, self._pipe = engine, pipe
        self._pending: set[int] = set()
        self._jobs: list[_Job] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def expect(self, number: int) -> None:
        """Mark a request for measurement; call it before the answer starts."""
        self._pending.add(number)

    def started(self, number: int, stream: Stream) -> None:
        """See `AnswerListener`."""
        self._pipe.started(number, stream)

    def text_added(self, number: int, stream: Stream, text: str) -> None:
        """See `AnswerListener`."""
        self._pipe.text_added(number, stream, text)

    def ended(self, number: int, stream: Stream) -> None:
        """See `AnswerListener`."""
        if number in self._pending:
            self._pending.remove(number)
            self._jobs.append(_Job(number, stream))
        else:
            self._pipe.ended(number, stream)

    def failed(self, number: int, error: LoramixError) -> None:
        """See `AnswerListener`."""
        self._pending.discard(number)
        self._pipe.failed(number, error)

    def step(self) -> None:
        """Measure one token of the oldest pending answer."""
        if not self._jobs:
            return
        job = self._jobs[0]
        try:
            if job.steps is None:
                answer = job.stream.answer
                assert answer is not None
                job.steps = measure_by_token(self._engine, answer)
            next(job.steps)
        except StopIteration as end:
            self._jobs.remove(job)
            found: Contributions = end.value
            self._pipe.ended(job.number, job.stream, found.to_json())
        except Exception as error:
            self._jobs.remove(job)
            self._pipe.failed(job.number, as_loramix_error(error))

    def cancel(self, number: int) -> None:
        """Cancel the measurement of an answer."""
        self._pending.discard(number)
        for job in [job for job in self._jobs if job.number == number]:
            self._stop(job)
            self._jobs.remove(job)

    def restart(self) -> None:
        """Restart all measurements from the beginning and release their adapters, so that these can be freed."""
        for job in self._jobs:
            self._stop(job)

    def _stop(self, job: _Job) -> None:
        if job.steps is not None:
            job.steps.close()
        job.steps = None
