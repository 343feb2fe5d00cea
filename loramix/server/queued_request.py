"""A request to the server on its way through the queue and the worker, and the bounds that it has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import NamedTuple

from loramix.errors import RequestFailed
from loramix.models.mixing import Mix
from loramix.server import protocol as m


class Limits(NamedTuple):
    """How much waits, and how long, in seconds."""

    queue: int = 16
    """Requests that wait, beside those that the worker has."""
    queue_s: float = 60.0
    first_token_s: float = 60.0
    total_s: float = 300.0


@dataclass(eq=False)
class QueuedRequest:
    """A request on its way; made by `Supervisor.submit`."""

    request: m.Request
    replies: asyncio.Queue[m.Reply] = field(default_factory=asyncio.Queue)
    came: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    """Seconds in the queue."""
    overtaken: int = 0
    done: bool = False
    timers: list[asyncio.TimerHandle] = field(default_factory=list)

    @property
    def number(self) -> int:
        """The request's."""
        return self.request.number

    @property
    def mix(self) -> Mix | None:
        """The mix, where the client named it."""
        return self.request.options.mix if isinstance(self.request, m.Answer) else None

    async def events(self) -> AsyncIterator[m.Started | m.Said | m.Ended | m.Result]:
        """Replies up to the last one.

        Raises:
            RequestFailed: it was not answered, or not to the end.
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
    """The last reply to a request that will not be answered."""
    return m.Failed(number=job.number, message=message, status=status)
