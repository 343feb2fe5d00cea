"""The command ``loramix eval``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from loramix.commands.fetch_base import fetch_base_of
from loramix.commands.options import PATH, THREADS, training_extra
from loramix.defaults import DEFAULT_PACK
from loramix.errors import UsageError


def at_most(name: str, default: int, what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Build an option that limits the rows of a part."""
    return click.option(name, type=click.IntRange(1), default=default, show_default=True, help=what)


@click.command("eval")
@click.argument("pack", default=DEFAULT_PACK)
@click.option("--data-dir", type=PATH, help="Directory with a data file per skill; --everyday needs none.")
@click.option("--everyday", is_flag=True, help="Measure on everyday requests instead, scored from 0 to 1.")
@click.option("--bare", is_flag=True, help="With --everyday: measure the pack's base alone.")
@click.option("--split", type=click.Choice(["dev", "test"]), help="With --everyday: only these requests.")
@click.option("--held-out", type=PATH, help="TOML of phrasings not used in training, for the gate.")
@click.option("--none", "none_files", type=PATH, multiple=True, help="JSONL of prompts that no skill fits.")
@click.option("--skill", "skills", multiple=True, help="Only this skill; repeatable.")
@click.option("--only", type=click.Choice(["skills", "routing", "composed"]), help="Only this part.")
@click.option("--rows", type=click.IntRange(1), help="Maximum rows per test set; by default all.")
@at_most("--few", 200, "Maximum rows per test set for the bare base, unseen phrasings and PyTorch.")
@at_most("--composed-rows", 60, "Maximum prompts per kind of prompt with two requests.")
@at_most("--grid-rows", 12, "Maximum dev prompts per kind at each point of the grid of blends.")
@click.option("--peft", type=PATH, help="Directory with training runs, to compare with PyTorch too.")
@THREADS
@click.option(
    "--out", type=PATH, default=Path("runs/eval"), show_default=True, help="Directory of the report."
)
def evaluate(
    pack: str,
    data_dir: Path | None,
    everyday: bool,
    bare: bool,
    split: str | None,
    held_out: Path | None,
    none_files: tuple[Path, ...],
    skills: tuple[str, ...],
    only: str | None,
    rows: int | None,
    few: int,
    composed_rows: int,
    grid_rows: int,
    peft: Path | None,
    threads: int | None,
    out: Path,
) -> None:
    """Measure PACK on test rows: its skills, its gate and its blends; writes report.json, report.html and report.md.

    After an interruption, the same command resumes.
    """
    if (bare or split) and not everyday:
        raise UsageError("--bare and --split apply to everyday requests: add --everyday, or leave them out.")
    if everyday and (data_dir or held_out or none_files or only or rows or peft):
        raise UsageError(
            "--everyday excludes --data-dir, --held-out, --none, --only, --rows and --peft: leave these or it out."
        )
    if data_dir is None and not everyday:
        raise UsageError(
            "a pack is measured on test rows of --data-dir DIRECTORY, or with --everyday; give one."
        )
    from loramix.pack.pack import Pack

    fetch_base_of(pack)
    if everyday:
        _everyday(pack, out, (split,) if split else (), skills, bare, threads)
        return
    assert data_dir is not None
    with training_extra(), EvalDisplay() as display:
        from loramix.eval.report import write_pages
        from loramix.eval.run import PARTS, evaluate_pack

        report = evaluate_pack(
            Pack.load(pack),
            data_dir,
            out,
            skills=skills,
            parts=[only] if only else PARTS,
            held_out=held_out,
            none_files=none_files,
            limit=rows,
            few=few,
            composed_limit=composed_rows,
            grid_limit=grid_rows,
            peft=peft,
            n_threads=threads,
            report=display.update,
        )
        pages = write_pages(report)
    for path in (report, *pages):
        click.echo(str(path))


def _everyday(
    pack: str, out: Path, splits: tuple[str, ...], skills: tuple[str, ...], bare: bool, threads: int | None
) -> None:
    """Evaluate on everyday requests and print a table."""
    with training_extra(), EvalDisplay() as display:
        from loramix.eval.everyday.requests import SPLITS
        from loramix.eval.everyday.run import evaluate_everyday
        from loramix.pack.pack import Pack

        report = evaluate_everyday(
            Pack.load(pack),
            out,
            splits=splits or SPLITS,
            skills=skills,
            bare=bare,
            n_threads=threads,
            report=display.update,
        )
    for split, kinds in json.loads(report.read_text(encoding="utf-8"))["splits"].items():
        for kind, found in kinds.items():
            mean = found["mean"]
            click.echo(f"{split}, {kind}: {mean['value']:.3f} ({mean['low']:.3f} to {mean['high']:.3f})")
            for name, figure in found["skills"].items():
                click.echo(f"  {name:14} {figure['value']:.3f} of {figure['rows']} requests")
    click.echo(str(report))


class EvalDisplay:
    """Progress on stderr: one bar per part, or a line for each tenth if stderr is not a terminal."""

    def __enter__(self) -> EvalDisplay:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._plain = not console.is_terminal
        self._bar = Progress(console=console, disable=self._plain)
        self._bar.start()
        self._tasks: dict[str, Any] = {}
        return self

    def update(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps of a part are complete."""
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=done)
        if self._plain and (done == total or done % max(1, total // 10) == 0):
            click.echo(f"{what}: {done} of {total}", err=True)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
