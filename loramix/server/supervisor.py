"""The server's side of the worker process: a bounded queue, deadlines, and a restart when the worker dies.

When a worker dies, its active requests fail and the waiting ones go to the next worker. Runs in one event loop and
is independent of HTTP.
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
"""Seconds within which a worker must confirm a cancellation before it is killed."""
MAX_OVERTAKEN = 8
"""How often a request may be overtaken by later ones whose mix is being decoded."""


class Supervisor:
    """Keeps one worker running and dispatches requests to it.

    Args:
        settings: settings of the worker.
        limits: limits of the queue.
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
        self._failures = 0  # consecutive workers that ended before they were ready
        self._opened: asyncio.Future[m.Ready] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether the worker accepts requests."""
        return self._ready

    @property
    def pid(self) -> int | None:
        """Process ID of the worker, if it was started."""
        return self._process.pid if self._process else None

    async def start(self) -> m.Ready:
        """Start the first worker.

        Raises:
            LoramixError: the worker cannot open the pack.
        """
        self._opened = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run_workers())
        return await self._opened

    def submit(self, requests: Sequence[m.Request]) -> list[QueuedRequest]:
        """Queue requests, all or none.

        Args:
            requests: requests; their numbers are assigned here.

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

    def cancel(self, job: QueuedRequest) -> None:
        """Cancel a request; does nothing if it has ended."""
        if not job.done:
            self._settle(job, m.Failed(number=job.number, message="the request was cancelled.", status=499))
            self._withdraw(job)

    def drain(self) -> None:
        """Accept no new requests; fail the waiting ones, let the active ones finish."""
        self._closing.set()
        for job in self.waiting:
            self._settle(job, failed(job, "the server is shutting down.", 503))
        self.waiting.clear()

    def abort(self, *, kill: bool = False) -> None:
        """Fail all active requests.

        Args:
            kill: also kill the worker.
        """
        for job in list(self.active.values()):
            self._settle(job, failed(job, "the server is shutting down.", 503))
        if kill:
            self._kill()

    async def close(self) -> None:
        """End the worker; may be called more than once."""
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

    async def _run_workers(self) -> None:
        """Run workers, one after another, until the supervisor closes."""
        while not self._closing.is_set():
            code = await self._run_worker()
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

    async def _run_worker(self) -> int:
        """Run one worker until it ends; return its exit code."""
        command = ["-m", "loramix.server.worker", msgspec.json.encode(self.settings).decode()]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={
                **_environment(),
                "GGML_NO_BACKTRACE": "1",
            },  # ggml's backtrace through a debugger takes seconds
        )
        self._process = process
        assert process.stdout is not None
        try:
            while True:
                head = await process.stdout.readexactly(m.LENGTH.size)
                self._handle_reply(m.read_reply(await process.stdout.readexactly(*m.LENGTH.unpack(head))))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the worker has ended
        finally:
            self._ready = False
            code = await process.wait()
            lost = f"the worker ended ({_cause(code)}) while it had this request; another one starts."
            for job in list(self.active.values()):
                self._settle(job, failed(job, lost, 503))
            self.active.clear()
        return code

    def _handle_reply(self, reply: m.Reply) -> None:
        """Handle a reply of the worker."""
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
            if isinstance(reply, m.Piece) and len(job.timers) > 1:
                job.timers.pop().cancel()  # the first token is here
            job.replies.put_nowait(reply)

    def _dispatch(self) -> None:
        """Send waiting requests to the worker while it has room."""
        while self._ready and self.waiting and len(self.active) < self.settings.parallel:
            job = self._next()
            job.waited = time.perf_counter() - job.arrived
            for timer in job.timers:
                timer.cancel()
            loop, limits = asyncio.get_running_loop(), self.limits
            job.timers = [
                loop.call_later(limits.total_s, self._expire, job, "in all", limits.total_s),
                loop.call_later(limits.first_token_s, self._expire, job, "for a token", limits.first_token_s),
            ]
            self.active[job.number] = job
            self._send(job.request)

    def _next(self) -> QueuedRequest:
        """Take the oldest request, or a later one whose mix is being decoded, within `MAX_OVERTAKEN`."""
        oldest = self.waiting[0]
        mixes = [job.mix for job in self.active.values() if job.mix is not None]
        if mixes and oldest.mix not in mixes and oldest.overtaken < MAX_OVERTAKEN:
            for i, job in enumerate(self.waiting):
                if job.mix in mixes:
                    for passed in self.waiting[:i]:
                        passed.overtaken += 1
                    return self.waiting.pop(i)
        return self.waiting.pop(0)

    def _expire(self, job: QueuedRequest, where: str, seconds: float) -> None:
        if not job.done:
            self._settle(job, failed(job, f"the request took more than {seconds:g} s {where}.", 504))
            self._withdraw(job)

    def _withdraw(self, job: QueuedRequest) -> None:
        """Remove a request from the queue or the worker; a worker that does not respond is killed."""
        if job in self.waiting:
            self.waiting.remove(job)
        elif job.number in self.active:
            self._send(m.Cancel(number=job.number))
            asyncio.get_running_loop().call_later(HUNG_S, self._kill_if_hung, job)

    def _send(self, request: m.Request) -> None:
        """Send a request to the worker; if it has died, the reader of its replies notices."""
        assert self._process is not None and self._process.stdin is not None
        with suppress(OSError, RuntimeError):  # closed pipes raise RuntimeError with uvloop
            self._process.stdin.write(m.frame(request))

    def _kill_if_hung(self, job: QueuedRequest) -> None:
        if self.active.get(job.number) is job:
            _log.error("the worker does not respond; killing it")
            self._kill()

    def _kill(self) -> None:
        if self._process and self._process.returncode is None:
            self._process.kill()

    def _settle(self, job: QueuedRequest, reply: m.Ended | m.Result | m.Failed) -> None:
        """Deliver the last reply to a request."""
        if job.done:
            return
        job.done = True
        for timer in job.timers:
            timer.cancel()
        job.replies.put_nowait(reply)


def _cause(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _environment() -> dict[str, str]:
    """Return the environment for the worker, without the API key."""
    return {name: value for name, value in os.environ.items() if name != "LORAMIX_API_KEY"}
