"""Starts a Ray cluster on this machine or connects to one, quietly. Knows nothing of packs and prompts."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loramix import hardware
from loramix.diagnose.wording import size as readable
from loramix.errors import LoramixError, MissingExtra, NotFound, UsageError

LOCAL = "local"
OBJECT_STORE_BYTES = 256 * 2**20
"""Shared memory of a cluster that is started here: prompts and answers are small."""
_SYSTEM_ERRORS = (OSError, PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
_CONNECT_S = 5.0
_QUIET = {
    "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a FutureWarning for each actor without a GPU
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's own is 15, so that any other program starves workers
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # Ray Data's own way to start actors is reported as an error
}


def need_ray() -> None:
    """Check that Ray is installed.

    Raises:
        MissingExtra: it is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtra("this needs Ray, which is not installed: pip install 'loramix[ray]'.")


@contextmanager
def session(address: str | None = None, *, num_cpus: int | None = None) -> Iterator[bool]:
    """Connect to a Ray cluster, or start one on this machine; at the end disconnect, or stop it.

    A process that is connected already keeps its connection.

    Args:
        address: ``HOST:PORT`` or ``auto``; by default ``RAY_ADDRESS``, else a cluster is started here.
        num_cpus: CPUs of a cluster that is started here; by default all that the process may use.

    Yields:
        Whether the cluster was started here, so that nobody adds machines to it.

    Raises:
        MissingExtra: Ray is not installed.
        NotFound: no cluster answers at the address.
    """
    need_ray()
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's, about its own use of what it will remove
        import ray

        mine = not ray.is_initialized()
        address = address or os.environ.get("RAY_ADDRESS") or LOCAL
        if mine:
            _connect(address, num_cpus)
        try:
            yield mine and address == LOCAL
        finally:
            if mine:
                ray.shutdown()


def _connect(address: str, num_cpus: int | None) -> None:
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        options.update(
            num_cpus=num_cpus or cpu_count(), include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES
        )
    elif address != "auto":
        _need_answer(address)
    try:
        with _muted():
            ray.init(address=address, **options)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise NotFound(f"no Ray cluster could be used at {address}: {_first_line(error)}") from None


def cpu_count() -> int:
    """Return the CPUs that this process may use, which is what a cluster started here has."""
    quota = hardware.cpu_quota()
    return max(1, min(hardware.cpu_count(), int(quota) if quota else hardware.cpu_count()))


def pool_size(workers: int | None, cpus: int, memory: int, started_here: bool) -> int:
    """Return the number of workers: as wanted, or as many as fit the cluster.

    Args:
        workers: wanted; None for what fits.
        cpus: CPUs of a worker.
        memory: bytes of a worker; 0 if that is not known.
        started_here: whether nobody can add machines, so that what does not fit waits for ever.

    Raises:
        UsageError: they do not fit.
    """
    import ray

    found = ray.cluster_resources()
    fit = int(min(found.get("CPU", 0) // cpus, found.get("memory", 0) // max(1, memory)))
    if started_here and fit < (workers or 1):
        each = f"{cpus} CPUs" + (f" and {readable(memory)}" if memory else "")
        raise UsageError(
            f"{workers or 1} workers of {each} do not fit this machine, which has "
            f"{int(found.get('CPU', 0))} CPUs and {readable(int(found.get('memory', 0)))} for Ray: give fewer "
            "--workers or --cpus-per-worker, or a smaller --ctx."
        )
    return workers or max(1, fit)


def unwrap(error: BaseException) -> LoramixError | OSError | None:
    """Find the error that Ray's exceptions wrap.

    Args:
        error: what a task or an actor raised, as the driver sees it.

    Returns:
        The LoramixError or OSError (such as a full disk) behind it, or one sentence on a cluster that failed; None for
        a fault of the program.
    """
    from ray.exceptions import RayError, RayTaskError

    seen: list[BaseException] = []
    open_: list[BaseException | None] = [error]
    while open_:
        one = open_.pop(0)
        if one is None or one in seen:
            continue
        seen.append(one)
        # Ray adds arguments of its own, or lines of advice to the first one; ours has one line
        if isinstance(one, LoramixError) and type(one).__module__ == LoramixError.__module__:
            return type(one)(str(one.args[0]).partition("\n")[0] if one.args else "")
        if type(one) in _SYSTEM_ERRORS and isinstance(one, OSError):
            return OSError(one.errno, os.strerror(one.errno)) if one.errno else OSError(str(one))
        open_ += [getattr(one, "cause", None), one.__cause__, one.__context__]
    if isinstance(error, RayError) and not isinstance(error, RayTaskError):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return LoramixError(f"the Ray cluster failed: {lines[-1] if lines else type(error).__name__}")
    return None


@contextmanager
def _muted() -> Iterator[None]:
    """Send what native code writes to stderr nowhere: Ray reports there that it reports errors only."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _need_answer(address: str) -> None:
    """Check that something listens at an address; Ray itself retries for minutes.

    Raises:
        UsageError: not an address.
        NotFound: nothing answers.
    """
    parts = urlsplit(address if "://" in address else f"ray-gcs://{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise UsageError(f"--address {address} is not HOST:PORT, e.g. 10.0.0.5:6379, or auto.")
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        raise NotFound(
            f"no Ray cluster answers at {address} ({error}): start one there with 'ray start --head', or leave "
            "--address out to use this machine."
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
