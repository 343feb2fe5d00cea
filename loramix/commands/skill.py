"""Commands on one skill of a pack: ``loramix skill add|remove|import``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loramix.commands.fetch_base import fetch_base
from loramix.commands.options import PATH, training_extra
from loramix.commands.train import Display
from loramix.defaults import DEFAULT_PACK

if TYPE_CHECKING:
    from loramix.pack.own import Target

PACK = click.option(
    "--pack", "-p", default=DEFAULT_PACK, show_default=True, help="Pack to change: name or directory."
)
INSTRUCTIONS = click.option(
    "--instructions", type=PATH, help="Phrasings, one per line with {input} in it, or a recipe (TOML)."
)
TO = click.option("--to", default="", help="Change a copy of this name or directory; by default my-NAME.")
BASE_OPTION = click.option(
    "--base", default="", help=f"Base of a new pack: name or GGUF.  [default: {DEFAULT_PACK}]"
)
OUT = click.option("--out", type=PATH, help="Run directory; by default runs/NAME.")
REPLACE = click.option("--replace", is_flag=True, help="Replace a skill of that name.")


@click.group()
def skill() -> None:
    """Add a skill to a pack (needs the extra [train]), or remove one."""


@skill.command("add")
@click.argument("name")
@click.option("--data", type=PATH, required=True, help="JSONL or JSONL.gz of split, input, target.")
@INSTRUCTIONS
@PACK
@TO
@BASE_OPTION
@OUT
@click.option("--max-rows", type=click.IntRange(1), help="Maximum training rows.")
@REPLACE
def skill_add(
    name: str,
    data: Path,
    instructions: Path | None,
    pack: str,
    to: str,
    base: str,
    out: Path | None,
    max_rows: int | None,
    replace: bool,
) -> None:
    """Train NAME, convert it, extend the gate and add it to the pack, all or nothing.

    A pack that ships with Loramix is not changed: the skill is added to a copy of it, my-NAME. A directory that
    does not exist becomes a new pack.

    After an interruption, the same command resumes from the last checkpoint; the pack changes only at the end.
    """
    _add(name, data, instructions, target_of(pack, to, base), out, None, max_rows, replace)


@skill.command("import")
@click.argument("name")
@click.argument("adapter", type=PATH)
@click.option("--examples", type=PATH, required=True, help="JSONL of input and target, to train the gate on.")
@INSTRUCTIONS
@PACK
@TO
@BASE_OPTION
@OUT
@REPLACE
def skill_import(
    name: str,
    adapter: Path,
    examples: Path,
    instructions: Path | None,
    pack: str,
    to: str,
    base: str,
    out: Path | None,
    replace: bool,
) -> None:
    """Import ADAPTER (a PEFT or mlx-lm directory, or a GGUF LoRA) into the pack as NAME.

    The pack is chosen as for 'skill add': a copy of one that ships with Loramix, or a new one.
    """
    _add(name, examples, instructions, target_of(pack, to, base), out, adapter, None, replace)


def target_of(pack: str, to: str, base: str = "", *, make: bool = True) -> Target:
    """Return the pack that a command changes; print a note if it is not the one that was named."""
    from loramix.pack import own

    target = own.target_of(pack, to=to, base=base, make=make)
    if target.note:
        click.echo(target.note, err=True)
    return target


def _add(
    name: str,
    data: Path,
    instructions: Path | None,
    target: Target,
    out: Path | None,
    adapter: Path | None,
    max_rows: int | None,
    replace: bool,
) -> None:
    from loramix.pack.edit import check_skill_name

    check_skill_name(name)
    base = target.pack.manifest.base.name
    fetch_base(base)
    with training_extra(), Display() as display:
        from loramix.train import skill as work
        from loramix.train.data import limited, read_rows
        from loramix.train.default_recipe import recipe_of_data

        if adapter is not None:
            work.check_import(adapter)
        rows = limited(read_rows(data, split="train" if adapter else None), max_rows)
        change = work.add(
            target,
            recipe_of_data(name, rows, instructions, base),
            rows,
            out or Path("runs") / name,
            adapter=adapter,
            report=display.update,
            say=lambda line: click.echo(line, err=True),
            replace_existing=replace,
        )
    click.echo(change.message)
    say_how_to_use(target)


def say_how_to_use(target: Target) -> None:
    """Print how to use a copy that the command line did not name."""
    if target.note and (target.origin or not target.fresh):
        click.echo(f"to use it: loramix run --pack {shlex.quote(target.used_as)} PROMPT", err=True)


@skill.command("remove")
@click.argument("name")
@PACK
@TO
def skill_remove(name: str, pack: str, to: str) -> None:
    """Remove NAME from the pack; the gate then sends its prompts to the bare base.

    A pack that ships with Loramix is not changed: NAME is removed from a copy of it, my-NAME.
    """
    remove(target_of(pack, to, make=False), name)


def remove(target: Target, name: str) -> None:
    """Remove a skill and print the result."""
    from loramix.pack.edit import remove_skill

    with target.changing() as directory:
        change = remove_skill(directory, name)
    click.echo(change.message)
    say_how_to_use(target)
