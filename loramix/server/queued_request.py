"""A request in the queue or at the worker, and the limits that apply to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import NamedTuple

from loramix.defaults import ANSWER_S, FIRST_TOKEN_S, QUEUE, QUEUE_S
from loramix.errors import RequestFailed
from loramix.models.mixing import Mix
from loramix.server import protocol as m


class Limits(NamedTuple):
    """Limits of the queue; times in seconds."""

    queue: int = QUEUE
    """Largest number of waiting requests, not counting those at the worker."""
    queue_s: float = QUEUE_S
    first_token_s: float = FIRST_TOKEN_S
    total_s: float = ANSWER_S


@dataclass(eq=False)
class QueuedRequest:
    """A request and its replies; created by `Supervisor.submit`."""

    request: m.Request
    replies: asyncio.Queue[m.Reply] = field(default_factory=asyncio.Queue)
    arrived: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    """Seconds spent in the queue."""
    overtaken: int = 0
    """Number of later requests that were started first."""
    done: bool = False
    timers: list[asyncio.TimerHandle] = field(default_factory=list)

    @property
    def number(self) -> int:
        """Number of the request."""
        return self.request.number

    @property
    def mix(self) -> Mix | None:
        """The mix, if the client named one."""
        return self.request.options.mix if isinstance(self.request, m.Answer) else None

    async def events(self) -> AsyncIterator[m.Started | m.Piece | m.Ended | m.Result]:
        """Iterate over the replies up to the last one.

        Raises:
            RequestFailed: the request failed, possibly after some replies.
        """
        while True:
            reply = await self.replies.get()
            if isinstance(reply, m.Failed):
                raise RequestFailed(reply.message, reply.status)
            if isinstance(reply, m.Ready):
                continue
            yield reply
            if isinstance(reply, m.Ended | m.Result):
                return


def failed(job: QueuedRequest, message: str, status: int) -> m.Failed:
    """Build the last reply to a request that failed."""
    return m.Failed(number=job.number, message=message, status=status)
