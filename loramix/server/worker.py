"""``python -m loramix.server.worker SETTINGS``: the engine in a separate process.

llama.cpp aborts the process on some errors, which cannot be caught; `loramix.server.supervisor` starts another one.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Sequence

import msgspec

from loramix.errors import LoramixError, RequestFailed
from loramix.runtime.decoder import DecodeRequest
from loramix.runtime.engine import Engine
from loramix.runtime.listener import as_loramix_error
from loramix.runtime.llama.interrupt import Interrupt
from loramix.runtime.prepared_prompt import PreparedPrompt
from loramix.runtime.scheduler import Scheduler
from loramix.server import protocol as m
from loramix.server.explaining import Explainer
from loramix.server.pipe import Pipe


class Worker:
    """Handles requests one message at a time and decodes several answers concurrently.

    Args:
        engine: engine of the pack.
        pipe: pipe to the server.
        settings: settings of the scheduler.
    """

    def __init__(self, engine: Engine, pipe: Pipe, settings: m.Settings) -> None:
        self._engine, self._pipe = engine, pipe
        self._explainer = Explainer(engine, pipe)
        self._scheduler = Scheduler(
            engine, self._explainer, parallel=settings.parallel, n_cells=settings.n_cells
        )

    def run(self, inbox: queue.SimpleQueue[m.Request | None]) -> None:
        """Handle requests until None is received."""
        while True:
            if not (len(self._scheduler) or len(self._explainer)) or not inbox.empty():
                request = inbox.get()
                if request is None:
                    return
                self._handle(request)  # only one, so that running answers are not delayed
            self._scheduler.step()
            self._explainer.step()
            self._pipe.flush()

    def _handle(self, request: m.Request) -> None:
        if isinstance(request, m.Answer):
            if request.buffered:
                self._pipe.buffer_until_end(request.number)
            if request.explain:
                self._explainer.expect(request.number)
            self._begin(request)
        elif isinstance(request, m.Cancel):
            self._scheduler.cancel(request.number)
            self._explainer.cancel(request.number)
            self._pipe.failed(request.number, RequestFailed("the request was cancelled.", 499))
        else:
            try:
                self._pipe.send(self._result(request))
            except Exception as error:
                self._pipe.failed(request.number, as_loramix_error(error))

    def _begin(self, request: m.Answer) -> None:
        """Add an answer to the scheduler; its prompt is tokenized once."""
        arrived, prepared = time.perf_counter(), list[PreparedPrompt]()

        def prepare() -> DecodeRequest | None:
            prepared.append(self._engine.prepare(request.messages))
            return self._engine.routing_request(prepared[0], request.options)

        self._scheduler.add(
            request.number, lambda: self._engine.stream(prepared[0], request.options, began=arrived), prepare
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
    """Read requests into `inbox`; end the process if the server has gone."""
    with os.fdopen(0, "rb", closefd=False) as file:
        while (request := m.read_request(file)) is not None:
            if isinstance(request, m.Cancel):
                interrupt.stop(request.number)  # at once: the prompt may still be decoding for a while
            inbox.put(request)
    inbox.put(None)
    threading.Event().wait(5)
    os._exit(0)  # the engine is still busy with a prompt that nobody needs


def main(arguments: Sequence[str]) -> int:
    """Open the engine and handle requests from stdin until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server handles Ctrl-C
    logging.basicConfig(level=logging.INFO, format="%(levelname)s worker: %(message)s")
    settings = msgspec.json.decode(arguments[0], type=m.Settings)
    pipe = Pipe(os.dup(1))
    os.dup2(2, 1)  # output of libraries must not mix with the messages
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
