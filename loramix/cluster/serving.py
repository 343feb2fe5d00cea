"""The server as replicas behind Ray Serve's proxy: each replica has the whole application and its own worker process.

Serve spreads requests, starts replicas when requests queue up, replaces those that die and drains those that stop.
As in `loramix.server`, a replica's engine runs in a child process, so an abort of llama.cpp costs only the active
answers.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from loramix.cluster.replica import PackServer, Replica
from loramix.cluster.session import pool_size
from loramix.defaults import (
    ANSWER_S,
    DEFAULT_PACK,
    FIRST_TOKEN_S,
    N_CELLS,
    N_CTX,
    PARALLEL,
    QUEUE,
    QUEUE_S,
    SERVER_CONTEXTS,
)
from loramix.diagnose.memory_plan import make_plan
from loramix.errors import RequestFailed, UsageError
from loramix.models import bases
from loramix.pack.pack import Pack
from loramix.server.access import AccessPolicy, host_of, origin_of
from loramix.server.protocol import Settings
from loramix.server.queued_request import Limits

_log = logging.getLogger(__name__)

NAME = "loramix"
"""Name of the application on the cluster."""
HEALTH_S = 2.0
"""Seconds between health checks; three failures replace a replica."""
STARTS = 3
"""How often replicas may fail to start until the server cannot."""
SPARE = 16
"""Requests beyond those that answer or wait, so that /health and /metrics reach a full replica."""
_CONTROLLER = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
"""A proxy on a busy machine starts in more than Serve's 5 seconds, after which it would be started again."""
REPLICA_BYTES = 200 * 2**20
"""Memory of a replica besides its workers: Python, Ray, the application."""


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the application, as in ``args`` of a Serve config; names as those of ``loramix serve``."""

    pack: str = DEFAULT_PACK
    also: tuple[str, ...] = ()
    """Further packs, loaded when a request names them."""
    packs_per_worker: int = 2
    """Largest number of further packs that a replica holds at once."""
    min_workers: int = 1
    workers: int = 8
    """Largest number of replicas."""
    cpus_per_worker: int = 1
    ctx: int = N_CTX
    cells: int = N_CELLS
    contexts: int = SERVER_CONTEXTS
    parallel: int = PARALLEL
    queue: int = QUEUE
    queue_timeout: float = QUEUE_S
    first_token_timeout: float = FIRST_TOKEN_S
    timeout: float = ANSWER_S
    allow_host: tuple[str, ...] = ()
    allow_origin: tuple[str, ...] = ()

    def settings(self, pack: str) -> Settings:
        """Return the settings of a pack's worker process."""
        return Settings(
            pack=pack,
            n_ctx=self.ctx,
            n_threads=self.cpus_per_worker,
            contexts=self.contexts,
            parallel=self.parallel,
            n_cells=max(self.cells, self.ctx),
        )

    @property
    def limits(self) -> Limits:
        """Limits of a replica's queue."""
        return Limits(self.queue, self.queue_timeout, self.first_token_timeout, self.timeout)


def app(args: Mapping[str, Any]) -> Any:
    """Build the application for ``serve run`` and ``serve deploy``: ``loramix.cluster.serving:app``.

    The API key is in ``LORAMIX_API_KEY`` of this process; without one, only clients on the same machine are served.

    Args:
        args: fields of `ServeOptions`.

    Raises:
        UsageError: an unknown or invalid field.
    """
    try:
        options = msgspec.convert(dict(args), ServeOptions, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(f"args of the application: {error}.") from None
    key = os.environ.get("LORAMIX_API_KEY", "").strip() or None
    hosts = frozenset(map(host_of, options.allow_host))
    origins = frozenset(map(origin_of, options.allow_origin))
    return application(options, AccessPolicy(hosts, origins, key, any_address=key is not None))


def application(options: ServeOptions, policy: AccessPolicy) -> Any:
    """Build Serve's application.

    Args:
        options: packs, replicas and limits.
        policy: which requests are accepted.

    Raises:
        NotFound: a pack or its base is missing here.
        UsageError: two packs have the same name.
    """
    from ray import serve

    # workers have directories of their own to start from
    places = [str(Path(p).absolute()) if Path(p).is_dir() else p for p in (options.pack, *options.also)]
    packs = [Pack.load(place) for place in places]
    names = [pack.name for pack in packs]
    if len(set(names)) != len(names):
        raise UsageError(
            f"two of the packs are named alike ({', '.join(names)}); rename one in its pack.toml."
        )

    class Multiplexed(Replica):
        load = serve.multiplexed(max_num_models_per_replica=options.packs_per_worker)(Replica.load)

    deployment = serve.deployment(
        serve.ingress()(Multiplexed),
        name=NAME,
        ray_actor_options={"num_cpus": options.cpus_per_worker, "memory": _memory_bytes(options, packs)},
        max_ongoing_requests=options.parallel + options.queue + SPARE,
        autoscaling_config={
            "min_replicas": min(options.min_workers, options.workers),
            "max_replicas": options.workers,
            "target_ongoing_requests": options.parallel,
            "upscale_delay_s": 5,
            "downscale_delay_s": 300,
        },
        health_check_period_s=HEALTH_S,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=options.timeout,
        max_constructor_retry_count=STARTS,
    )
    servers = [
        PackServer(pack.name, options.settings(place), options.limits)
        for pack, place in zip(packs, places, strict=True)
    ]
    return deployment.bind(servers, policy)


def _memory_bytes(options: ServeOptions, packs: Sequence[Pack]) -> int:
    """Return the memory of a replica that holds as many packs as it may."""
    first, *others = (
        make_plan(bases.resolve(pack.manifest.base.name), n_ctx=options.ctx, pack=pack).memory_bytes
        for pack in packs
    )
    return REPLICA_BYTES + first + sum(sorted(others, reverse=True)[: options.packs_per_worker])


@contextmanager
def deployed(
    options: ServeOptions, policy: AccessPolicy, *, host: str, port: int, started_here: bool = False
) -> Iterator[str]:
    """Serve on the cluster of the current session; at the end, wait for answers for up to a minute, and stop.

    Args:
        options: packs, replicas and limits.
        policy: which requests are accepted.
        host: address that each machine's proxy listens on.
        port: its port; 0 selects one that is free on this machine.
        started_here: see `loramix.cluster.session.session`.

    Yields:
        The address, as ``http://HOST:PORT``.

    Raises:
        UsageError: the cluster serves something already, or the smallest number of replicas does not fit.
        RequestFailed: proxies or replicas cannot start.
    """
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    memory = _memory_bytes(options, [Pack.load(name) for name in (options.pack, *options.also)])
    pool_size(options.min_workers, options.cpus_per_worker, memory, started_here)
    built, port = application(options, policy), port or _free_port(host)
    if serve.status().proxies:
        raise UsageError(
            "Ray Serve runs on this cluster already, with a port of its own: deploy loramix.cluster.serving:app there "
            "with 'serve deploy', or end it with 'serve shutdown'."
        )
    try:
        try:
            serve.start(
                proxy_location="EveryNode",
                http_options={"host": host, "port": port},
                controller_options={"runtime_env": {"env_vars": _CONTROLLER}},
            )
            serve.run(built, name=NAME, route_prefix="/")
        except (RuntimeError, TimeoutError) as error:
            raise RequestFailed(f"the server cannot start on the cluster: {_reason(error)}", 500) from None
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
        with suppress(TimeoutError):  # a shutdown alone would close the connections of answers that run
            serve.delete(NAME)
    finally:
        serve.shutdown()


def _reason(error: Exception) -> str:
    """Return our own error in the tracebacks that Serve hands on, else the first line."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    own = [line.partition(": ")[2] for line in lines if line.startswith("loramix.errors.")]
    return (own or lines[:1])[-1]


def serve_on_cluster(options: ServeOptions, policy: AccessPolicy, **place: Any) -> None:
    """Serve until a signal, and drain; a second signal ends at once. See `deployed`."""
    stopped = threading.Event()

    def stop(number: int, _frame: Any) -> None:
        stopped.set()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with deployed(options, policy, **place) as url:
        _log.info("running on %s (Ctrl-C to stop)", url)
        while not stopped.wait(1.0):
            pass


def _free_port(host: str) -> int:
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
        return int(found.getsockname()[1])
