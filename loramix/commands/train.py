"""The commands ``loramix train skill``, ``pack`` and ``gate``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loramix.commands.fetch_base import fetch_base, fetch_base_of
from loramix.commands.options import PATH, training_extra
from loramix.commands.ray_options import need_flag, ray_options
from loramix.defaults import DEFAULT_PACK
from loramix.errors import InvalidData

if TYPE_CHECKING:
    from loramix.train.pack import Trainer


@click.group()
def train() -> None:
    """Train skills and gates (needs the extra [train])."""


@train.command("skill")
@click.argument("recipe")
@click.option(
    "--data", type=PATH, help="JSONL or JSONL.gz of split, input, target; a directory for several sources."
)
@click.option("--base", default=DEFAULT_PACK, show_default=True, help="Base: name, GGUF or HF directory.")
@click.option("--out", type=PATH, help="Run directory; by default runs/RECIPE.")
@click.option("--resume", is_flag=True, help="Resume from the last complete checkpoint.")
@click.option("--max-rows", type=click.IntRange(1), help="Maximum training rows.")
@click.option(
    "--max-steps", type=click.IntRange(1), help="Stop after this many steps; the learning rate decays before."
)
@click.option(
    "--gradient-checkpointing/--no-gradient-checkpointing",
    "checkpointing",
    default=None,
    help="Use less memory, a third slower.  [default: if memory is short]",
)
def train_skill(
    recipe: str,
    data: Path | None,
    base: str,
    out: Path | None,
    resume: bool,
    max_rows: int | None,
    max_steps: int | None,
    checkpointing: bool | None,
) -> None:
    """Train the adapter of RECIPE (a name or a TOML file)."""
    from loramix.models import bases
    from loramix.train.recipe import recipe_for

    loaded = recipe_for(recipe, base)
    if data is None:
        raise InvalidData(
            f"skill {loaded.name!r} needs its data: {loaded.data.how} Then pass it with --data FILE."
        )
    if not Path(base).is_dir():
        fetch_base(base)
    base_path = Path(base) if Path(base).is_dir() else bases.resolve(base)
    with training_extra(), Display() as display:
        from loramix.train.data import read_rows
        from loramix.train.lora import train_skill as work
        from loramix.train.sources import by_source, gather

        rows = gather(loaded, data) if loaded.data.sources else read_rows(data)
        for source, count in by_source(rows).items() if loaded.data.sources else ():
            click.echo(f"{count:6} rows of {source}", err=True)
        result = work(
            loaded,
            rows,
            base_path,
            out or Path("runs") / loaded.name,
            resume=resume,
            max_rows=max_rows,
            max_steps=max_steps,
            checkpointing=checkpointing,
            report=display.update,
            say=lambda line: click.echo(line, err=True),
        )
    click.echo(
        f"dev loss {result.dev_loss:.4f}, dev exact {result.dev_exact:.3f}, {result.seconds:.0f} s", err=True
    )
    click.echo(str(result.directory))


@train.command("pack")
@click.argument("directory", type=PATH)
@click.option(
    "--data-dir", type=PATH, required=True, help="Directory with a data file per skill, NAME.jsonl.gz."
)
@click.option("--skill", "skills", multiple=True, help="Recipe (name or file); repeatable; by default all.")
@click.option("--base", default=DEFAULT_PACK, show_default=True, help="Base: name or GGUF.")
@click.option("--out", type=PATH, default=Path("runs"), show_default=True, help="Run directories.")
@click.option("--none", "none_files", type=PATH, multiple=True, help="JSONL of prompts that no skill fits.")
@click.option("--description", default="", help="One line that describes a new pack.")
@click.option("--gate/--no-gate", default=True, show_default=True, help="Train the gate at the end.")
@ray_options(
    "Train skills on a Ray cluster, several at a time; all paths must be visible to its machines.",
    "Largest number of skills at a time; by default as many as the cluster's CPUs hold.",
)
def train_pack(
    directory: Path,
    data_dir: Path,
    skills: tuple[str, ...],
    base: str,
    out: Path,
    none_files: tuple[Path, ...],
    description: str,
    gate: bool,
    ray: bool,
    **cluster: Any,
) -> None:
    """Train the skills of the pack in DIRECTORY one after another, then its gate.

    After an interruption, the same command resumes.
    """
    from loramix.train.recipe import base_recipe, recipe_for, shipped

    given = need_flag(ray, **cluster)
    recipes = [recipe_for(name, base) for name in skills or shipped()]
    if not description and (known := base_recipe(base)):
        description = known.description
    fetch_base(base)
    with training_extra(), _trainer(out, ray, **given) as trainer:
        from loramix.train.pack import train_pack as work

        pack = work(
            directory.absolute(), recipes, data_dir, out, base=base, description=description, trainer=trainer
        )
    if gate:
        with training_extra():
            from loramix.train.gate import train_gate as work_gate

            for line in work_gate(pack.directory, data_dir, none_files, out / "gate"):
                click.echo(line, err=True)
    click.echo(str(directory))


@contextmanager
def _trainer(out: Path, ray: bool, **cluster: Any) -> Iterator[Trainer]:
    """Yield what trains the skills of a pack: this process, or a cluster."""

    def say(line: str) -> None:
        click.echo(line, err=True)

    if ray:
        from loramix.cluster.training import on_cluster

        yield on_cluster(out, say=say, **cluster)
    else:
        from loramix.train.pack import one_by_one

        with Display() as display:
            yield one_by_one(display.update_pack, say)


class Display:
    """A progress bar with loss, tokens/s and time left; plain lines if stderr is not a terminal."""

    def __enter__(self) -> Display:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._plain = not console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=self._plain)
        self._bar.start()
        self._task: Any = None
        self._title = ""
        return self

    def update_pack(self, found: Any) -> None:
        """Show the progress of training several skills."""
        title = f"{found.skill} ({found.number} of {found.count})"
        if found.progress is None:
            self._bar.console.print(f"{title}: trained before")
            return
        if title != self._title:
            self._title, self._task = title, None
        self.update(found.progress)

    def update(self, progress: Any) -> None:
        """Show a training step."""
        if self._task is None:
            self._task = self._bar.add_task("", total=progress.steps)
        title = f"{self._title}: " if self._title else ""
        what = f"{title}loss {progress.loss:.3f}, {progress.tokens_per_second:.0f} tokens/s"
        self._bar.update(self._task, completed=progress.step, description=what)
        if progress.note:
            self._bar.console.print(f"step {progress.step}: {progress.note}")
        if self._plain and (progress.note or progress.step % 10 == 0):
            left = (progress.steps - progress.step) * progress.seconds_per_step
            note = f", {progress.note}" if progress.note else ""
            click.echo(
                f"step {progress.step}/{progress.steps}: {what}, {left / 60:.1f} min left{note}", err=True
            )

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


@train.command("gate")
@click.argument("pack")
@click.option(
    "--data-dir",
    type=PATH,
    required=True,
    help="Directory with a data file per skill, NAME.jsonl.gz, or with the files of the broad recipes' sources.",
)
@click.option(
    "--none",
    "none_files",
    type=PATH,
    multiple=True,
    help="JSONL of requests in people's own words, for no skill or a named one; repeatable.",
)
@click.option("--out", type=PATH, default=Path("runs/gate"), show_default=True, help="Run directory.")
@click.option("--search", is_flag=True, help="Compare gates on several layers, and use the best.")
@click.option(
    "--continue",
    "further",
    is_flag=True,
    help="Begin with the pack's gate; the best mean of it and the new one is used.",
)
@click.option(
    "--per-skill",
    type=click.IntRange(20),
    help="Prompts per skill.  [default: 300 + 35 per skill of the pack, at most 700]",
)
@click.option("--to", default="", help="Change a copy of this name or directory; by default my-PACK.")
def train_gate(
    pack: str,
    data_dir: Path,
    none_files: tuple[Path, ...],
    out: Path,
    search: bool,
    further: bool,
    per_skill: int | None,
    to: str,
) -> None:
    """Train PACK's gate on prompts of its skills, and write it to the pack.

    After an interruption, the same command resumes.

    A pack that ships with Loramix is not changed: the gate is written to a copy of it, my-PACK.
    """
    fetch_base_of(pack)
    with training_extra():
        from loramix.train.gate import train_gate as work

        lines = work(
            pack, data_dir, none_files, out, search=search, further=further, per_skill=per_skill, to=to
        )
        for line in lines:
            click.echo(line, err=True)
