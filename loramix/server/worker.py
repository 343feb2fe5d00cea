"""``python -m loramix.server.worker SETTINGS``: the engine in a process of its own, requests in, replies out.

llama.cpp ends the process on what it does not like, and nothing in the process can catch that: so the server
keeps it in this one, and `loramix.server.supervisor` starts another.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from loramix.errors import LoramixError, RequestFailed
from loramix.runtime.engine import Engine
from loramix.runtime.listener import named
from loramix.runtime.llama.interrupt import Interrupt
from loramix.runtime.scheduler import Scheduler
from loramix.runtime.stream import Stream
from loramix.server import protocol as m
from loramix.server.explaining import Explainer

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
        """See `Listener`."""
        self.send(m.Started(number=number, route=stream.route.to_json(), timings=stream.route.timings))

    def said(self, number: int, stream: Stream, text: str) -> None:
        """See `Listener`; the first piece goes at once."""
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
        """See `Listener`; with what was measured, where that was asked for."""
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
        """See `Listener`."""
        self._say(number)
        self._answers.pop(number)
        self.send(m.Failed(number=number, message=str(error), status=error.http_status))


class Worker:
    """Carries out requests, one message at a time, answers side by side.

    Args:
        engine: the pack, open.
        pipe: to the server.
        settings: how many answers at once.
    """

    def __init__(self, engine: Engine, pipe: Pipe, settings: m.Settings) -> None:
        self._engine, self._pipe = engine, pipe
        self._explainer = Explainer(engine, pipe)
        self._scheduler = Scheduler(
            engine, self._explainer, parallel=settings.parallel, n_cells=settings.n_cells
        )

    def run(self, inbox: queue.SimpleQueue[m.Request | None]) -> None:
        """Work until None comes."""
        while True:
            if not (len(self._scheduler) or len(self._explainer)) or not inbox.empty():
                request = inbox.get()
                if request is None:
                    return
                self._handle(request)  # one only: others want their tokens
            self._scheduler.step()
            self._explainer.step()
            self._pipe.flush()

    def _handle(self, request: m.Request) -> None:
        if isinstance(request, m.Answer):
            if request.whole:
                self._pipe.expect_whole(request.number)
            if request.explain:
                self._explainer.expect(request.number, request.messages)
            came = time.perf_counter()
            self._scheduler.add(
                request.number,
                lambda: self._open(request, came),
                lambda: self._engine.before_routing(request.messages, policy=request.policy, mix=request.mix),
            )
        elif isinstance(request, m.Cancel):
            self._scheduler.cancel(request.number)
            self._explainer.cancel(request.number)
            self._pipe.failed(request.number, RequestFailed("the request was cancelled.", 499))
        else:
            try:
                self._pipe.send(self._result(request))
            except Exception as error:
                self._pipe.failed(request.number, named(error))

    def _open(self, request: m.Answer, came: float) -> Stream:
        sampling: dict[str, Any] = dict(request.sampling)
        return self._engine.stream(
            request.messages,
            policy=request.policy,
            mix=request.mix,
            max_tokens=request.max_tokens,
            stop=request.stop,
            json_schema=request.json_schema,
            top_logprobs=request.top_logprobs,
            began=came,
            **sampling,
        )

    def _result(self, request: m.Route | m.Embed | m.Reload) -> m.Result:
        if isinstance(request, m.Route):
            route = self._engine.route(request.messages, policy=request.policy)
            return m.Result(number=request.number, value={**route.to_json(), "timings": route.timings})
        if isinstance(request, m.Embed):
            vectors, tokens = self._engine.embed(request.texts, truncate=request.truncate)
            return m.Result(number=request.number, value=[row.tolist() for row in vectors], tokens=tokens)
        self._explainer.restart()
        return m.Result(number=request.number, value=self._scheduler.reload())


def _listen(inbox: queue.SimpleQueue[m.Request | None], interrupt: Interrupt) -> None:
    """Hand requests on; where the server has gone nobody is left to answer."""
    with os.fdopen(0, "rb", closefd=False) as file:
        while (request := m.read_request(file)) is not None:
            if isinstance(request, m.Cancel):
                interrupt.stop(request.number)  # now: its prompt may be read for a while yet
            inbox.put(request)
    inbox.put(None)
    threading.Event().wait(5)
    os._exit(0)  # the engine is deep in a prompt that nobody wants


def main(arguments: Sequence[str]) -> int:
    """Open the engine and serve stdin until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    logging.basicConfig(level=logging.INFO, format="%(levelname)s worker: %(message)s")
    settings = msgspec.json.decode(arguments[0], type=m.Settings)
    pipe = Pipe(os.dup(1))
    os.dup2(2, 1)  # whatever a library prints must not meet our messages
    try:
        engine = Engine.open(
            settings.pack,
            n_ctx=settings.n_ctx,
            n_threads=settings.n_threads,
            contexts=settings.contexts,
        )
    except LoramixError as error:
        pipe.failed(0, error)
        return error.exit_code
    with engine:
        inbox: queue.SimpleQueue[m.Request | None] = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(inbox, engine.model.interrupt), daemon=True).start()
        pipe.send(m.Ready(number=0, n_ctx=engine.n_ctx, n_ctx_train=engine.model.n_ctx_train))
        Worker(engine, pipe, settings).run(inbox)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
