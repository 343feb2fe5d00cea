"""Commands on one skill of a pack: ``loramix skill add|remove|import``."""

from __future__ import annotations

from pathlib import Path

import click

from loramix import DEFAULT
from loramix.cli_train import PATH, Display, training_extra

PACK = click.option("--pack", "-p", default=DEFAULT, show_default=True, help="Pack: name or directory.")
INSTRUCTIONS = click.option(
    "--instructions", type=PATH, help="Ways to ask, one a line with {input} in it, or a recipe (TOML)."
)
OUT = click.option("--out", type=PATH, help="Run directory; by default runs/NAME.")
REPLACE = click.option("--replace", is_flag=True, help="Take the place of a skill of that name.")


@click.group()
def skill() -> None:
    """Add a skill to a pack (needs the extra [train]), or take one out."""


@skill.command("add")
@click.argument("name")
@click.option("--data", type=PATH, required=True, help="JSONL or JSONL.gz of split, input, target.")
@INSTRUCTIONS
@PACK
@OUT
@click.option("--max-rows", type=click.IntRange(1), help="Use at most so many training rows.")
@REPLACE
def skill_add(
    name: str,
    data: Path,
    instructions: Path | None,
    pack: str,
    out: Path | None,
    max_rows: int | None,
    replace: bool,
) -> None:
    """Train NAME, convert it, teach it to the gate, and put it into the pack, all or nothing.

    Killed, the same command goes on from the last checkpoint; the pack stays as it was until the end.
    """
    _add(name, data, instructions, pack, out, None, max_rows, replace)


@skill.command("import")
@click.argument("name")
@click.argument("adapter", type=PATH)
@click.option("--examples", type=PATH, required=True, help="JSONL of input and target, to teach the gate.")
@INSTRUCTIONS
@PACK
@OUT
@REPLACE
def skill_import(
    name: str,
    adapter: Path,
    examples: Path,
    instructions: Path | None,
    pack: str,
    out: Path | None,
    replace: bool,
) -> None:
    """Put somebody's ADAPTER (a PEFT or mlx-lm directory, or a GGUF LoRA) into the pack as NAME."""
    _add(name, examples, instructions, pack, out, adapter, None, replace)


def _add(
    name: str,
    data: Path,
    instructions: Path | None,
    pack: str,
    out: Path | None,
    adapter: Path | None,
    max_rows: int | None,
    replace: bool,
) -> None:
    from loramix.pack import Pack
    from loramix.pack_edit import check_skill_name

    check_skill_name(name)
    opened = Pack.load(pack)
    with training_extra(), Display() as display:
        from loramix.train import skill as work
        from loramix.train.data import limited, read_rows
        from loramix.train.own_recipe import recipe_of_data

        if adapter is not None:
            work.check_import(adapter)
        rows = limited(read_rows(data, split="train" if adapter else None), max_rows)
        change = work.add(
            opened.directory,
            recipe_of_data(name, rows, instructions, opened.manifest.base.name),
            rows,
            out or Path("runs") / name,
            adapter=adapter,
            report=display.update,
            say=lambda line: click.echo(line, err=True),
            replace_existing=replace,
        )
    click.echo(change.message)


@skill.command("remove")
@click.argument("name")
@PACK
def skill_remove(name: str, pack: str) -> None:
    """Take NAME out of the pack; what the gate would have sent to it goes to the bare base."""
    from loramix.pack import Pack
    from loramix.pack_edit import remove_skill

    click.echo(remove_skill(Pack.load(pack).directory, name).message)
