"""The command ``loramix batch``: answer a file of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loramix.commands.options import answer_options, engine_options, open_engine


@click.command()
@click.argument("source", metavar="SOURCE", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--column", default="prompt", show_default=True, help="Column of the prompt, text or messages.")
@click.option(
    "--parallel", type=click.IntRange(1, 32), default=8, show_default=True, help="Concurrent answers."
)
@engine_options
@answer_options
def batch(
    source: Path,
    out: Path,
    column: str,
    parallel: int,
    pack: str,
    ctx: int,
    threads: int | None,
    **options: Any,
) -> None:
    """Answer each row of SOURCE (JSONL, CSV or Parquet), routed; after an interruption, the same command resumes.

    OUT is JSONL or Parquet, by its suffix, and keeps the columns of SOURCE. A row that cannot be answered becomes a
    row with its error.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from loramix.runtime.batch import run_batch

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        open_engine(pack, ctx, threads) as engine,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        task = progress.add_task("answering", total=None)
        counts = run_batch(
            engine,
            source,
            out,
            column=column,
            parallel=parallel,
            report=lambda done, total: progress.update(task, completed=done, total=total),
            **options,
        )
    click.echo(f"{out}: {counts['answered']} answers, {counts['errors']} errors", err=True)
