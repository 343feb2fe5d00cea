"""The command ``loramix serve``."""

from __future__ import annotations

import ipaddress
import logging
import math
import os
from pathlib import Path
from typing import Any

import click

from loramix.commands.fetch_base import fetch_base_of
from loramix.commands.options import CTX, PACK, THREADS, needs_extra
from loramix.commands.ray_options import need_flag, ray_options
from loramix.defaults import ANSWER_S, FIRST_TOKEN_S, N_CELLS, PARALLEL, QUEUE, QUEUE_S, SERVER_CONTEXTS
from loramix.errors import NotFound, UsageError
from loramix.formats.textfile import read_text
from loramix.server.access import AccessPolicy, host_of, origin_of

PORT = 11435
MIN_KEY = 16


class Seconds(click.FloatRange):
    """Range of seconds; unlike click's range it rejects NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType`."""
        found = super().convert(value, param, ctx)
        return self.fail(f"{value} is not a number of seconds.", param, ctx) if math.isnan(found) else found


SECONDS = Seconds(0.1, 86_400)


@click.command()
@PACK
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on; an address other than this machine's own needs an API key.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=PORT,
    show_default=True,
    help="Port; 0 selects a free one.",
)
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), help="File with the API key; else LORAMIX_API_KEY."
)
@click.option("--allow-host", multiple=True, help="Further name in the Host header; repeatable.")
@click.option("--allow-origin", multiple=True, help="Further web origin to accept; repeatable.")
@click.option(
    "--queue",
    type=click.IntRange(0, 10_000),
    default=QUEUE,
    show_default=True,
    help="Requests that may wait.",
)
@click.option(
    "--parallel", type=click.IntRange(1, 32), default=PARALLEL, show_default=True, help="Concurrent answers."
)
@click.option(
    "--queue-timeout",
    type=SECONDS,
    default=QUEUE_S,
    show_default=True,
    help="Seconds that a request may wait.",
)
@click.option(
    "--first-token-timeout",
    type=SECONDS,
    default=FIRST_TOKEN_S,
    show_default=True,
    help="Seconds until the first token.",
)
@click.option(
    "--timeout",
    type=SECONDS,
    default=ANSWER_S,
    show_default=True,
    help="Seconds until the end of the answer.",
)
@THREADS
@CTX
@click.option(
    "--cells",
    type=click.IntRange(64),
    default=N_CELLS,
    show_default=True,
    help="Tokens of all concurrent answers together.",
)
@click.option(
    "--contexts",
    type=click.IntRange(2, 64),
    default=SERVER_CONTEXTS,
    show_default=True,
    help="Mixes whose KV is kept.",
)
@ray_options(
    "Serve with replicas on a Ray cluster, as many as the queue needs.",
    "Largest number of replicas.  [default: 8]",
)
@click.option("--min-workers", type=click.IntRange(1), help="Smallest number of replicas.  [default: 1]")
@click.option(
    "--also",
    multiple=True,
    help="Further pack, loaded by a replica when a request names it; repeatable, with --ray.",
)
@click.option(
    "--packs-per-worker",
    type=click.IntRange(1),
    help="Further packs that a replica holds at once.  [default: 2]",
)
def serve(
    pack: str,
    host: str,
    port: int,
    api_key_file: Path | None,
    allow_host: tuple[str, ...],
    allow_origin: tuple[str, ...],
    threads: int | None,
    ray: bool,
    address: str | None,
    workers: int | None,
    cpus_per_worker: int | None,
    min_workers: int | None,
    also: tuple[str, ...],
    packs_per_worker: int | None,
    **limits: Any,
) -> None:
    """Serve a pack to OpenAI's and Ollama's clients."""
    host = host_of(host, "--host")
    hosts = frozenset((*map(host_of, allow_host), host))
    origins = frozenset(map(origin_of, allow_origin))
    key = read_key(api_key_file)
    local = is_loopback(host)
    if not local and key is None:
        raise UsageError(
            f"listening on {host} lets other machines send requests, so an API key is needed: "
            "put one into a file and give --api-key-file FILE, or set LORAMIX_API_KEY."
        )
    policy = AccessPolicy(hosts=hosts, origins=origins, api_key=key, any_address=not local)
    cluster = need_flag(
        ray,
        address=address,
        workers=workers,
        cpus_per_worker=cpus_per_worker,
        min_workers=min_workers,
        also=also,
        packs_per_worker=packs_per_worker,
    )
    for name in (pack, *also):
        fetch_base_of(name)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    if not ray:
        _here(pack, threads, policy, host, port, **limits)
    elif threads is not None:
        raise UsageError("--threads is for one machine; with --ray give --cpus-per-worker.")
    else:
        _on_cluster(policy, host, port, pack=pack, **cluster, **limits)


def _here(
    pack: str,
    threads: int | None,
    policy: AccessPolicy,
    host: str,
    port: int,
    *,
    queue: int,
    parallel: int,
    queue_timeout: float,
    first_token_timeout: float,
    timeout: float,
    ctx: int,
    cells: int,
    contexts: int,
) -> None:
    """Serve in this process."""
    with needs_extra("serve"):
        from loramix.server.app import serve as work
        from loramix.server.protocol import Settings
        from loramix.server.queued_request import Limits
    work(
        Settings(
            pack=pack,
            n_ctx=ctx,
            n_threads=threads,
            contexts=contexts,
            parallel=parallel,
            n_cells=max(cells, ctx),
        ),
        Limits(queue=queue, queue_s=queue_timeout, first_token_s=first_token_timeout, total_s=timeout),
        policy,
        host=host,
        port=port,
    )


def _on_cluster(policy: AccessPolicy, host: str, port: int, **options: Any) -> None:
    """Serve with Ray Serve, in a session of its own."""
    from loramix.cluster.session import session

    address = options.pop("address", None)
    with session(address) as started_here, needs_extra("serve"):
        from loramix.cluster.serving import ServeOptions, serve_on_cluster

        serve_on_cluster(ServeOptions(**options), policy, host=host, port=port, started_here=started_here)


def read_key(file: Path | None) -> str | None:
    """Read the API key from a file or the environment; None if there is none.

    Raises:
        NotFound: the file does not exist.
        UsageError: the key is too short or not printable ASCII.
    """
    if file is not None:
        if not file.is_file():
            raise NotFound(f"no key file at {file}; write a long random text into it.")
        key = read_text(file, UsageError).strip()
    else:
        key = os.environ.get("LORAMIX_API_KEY", "").strip()
        if not key:
            return None
    if len(key) < MIN_KEY or not (key.isascii() and key.isprintable()) or " " in key:
        raise UsageError(
            f"the API key must have {MIN_KEY} printable ASCII characters or more and no space; "
            "'openssl rand -hex 32' generates a good one."
        )
    return key


def is_loopback(host: str) -> bool:
    """Return whether an address is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
