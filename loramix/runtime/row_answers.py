"""Answers rows with an engine: routes a window of prompts, then decodes them grouped by mix, several at once.

The batch of one machine and the workers of a cluster both answer through `answer_rows`, so their texts are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any

from loramix.errors import LoramixError, UsageError
from loramix.formats.tables import Row
from loramix.runtime.engine import Engine
from loramix.runtime.options import GenerationOptions
from loramix.runtime.prepared_prompt import PreparedPrompt
from loramix.runtime.router import Route
from loramix.runtime.scheduler import Scheduler
from loramix.runtime.steps import answer_fields
from loramix.runtime.stream import Stream

WINDOW = 128  # rows that are routed, then answered grouped by mix
Routed = tuple[Route, int, PreparedPrompt]


def answer_rows(
    engine: Engine, rows: Iterator[Row], column: str, parallel: int, options: Mapping[str, Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Answer rows.

    Args:
        engine: generates the answers.
        rows: numbered rows, each with a prompt or an error.
        column: column of the prompt, which is text or OpenAI-style messages.
        parallel: maximum answers decoded at once.
        options: see `Engine.stream`; None is the default.

    Yields:
        Each row's number, in the order in which answers end, with its fields, see `ANSWER_FIELDS`:
        ``error`` alone for a row that could not be answered.

    Raises:
        UsageError: an option is invalid.
    """
    request = GenerationOptions.of(**{name: value for name, value in options.items() if value is not None})
    if request.policy == "token":
        parallel = 1  # the mix changes within an answer, so answers cannot share a batch
    with closing(_BatchRunner(engine, parallel)) as runner:
        while window := list(islice(rows, WINDOW)):
            routed: list[Routed] = []
            for number, row in window:
                try:
                    if isinstance(row, LoramixError):
                        raise row
                    prepared = engine.prepare(row[column])
                    routed.append((engine.route(prepared, request), number, prepared))
                except UsageError:  # caused by the options, not by the row
                    raise
                except LoramixError as error:
                    yield number, {"error": str(error)}
            routed.sort(key=lambda item: (item[0].named, item[1]))
            yield from runner.rows(routed, request)


class _BatchRunner:
    """Runs concurrent answers and collects their fields; an `AnswerListener`."""

    def __init__(self, engine: Engine, parallel: int) -> None:
        self._engine, self._parallel = engine, parallel
        self._scheduler = Scheduler(engine, self, parallel=parallel)
        self._finished: list[tuple[int, dict[str, Any]]] = []

    def rows(
        self, routed: Sequence[Routed], options: GenerationOptions
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the answers of routed prompts in the order in which they end."""
        left = len(routed)
        waiting = iter(routed)
        while left:
            for route, number, prompt in islice(waiting, self._parallel - len(self._scheduler)):
                self._scheduler.add(number, partial(self._engine.stream, prompt, options, route=route))
            self._scheduler.step()
            found, self._finished = self._finished, []
            left -= len(found)
            yield from found

    def close(self) -> None:
        """Close the scheduler."""
        self._scheduler.close()

    def started(self, number: int, stream: Stream) -> None:
        pass

    def text_added(self, number: int, stream: Stream, text: str) -> None:
        pass

    def ended(self, number: int, stream: Stream) -> None:
        answer = stream.answer
        assert answer is not None
        fields = {
            "text": answer.text,
            "mix": answer.route.named,
            "reason": answer.route.reason,
            **({"steps": [step.to_json() for step in answer.route.plan]} if answer.route.plan else {}),
            "finish_reason": answer.finish_reason,
            "usage": answer.usage,
            **answer_fields(answer.parts, answer.step_labels),
        }
        self._finished.append((number, fields))

    def failed(self, number: int, error: LoramixError) -> None:
        if isinstance(error, UsageError):
            raise error
        self._finished.append((number, {"error": str(error)}))
