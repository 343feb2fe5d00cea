"""The queue's order, a worker that hangs, one that cannot start."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from loramix.errors import NotFound, RequestFailed
from loramix.runtime.options import GenerationOptions
from loramix.server import protocol as m
from loramix.server.queued_request import Limits, QueuedRequest
from loramix.server.supervisor import MAX_OVERTAKEN, Supervisor


def asked(mix: dict[str, float] | None = None, **options: Any) -> m.Answer:
    message = {"role": "user", "content": "a lazy dog"}
    return m.Answer(number=0, messages=[message], options=GenerationOptions.of(mix=mix, **options))


async def last(job: QueuedRequest) -> m.Started | m.Piece | m.Ended | m.Result:
    found = [event async for event in job.events()]
    return found[-1]


def test_later_requests_of_the_mix_that_decodes_go_first_but_not_for_ever() -> None:
    async def go() -> None:
        queue = Supervisor(m.Settings(pack="none", parallel=2), Limits(queue=50))
        here, there = {"sentiment": 1.0}, {"summarize": 1.0}
        jobs = queue.submit([asked(here), asked(there), asked(), *[asked(here)] * 20])
        queue.waiting.remove(jobs[0])
        queue.active[jobs[0].number] = jobs[0]
        order = [queue._next() for _ in range(MAX_OVERTAKEN + 3)]
        assert order[:MAX_OVERTAKEN] == jobs[3 : 3 + MAX_OVERTAKEN]
        assert order[MAX_OVERTAKEN:] == [jobs[1], jobs[2], jobs[3 + MAX_OVERTAKEN]]
        with pytest.raises(RequestFailed) as full:
            queue.submit([asked()] * 50)
        assert full.value.http_status == 429

    asyncio.run(go())


def test_a_worker_that_hangs_is_killed(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramix.server.supervisor.HUNG_S", 0.3)

    async def go() -> None:
        supervisor = Supervisor(m.Settings(pack=str(tiny_pack), n_ctx=256, n_threads=1), Limits(queue=4))
        await supervisor.start()
        first = supervisor.pid
        assert first is not None
        (job,) = supervisor.submit([asked(max_tokens=200)])
        os.kill(first, signal.SIGSTOP)
        supervisor.cancel(job)
        (other,) = supervisor.submit([asked(max_tokens=2)])
        with pytest.raises(RequestFailed) as left:
            await last(job)
        assert left.value.http_status == 499
        with pytest.raises(RequestFailed, match="SIGKILL"):  # it had been handed this one too
            await last(other)
        (job,) = supervisor.submit([asked(max_tokens=2)])
        assert isinstance(await last(job), m.Ended)
        assert supervisor.restarts == 1 and supervisor.pid != first
        await supervisor.close()
        with pytest.raises(RequestFailed, match="shutting down"):
            supervisor.submit([asked()])

    asyncio.run(go())


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    async def go() -> None:
        supervisor = Supervisor(m.Settings(pack=str(tmp_path / "none")), Limits())
        with pytest.raises(RequestFailed, match="no pack") as none:
            await supervisor.start()
        assert none.value.http_status == NotFound.http_status
        await supervisor.close()

    asyncio.run(go())
