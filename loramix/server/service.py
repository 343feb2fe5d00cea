"""Logic shared by all endpoints: model names, requests to the worker, streamed and collected answers."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import Request
from pydantic import ConfigDict, Field

from loramix.defaults import BASE, DEFAULT_POLICY, POLICIES, Policy
from loramix.errors import NotFound, RequestFailed, UsageError
from loramix.models.mixing import MAX_ACTIVE, MAX_SCALE, Mix
from loramix.pack.pack import Pack
from loramix.paths import safe_join
from loramix.runtime.options import GenerationOptions
from loramix.runtime.steps import answer_fields
from loramix.server import protocol as m
from loramix.server.base_details import BaseDetails
from loramix.server.fields import Body, must_be
from loramix.server.metrics import Metrics
from loramix.server.queued_request import QueuedRequest
from loramix.server.supervisor import Supervisor

T = TypeVar("T")
Event = m.Started | m.Piece | m.Ended | m.Result
Events = AsyncIterator[Event]
Name = Annotated[str, Field(max_length=200)]
Scale = Annotated[
    float, must_be(f"a number from 0 to {MAX_SCALE:g}", ge=0, le=MAX_SCALE, allow_inf_nan=False, strict=True)
]


PolicyName = Annotated[Policy, must_be(" or ".join(f'"{name}"' for name in POLICIES))]


class Options(Body):
    """Routing options; see `LoramixField`."""

    model_config = ConfigDict(extra="forbid")
    policy: PolicyName | None = None
    mix: (
        Annotated[
            dict[Name, Scale],
            must_be(
                f"an object of at most {MAX_ACTIVE} skills with their scales, 0 to {MAX_SCALE:g}",
                max_length=MAX_ACTIVE,
            ),
        ]
        | None
    ) = None
    """Fixed mix ``{skill: scale}`` instead of the gate's choice."""
    labels: Annotated[bool, must_be("true or false")] | None = None
    """Whether a skill that classifies answers with one of its labels only; by default it does."""


LoramixField = Annotated[Options | None, must_be("an object with policy, mix or labels")]
"""The field ``loramix`` of a body."""


@dataclass
class CollectedAnswer:
    """An answer accumulated from its events."""

    text: str = ""
    scores: list[tuple[bytes, float, list[tuple[bytes, float]]]] = field(default_factory=list)
    started: m.Started | None = None
    ended: m.Ended | None = None

    def add(self, event: Event) -> None:
        """Add the next event."""
        if isinstance(event, m.Started):
            self.started = event
        elif isinstance(event, m.Piece):
            self.text += event.text
            self.scores += event.scores
        elif isinstance(event, m.Ended):
            self.ended = event


def models_of(pack: Pack) -> list[str]:
    """Return the model names that clients can use: the pack, each of its skills, the bare base."""
    return [pack.name, *(f"{pack.name}:{skill.name}" for skill in pack.skills), f"{pack.name}:base"]


class Service:
    """A served pack.

    Args:
        pack: the pack; only its manifest is used, since the worker opens it again.
        supervisor: supervisor of the worker.
    """

    def __init__(self, pack: Pack, supervisor: Supervisor) -> None:
        self.pack, self.supervisor = pack, supervisor
        self.metrics = Metrics(supervisor)
        self.started = int(time.time())
        self.n_ctx = supervisor.settings.n_ctx
        self.base = BaseDetails.of(pack.manifest.base.name)
        self.others: list[str] = []
        """Models of other packs that are served at the same address."""

    @property
    def models(self) -> list[str]:
        """Model names of the pack; see `models_of`."""
        return models_of(self.pack)

    def target(self, model: str, options: Options | None = None) -> tuple[str, dict[str, float] | None]:
        """Resolve a model name and the field ``loramix`` to a policy and a mix.

        Returns:
            The policy, and the fixed mix or None for the gate's choice.

        Raises:
            NotFound: there is no such model.
            UsageError: the model and the field both name a mix.
        """
        pack, _, part = model.partition(":")
        skills = {skill.name for skill in self.pack.skills}
        known = pack == self.pack.name and (part in skills or part in ("", BASE, "latest"))
        if not known:
            raise NotFound(
                f"no model {model[:80]!r} here; there are: {', '.join([*self.models, *self.others])}."
            )
        named = {part: 1.0} if part in skills else {} if part == BASE else None
        options = options or Options()
        if named is not None and (options.mix is not None or options.policy is not None):
            raise UsageError(f"model {model!r} names what answers; give 'loramix' with model {pack!r} only.")
        mix = named if named is not None else options.mix
        if mix is not None:
            for skill in Mix.of(mix).scales:
                self.pack.skill(skill)
        return options.policy or DEFAULT_POLICY, mix

    def options(self, model: str, chosen: Options | None, **values: Any) -> GenerationOptions:
        """Build the generation options of a request.

        Args:
            model: name of the model.
            chosen: field ``loramix`` of the body.
            **values: arguments of `GenerationOptions.of`.

        Raises:
            NotFound, UsageError: see `target`; or a value is out of range.
        """
        policy, mix = self.target(model, chosen)
        labels = chosen is None or chosen.labels is not False
        return GenerationOptions.of(policy=policy, mix=mix, labels=labels, **values)

    def submit(self, requests: Sequence[m.Request]) -> list[QueuedRequest]:
        """Queue requests, all or none; see `Supervisor.submit`."""
        return self.supervisor.submit(requests)

    async def events(self, job: QueuedRequest) -> Events:
        """Iterate over a job's events and count them; closing the iterator cancels the job."""
        try:
            async for event in job.events():
                if isinstance(event, m.Started):
                    self.metrics.routed(event.route)
                elif isinstance(event, m.Ended):
                    self.metrics.answered(event.usage, {**event.timings, "queue": job.waited})
                yield event
        finally:
            self.supervisor.cancel(job)

    async def begin(self, job: QueuedRequest) -> Events:
        """Wait for a job's first event, so that a failure raises before the response starts; return all events."""
        events = self.events(job)
        first = await anext(events)

        async def all_of_them() -> Events:
            yield first
            async for event in events:
                yield event

        return all_of_them()

    async def collect(self, job: QueuedRequest) -> CollectedAnswer:
        """Wait for a job's complete answer."""
        answer = CollectedAnswer()
        async for event in self.events(job):
            answer.add(event)
        return answer

    async def result(self, request: m.Request) -> m.Result:
        """Submit a request other than an answer, and wait for its result."""
        (job,) = self.submit([request])
        async for event in self.events(job):
            if isinstance(event, m.Result):
                return event
        raise RequestFailed("the worker returned no result.", 500)

    def card(self, skill: str) -> str:
        """Return a skill's card in Markdown, or its description if it has no card."""
        entry = self.pack.skill(skill)
        if entry.card is None:
            return entry.description
        return safe_join(self.pack.directory, entry.card).read_text(encoding="utf-8", errors="replace")

    async def reload(self) -> bool:
        """Reload the pack from disk; return whether anything changed."""
        result = await self.result(m.Reload(number=0))
        self.pack = Pack.load(self.pack.directory)
        return bool(result.value)


def report(answer: CollectedAnswer, waited: float) -> dict[str, Any]:
    """Build the field ``loramix`` of a response: the route, the answer's parts and labels, seconds by phase."""
    route = answer.started.route if answer.started else {}
    timings = {"queue": waited, **(answer.ended.timings if answer.ended else {})}
    extra: dict[str, Any] = {"mixes": answer.ended.mixes} if answer.ended and answer.ended.mixes else {}
    extra |= answer_fields(answer.ended.parts, answer.ended.step_labels) if answer.ended else {}
    return {**route, **extra, "timings": {name: round(seconds, 6) for name, seconds in timings.items()}}


def truncate_vectors(rows: list[list[float]], dimensions: int | None) -> list[list[float]]:
    """Truncate vectors to their first dimensions and normalize them again.

    Args:
        rows: one vector per text.
        dimensions: number of dimensions to keep; None keeps all.

    Raises:
        UsageError: `dimensions` exceeds the vectors' length.
    """
    if dimensions is None:
        return rows
    if dimensions > len(rows[0]):
        raise UsageError(f"dimensions is {dimensions}; it must be a whole number from 1 to {len(rows[0])}.")
    cut = [row[:dimensions] for row in rows]
    return [[x / max(math.hypot(*row), 1e-12) for x in row] for row in cut]


async def until_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Await work for a client; cancel it if the client disconnects.

    Raises:
        RequestFailed: the client disconnected.
    """
    task: asyncio.Future[T] = asyncio.ensure_future(work)
    left: asyncio.Future[Any] = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([task, left], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestFailed("the client disconnected.", 499)
        return task.result()
    finally:
        left.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait([task])


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def cancel_on_exit(service: Service, jobs: Sequence[QueuedRequest]) -> AsyncIterator[None]:
    """Cancel the jobs on exit; jobs that have ended are not affected."""
    try:
        yield
    finally:
        for job in jobs:
            service.supervisor.cancel(job)
