"""The server's side of the worker: a bounded queue, deadlines, and another worker when one dies.

A worker that dies takes the requests that it had with it; each of them gets an error, and those that wait go on
to the next worker. Runs in one event loop; knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from loramix.errors import RequestFailed
from loramix.server import protocol as m
from loramix.server.queued_request import Limits, QueuedRequest, failed

_log = logging.getLogger(__name__)

HUNG_S = 30.0
"""How long a worker may take to say that it has cancelled a request before it is killed."""
OVERTAKEN = 8
"""How often a request may be overtaken by later ones of the mix that decodes now."""


class Supervisor:
    """Keeps one worker alive and hands it requests.

    Args:
        settings: of the worker.
        limits: of the queue.
    """

    def __init__(self, settings: m.Settings, limits: Limits) -> None:
        self.settings, self.limits = settings, limits
        self.restarts = 0
        self.waiting: list[QueuedRequest] = []
        self.active: dict[int, QueuedRequest] = {}
        self._number = 0
        self._process: asyncio.subprocess.Process | None = None
        self._ready = False
        self._closing = asyncio.Event()
        self._failures = 0  # workers in a row that ended before they were ready
        self._opened: asyncio.Future[m.Ready] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether the worker takes requests now."""
        return self._ready

    @property
    def pid(self) -> int | None:
        """The worker's process."""
        return self._process.pid if self._process else None

    async def start(self) -> m.Ready:
        """Start the first worker.

        Raises:
            LoramixError: it cannot open the pack.
        """
        self._opened = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._keep())
        return await self._opened

    def submit(self, requests: Sequence[m.Request]) -> list[QueuedRequest]:
        """Queue requests, all or none.

        Args:
            requests: their numbers are given here.

        Raises:
            RequestFailed: the queue is full (429), or the server is shutting down (503).
        """
        if self._closing.is_set():
            raise RequestFailed("the server is shutting down.", 503)
        room = self.settings.parallel + self.limits.queue - len(self.active) - len(self.waiting)
        if len(requests) > room:
            raise RequestFailed("the server is busy; try again in a moment.", 429)
        loop, jobs = asyncio.get_running_loop(), []
        for request in requests:
            self._number += 1
            job = QueuedRequest(msgspec.structs.replace(request, number=self._number))
            job.timers.append(
                loop.call_later(self.limits.queue_s, self._expire, job, "in the queue", self.limits.queue_s)
            )
            jobs.append(job)
        self.waiting += jobs
        self._dispatch()
        return jobs

    def leave(self, job: QueuedRequest) -> None:
        """Nobody wants the answer any more; for one that has ended this does nothing."""
        if not job.done:
            self._settle(job, m.Failed(number=job.number, message="the request was cancelled.", status=499))
            self._cancel(job)

    def drain(self) -> None:
        """Take nothing new; what waits gets an error, what the worker has goes on."""
        self._closing.set()
        for job in self.waiting:
            self._settle(job, failed(job, "the server is shutting down.", 503))
        self.waiting.clear()

    def abort(self, *, kill: bool = False) -> None:
        """End what the worker still has with an error.

        Args:
            kill: end the worker as well, whatever it does.
        """
        for job in list(self.active.values()):
            self._settle(job, failed(job, "the server is shutting down.", 503))
        if kill:
            self._kill()

    async def close(self) -> None:
        """End the worker; may be called again."""
        self.drain()
        self.abort()
        if self._process and self._process.returncode is None and self._process.stdin:
            self._process.stdin.close()
            try:
                await asyncio.wait_for(self._process.wait(), 3)
            except TimeoutError:
                self._kill()
        if self._task:
            await asyncio.wait([self._task], timeout=3)

    async def _keep(self) -> None:
        """Run one worker after another."""
        while not self._closing.is_set():
            code = await self._run()
            if self._closing.is_set():
                return
            if self._opened and not self._opened.done():
                self._opened.set_exception(
                    RequestFailed(
                        f"the worker ended ({_cause(code)}) at its start; run 'loramix doctor'.", 500
                    )
                )
                return
            self.restarts += 1
            self._failures += 1
            _log.warning("the worker ended (%s); starting another", _cause(code))
            await asyncio.sleep(0 if self._failures < 3 else min(0.25 * 2**self._failures, 10.0))

    async def _run(self) -> int:
        """One worker's life; its exit code."""
        command = ["-m", "loramix.server.worker", msgspec.json.encode(self.settings).decode()]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**_environment(), "GGML_NO_BACKTRACE": "1"},  # a debugger's backtrace takes seconds
        )
        self._process = process
        assert process.stdout is not None
        try:
            while True:
                head = await process.stdout.readexactly(m.LENGTH.size)
                self._take(m.read_reply(await process.stdout.readexactly(*m.LENGTH.unpack(head))))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # it has ended
        finally:
            self._ready = False
            code = await process.wait()
            lost = f"the worker ended ({_cause(code)}) while it had this request; another one starts."
            for job in list(self.active.values()):
                self._settle(job, failed(job, lost, 503))
            self.active.clear()
        return code

    def _take(self, reply: m.Reply) -> None:
        """What the worker says."""
        if isinstance(reply, m.Ready):
            self._ready, self._failures = True, 0
            if self._opened and not self._opened.done():
                self._opened.set_result(reply)
            self._dispatch()
            return
        if reply.number == 0 and isinstance(reply, m.Failed):
            if self._opened and not self._opened.done():
                self._opened.set_exception(RequestFailed(reply.message, reply.status))
                self._closing.set()
            else:
                _log.error("the worker cannot open the pack: %s", reply.message)
            return
        job = self.active.get(reply.number)
        if job is None:
            return
        if isinstance(reply, m.Ended | m.Result | m.Failed):
            del self.active[reply.number]
            self._settle(job, reply)
            self._dispatch()
        elif not job.done:
            if isinstance(reply, m.Said) and len(job.timers) > 1:
                job.timers.pop().cancel()  # the first token is here
            job.replies.put_nowait(reply)

    def _dispatch(self) -> None:
        """Hand the worker what it has room for."""
        while self._ready and self.waiting and len(self.active) < self.settings.parallel:
            job = self._next()
            job.waited = time.perf_counter() - job.came
            for timer in job.timers:
                timer.cancel()
            loop, limits = asyncio.get_running_loop(), self.limits
            job.timers = [
                loop.call_later(limits.total_s, self._expire, job, "in all", limits.total_s),
                loop.call_later(limits.first_token_s, self._expire, job, "for a token", limits.first_token_s),
            ]
            self.active[job.number] = job
            self._write(job.request)

    def _next(self) -> QueuedRequest:
        """The oldest request; or a later one whose mix decodes now, unless that was overtaken often."""
        oldest = self.waiting[0]
        mixes = [job.mix for job in self.active.values() if job.mix is not None]
        if mixes and oldest.mix not in mixes and oldest.overtaken < OVERTAKEN:
            for i, job in enumerate(self.waiting):
                if job.mix in mixes:
                    for passed in self.waiting[:i]:
                        passed.overtaken += 1
                    return self.waiting.pop(i)
        return self.waiting.pop(0)

    def _expire(self, job: QueuedRequest, where: str, seconds: float) -> None:
        if not job.done:
            self._settle(job, failed(job, f"the request took more than {seconds:g} s {where}.", 504))
            self._cancel(job)

    def _cancel(self, job: QueuedRequest) -> None:
        """Take it from the queue, or from the worker, which is killed if it does not listen."""
        if job in self.waiting:
            self.waiting.remove(job)
        elif job.number in self.active:
            self._write(m.Cancel(number=job.number))
            asyncio.get_running_loop().call_later(HUNG_S, self._hung, job)

    def _write(self, request: m.Request) -> None:
        """Say something to the worker; one that has just died is noticed where its replies are read."""
        assert self._process is not None and self._process.stdin is not None
        with suppress(OSError, RuntimeError):  # uvloop's closed pipes raise the latter
            self._process.stdin.write(m.frame(request))

    def _hung(self, job: QueuedRequest) -> None:
        if self.active.get(job.number) is job:
            _log.error("the worker does not answer; killing it")
            self._kill()

    def _kill(self) -> None:
        if self._process and self._process.returncode is None:
            self._process.kill()

    def _settle(self, job: QueuedRequest, reply: m.Ended | m.Result | m.Failed) -> None:
        """The last reply to a request."""
        if job.done:
            return
        job.done = True
        for timer in job.timers:
            timer.cancel()
        job.replies.put_nowait(reply)


def _cause(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _environment() -> dict[str, str]:
    """Ours, without what is the server's alone."""
    return {name: value for name, value in os.environ.items() if name != "LORAMIX_API_KEY"}
