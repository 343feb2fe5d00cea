"""One replica of the server: the application of each pack, and which pack a request is for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakValueDictionary

import msgspec
from sse_starlette.sse import AppStatus
from starlette.responses import JSONResponse

from loramix.errors import LoramixError
from loramix.pack.pack import Pack
from loramix.server.access import AccessPolicy
from loramix.server.app import create_app
from loramix.server.guard import App, Guard, Message, Receive, Send, error_body
from loramix.server.metrics import Metrics
from loramix.server.protocol import Settings
from loramix.server.queued_request import Limits
from loramix.server.service import Service, models_of
from loramix.server.supervisor import Supervisor

UNREADY_S = 60.0
"""Seconds that a worker process may take to start again."""
_HEADER = b"serve_multiplexed_model_id"


@dataclass(frozen=True, slots=True)
class PackServer:
    """How a pack is served."""

    name: str
    settings: Settings
    limits: Limits


class Loaded:
    """A pack with its worker process and its application.

    Args:
        service: the served pack.
    """

    def __init__(self, service: Service) -> None:
        self.service, self._app = service, create_app(service)
        self._running = 0

    @classmethod
    async def start(cls, server: PackServer) -> Self:
        """Start the worker of a pack.

        Raises:
            LoramixError: the worker cannot open the pack.
        """
        supervisor = Supervisor(server.settings, server.limits)
        service = Service(Pack.load(server.settings.pack), supervisor)
        service.n_ctx = (await supervisor.start()).n_ctx
        return cls(service)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Handle a request."""
        self._running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running -= 1

    async def close(self) -> None:
        """End the worker after the running answers."""
        while self._running:
            await asyncio.sleep(0.1)
        await self.service.supervisor.close()


class Unloadable(Loaded):
    """A pack that Serve unloads when a replica holds too many: it calls ``__del__`` in a thread."""

    def __init__(self, service: Service) -> None:
        super().__init__(service)
        self._loop, self._loop_thread = asyncio.get_running_loop(), threading.current_thread()
        self._open = True

    def __del__(self) -> None:
        """End the worker after the running answers; the garbage collector's call finds it ended."""
        if self._open and threading.current_thread() is not self._loop_thread:
            self._open = False
            asyncio.run_coroutine_threadsafe(self.close(), self._loop).result()


class Replica:
    """The deployment's class; Serve creates one in each replica's process.

    Args:
        servers: the pack that is always loaded, and further ones.
        policy: which requests are accepted.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, servers: Sequence[PackServer], policy: AccessPolicy
    ) -> None:
        AppStatus.enable_automatic_graceful_drain = False  # let streams finish on their own
        self._others = {server.name: server for server in servers[1:]}
        self._policy, self._exported = policy, ExportedMetrics()
        self._first = await Loaded.start(servers[0])
        self._first.service.others = [
            model for server in servers[1:] for model in models_of(Pack.load(server.settings.pack))
        ]
        self._loaded = WeakValueDictionary({servers[0].name: self._first})
        self._ready_at = time.monotonic()

    def __serve_build_asgi_app__(self) -> App:
        """Return the application; Serve calls this after the constructor."""
        return Guard(self._handle, self._policy)

    async def load(self, name: str) -> Loaded:
        """Start a further pack; Serve keeps and unloads it (`serve.multiplexed`)."""
        self._loaded[name] = loaded = await Unloadable.start(self._others[name])
        return loaded

    async def reload(self, name: str) -> bool:
        """Reload a pack from disk if this replica holds it; return whether anything changed."""
        found = self._loaded.get(name)
        return found is not None and await found.service.reload()

    async def check_health(self) -> None:
        """Export the metrics; fail if the worker process has not come back for a while.

        Raises:
            RuntimeError: Serve replaces the replica.
        """
        self._exported.set(loaded.service.metrics for loaded in list(self._loaded.values()))
        now = time.monotonic()
        if self._first.service.supervisor.ready:
            self._ready_at = now
        elif now - self._ready_at > UNREADY_S:
            raise RuntimeError(f"the worker process has not been ready for {UNREADY_S:g} s")

    async def _handle(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request to the application of its pack."""
        if scope["type"] != "http":
            await self._first(scope, receive, send)
            return
        pending = [await receive()]  # the guard has read the whole body

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        name = pack_of(scope, pending[0].get("body", b""))
        try:
            if (scope["method"], scope["path"]) == ("POST", f"/v1/packs/{name}/reload") and self._is_here(
                name
            ):
                await JSONResponse({"name": name, "changed": await self._reload_all(name)})(
                    scope, receive, send
                )
                return
            found = await self.load(name) if name in self._others else self._first
        except LoramixError as error:
            content = error_body(scope["path"], str(error), error.http_status)
            await JSONResponse(content, error.http_status)(scope, receive, send)
            return
        await found(scope, replay, send)

    def _is_here(self, name: str) -> bool:
        return name in self._others or name == self._first.service.pack.name

    async def _reload_all(self, name: str) -> bool:
        """Reload a pack in all replicas."""
        from ray import serve

        context = serve.get_replica_context()
        handle = serve.get_deployment_handle(context.deployment, context.app_name)
        return any(await handle.broadcast("reload", name).results_async())


class _Named(msgspec.Struct):
    model: str = ""
    name: str = ""


def pack_of(scope: Mapping[str, Any], body: bytes) -> str:
    """Return the name of the pack that a request is for: of its body, its path, or Serve's header; empty for none.

    Args:
        scope: ASGI scope.
        body: the whole body, valid JSON or empty.
    """
    try:
        named = msgspec.json.decode(body, type=_Named) if body else _Named()
    except msgspec.DecodeError:
        named = _Named()  # the application says what is wrong
    headers = {key.replace(b"-", b"_"): value.decode("latin-1") for key, value in scope["headers"]}
    found = (named.model, named.name, *scope["path"].split("/")[3:4], headers.get(_HEADER, ""))
    return next(filter(None, found), "").partition(":")[0]


class ExportedMetrics:
    """The server's metrics as Ray's, which each machine exports with those of Serve."""

    def __init__(self) -> None:
        self._gauges: dict[str, Any] = {}

    def set(self, metrics: Iterable[Metrics]) -> None:
        """Copy the current values; counters and histograms become gauges of the same names."""
        from ray.serve.metrics import Gauge

        totals: defaultdict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
        for one in metrics:
            for family in one.registry.collect():
                for sample in family.samples if family.name.startswith("loramix") else ():
                    labels = tuple(sorted(sample.labels.items()))
                    totals[sample.name, labels] += sample.value
                    if sample.name not in self._gauges:
                        keys = tuple(sorted(sample.labels))
                        self._gauges[sample.name] = Gauge(sample.name, family.documentation, tag_keys=keys)
        for (name, labels), value in totals.items():
            self._gauges[name].set(value, tags=dict(labels))
