"""The server application: routes, error responses, start-up and graceful shutdown.

Requests never cause a download and never name a file to load.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator, MutableMapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sse_starlette.sse import AppStatus
from starlette.exceptions import HTTPException
from starlette.responses import Response

from loramix.defaults import __version__
from loramix.errors import LoramixError
from loramix.pack.pack import Pack
from loramix.server import api_explain
from loramix.server import protocol as m
from loramix.server.access import AccessPolicy
from loramix.server.fields import sentence
from loramix.server.guard import App, Guard, Message, Receive, Send, error_body
from loramix.server.ollama import routes as ollama_routes
from loramix.server.openai import routes as openai_routes
from loramix.server.page import PageMount
from loramix.server.queued_request import Limits
from loramix.server.request_table import BODIES, table
from loramix.server.service import Service
from loramix.server.supervisor import Supervisor

GRACE_S = 8.0
"""Seconds that running answers have to finish after a shutdown signal; the rest fail."""


def create_app(service: Service) -> FastAPI:
    """Build the FastAPI application, without the guard.

    Args:
        service: its worker is closed when the app shuts down.
    """

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.supervisor.close()

    app = FastAPI(title="Loramix", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.include_router(openai_routes.router(service))
    app.include_router(api_explain.router(service))
    app.include_router(ollama_routes.router(service))
    app.add_middleware(RequestCounter, service=service)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Report readiness: 200, or 503 while the worker starts."""
        supervisor = service.supervisor
        content = {
            "status": "ok" if supervisor.ready else "starting",
            "waiting": len(supervisor.waiting),
            "active": len(supervisor.active),
            "restarts": supervisor.restarts,
        }
        return JSONResponse(content, 200 if supervisor.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Return the metrics in Prometheus text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(LoramixError)
    async def refused(request: Request, error: LoramixError) -> Response:
        return _error(request, str(error), error.http_status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        found = [{**one, "loc": one["loc"][1:]} for one in error.errors()]
        field, message = sentence(BODIES.get(request.scope["route"].path), found)
        return _error(request, message, 400, field)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        target = f"{request.method} {request.url.path[:80]}"
        message = {
            404: f"there is no {target} here; {_hint(request.url.path)}.",
            405: f"{target} is not allowed; send {(error.headers or {}).get('Allow', 'another method')}.",
        }.get(error.status_code, f"{target} failed: {error.detail}.")
        return _error(request, message, error.status_code)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return _error(request, f"the server failed ({type(error).__name__}); see its log for details.", 500)

    app.router.routes.append(PageMount())
    return app


def _hint(path: str) -> str:
    """Name the endpoint that a path with another prefix means, as of a base URL without ``/v1`` or with it twice."""
    path = path.rstrip("/")
    meant = (known for known in table() if path and (known.endswith(path) or path.endswith(known)))
    return f"send it to {found}" if (found := next(meant, "")) else "/openapi.json lists the endpoints"


def _error(request: Request, message: str, status: int, field: str | None = None) -> Response:
    path = request.url.path
    if path.startswith("/api/") and status == 429:
        status = 503  # Ollama's clients expect 503 for "busy"
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse(error_body(path, message, status, field), status, headers)


class RequestCounter:
    """ASGI middleware that counts requests by path and status.

    Args:
        app: the wrapped application.
        service: owns the counters.
    """

    def __init__(self, app: App, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Count the request when its response starts."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # the route's path, not the raw URL: arbitrary URLs would create unbounded labels
                path = getattr(scope.get("route"), "path", "other")
                self._service.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)


class Server(uvicorn.Server):
    """uvicorn server that shuts down gracefully on a signal, with exit code 0.

    Args:
        config: configuration of uvicorn.
        supervisor: drained on shutdown.
    """

    def __init__(self, config: uvicorn.Config, supervisor: Supervisor) -> None:
        super().__init__(config)
        self._supervisor = supervisor

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install signal handlers; unlike uvicorn's, do not raise the signal again at the end."""
        loop = asyncio.get_running_loop()
        old = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        self._loop = loop
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Shut down after the running answers; immediately at the second signal."""
        if self.should_exit:
            self.force_exit = True
            self._loop.call_soon_threadsafe(partial(self._supervisor.abort, kill=True))
        self.should_exit = True
        self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self._supervisor.drain()
        self._loop.call_later(GRACE_S, self._supervisor.abort)


def serve(
    settings: m.Settings,
    limits: Limits,
    policy: AccessPolicy,
    *,
    host: str,
    port: int,
) -> None:
    """Serve until a shutdown signal.

    Args:
        settings: settings of the worker.
        limits: limits of the queue.
        policy: access policy.
        host: address to listen on.
        port: port to listen on; 0 picks a free one, which the log shows.

    Raises:
        LoramixError: the pack cannot be served.
    """
    factory = uvicorn.Config("", loop="auto").get_loop_factory()  # uvloop if it is installed
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_serve(settings, limits, policy, host, port))


async def _serve(settings: m.Settings, limits: Limits, policy: AccessPolicy, host: str, port: int) -> None:
    AppStatus.enable_automatic_graceful_drain = False  # let streams finish on their own
    supervisor = Supervisor(settings, limits)
    service = Service(Pack.load(settings.pack), supervisor)
    ready = await supervisor.start()
    service.n_ctx = ready.n_ctx
    try:
        config = uvicorn.Config(
            Guard(create_app(service), policy),
            host=host,
            port=port,
            log_level="info",
            access_log=False,
            server_header=False,
            limit_concurrency=512,
            timeout_graceful_shutdown=int(GRACE_S) + 2,
        )
        await Server(config, supervisor).serve()
    finally:
        await supervisor.close()
