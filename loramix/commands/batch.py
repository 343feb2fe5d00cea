"""The command ``loramix batch``: answer files of prompts, on this machine or with a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from loramix.commands.fetch_base import fetch_base_of
from loramix.commands.options import answer_options, engine_options, open_engine
from loramix.commands.ray_options import need_flag, ray_options
from loramix.defaults import PARALLEL
from loramix.errors import InvalidData, UsageError


@click.command()
@click.argument("source", metavar="SOURCE")
@click.argument("out", metavar="OUT")
@click.option("--column", default="prompt", show_default=True, help="Column of the prompt, text or messages.")
@click.option(
    "--parallel",
    type=click.IntRange(1, 32),
    default=PARALLEL,
    show_default=True,
    help="Concurrent answers (of each worker).",
)
@ray_options(
    "Use the workers of a Ray cluster; SOURCE may be a directory, glob or URI, OUT is a directory.",
    "Workers; by default what the cluster's CPUs and memory hold.",
)
@click.option("--rows-per-file", type=click.IntRange(1), help="Rows of a file of OUT.  [default: 128]")
@engine_options
@answer_options
def batch(
    source: str,
    out: str,
    column: str,
    parallel: int,
    ray: bool,
    pack: str,
    ctx: int,
    threads: int | None,
    **options: Any,
) -> None:
    """Answer each row of SOURCE (JSONL, CSV or Parquet), routed; after an interruption, the same command resumes.

    OUT is JSONL or Parquet, by its suffix, and keeps the columns of SOURCE. A row that cannot be answered becomes a
    row with its error.
    """
    names = ("address", "workers", "cpus_per_worker", "rows_per_file")
    given = need_flag(ray, **{name: options.pop(name) for name in names})
    if ray:
        if threads is not None:
            raise UsageError("--threads is for one machine; with --ray give --cpus-per-worker.")
        _on_cluster(source, out, pack, column=column, parallel=parallel, n_ctx=ctx, **given, **options)
        return

    from loramix.runtime.batch import run_batch

    with open_engine(pack, ctx, threads) as engine, _progress() as report:
        counts = run_batch(
            engine, Path(source), Path(out), column=column, parallel=parallel, report=report, **options
        )
    click.echo(f"{out}: {counts['answered']} answers, {counts['errors']} errors", err=True)
    _need_answers(counts["answered"], counts["errors"], out)


def _need_answers(answered: int, errors: int, out: str) -> None:
    """Fail if no row was answered: the column, the file or the pack is then probably another one."""
    if errors and not answered:
        raise InvalidData(f"no row was answered; the field 'error' of the rows in {out} says why.")


def _on_cluster(source: str, out: str, pack: str, **options: Any) -> None:
    from loramix.cluster.batch import run_cluster_batch
    from loramix.cluster.session import need_ray

    need_ray()
    fetch_base_of(pack)
    with _progress() as report:
        counts = run_cluster_batch(source, out, pack=pack, report=report, **options)
    before = f"; {counts['files']} files of earlier runs" if counts["files"] else ""
    answers = counts["rows"] - counts["errors"]
    click.echo(f"{out}: {answers} answers, {counts['errors']} errors{before}", err=True)
    _need_answers(answers, counts["errors"], out)


@contextmanager
def _progress() -> Iterator[Callable[..., None]]:
    """Yield a callback that shows the number of finished rows and, if it is known, of all."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("answering", total=None)
        yield lambda done, total=None: progress.update(task, completed=done, total=total)
