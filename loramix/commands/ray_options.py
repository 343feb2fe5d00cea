"""Options of commands that run on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from loramix.errors import UsageError


def ray_options(use: str, workers: str) -> Callable[[Any], Any]:
    """Return a decorator that adds ``--ray`` and the options that need it.

    Args:
        use: help of ``--ray``.
        workers: help of ``--workers``.
    """

    def decorate(command: Any) -> Any:
        for option in (
            click.option(
                "--cpus-per-worker",
                type=click.IntRange(1),
                help="CPUs and threads of a worker.  [default: 1]",
            ),
            click.option("--workers", type=click.IntRange(1), help=workers),
            click.option(
                "--address",
                help="Cluster, HOST:PORT or auto; by default $RAY_ADDRESS, else one is started on this machine.",
            ),
            click.option("--ray", is_flag=True, help=use),
        ):
            command = option(command)
        return command

    return decorate


def need_flag(ray: bool, **given: Any) -> dict[str, Any]:
    """Return the options that were given; they need ``--ray``.

    Args:
        ray: whether ``--ray`` was given.
        **given: options of the cluster; None or an empty tuple if not given.

    Raises:
        UsageError: an option that needs ``--ray`` was given without it.
    """
    found = {name: value for name, value in given.items() if value not in (None, ())}
    if found and not ray:
        raise UsageError(f"--{next(iter(found)).replace('_', '-')} needs --ray.")
    return found
