"""The command ``loramix plan``: predict memory and disk without loading anything."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import click

from loramix.commands.options import CTX
from loramix.defaults import DEFAULT_PACK, MAX_RANK, MAX_SKILLS, RANK

if TYPE_CHECKING:
    from loramix.diagnose.memory_plan import Plan


@click.command()
@click.option("--base", help="Base: name, GGUF, or what was pulled from the hub; by default the pack's.")
@click.option("--pack", "-p", "pack_name", help="Pack: name or directory, for its adapters and its gate.")
@click.option("--skills", type=click.IntRange(0, MAX_SKILLS), help="Number of skills; by default the pack's.")
@click.option(
    "--rank",
    type=click.IntRange(1, MAX_RANK),
    default=RANK,
    show_default=True,
    help="Rank of adapters that are not in a pack.",
)
@CTX
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def plan(
    base: str | None, pack_name: str | None, skills: int | None, rank: int, ctx: int, as_json: bool
) -> None:
    """Predict the memory and disk space needed; exit code 1 if they are not sufficient."""
    from loramix.diagnose.memory_plan import check_fits, make_plan
    from loramix.models import bases
    from loramix.pack.pack import Pack

    # a base without a pack is planned with future adapters
    pack = None if base and not pack_name else Pack.load(pack_name or DEFAULT_PACK)
    name = base or (pack.manifest.base.name if pack else DEFAULT_PACK)
    made = make_plan(
        bases.resolve(name),
        n_ctx=ctx,
        pack=pack,
        n_skills=skills,
        rank=rank,
        repack=os.environ.get("LORAMIX_EXTRA_BUFTS") != "0",
    )
    if as_json:
        click.echo(json.dumps(_to_json(made)))
    else:
        _show(made)
    if note := check_fits(made):
        click.echo(note, err=True)


def _to_json(made: Plan) -> dict[str, object]:
    return {
        "base": made.base,
        "skills": made.n_skills,
        "ctx": made.n_ctx,
        "memory_bytes": made.memory_bytes,
        "disk_bytes": made.disk_bytes,
        "missing_bytes": made.missing_bytes,
        "memory": {part.name: part.size_bytes for part in made.memory},
        "disk": {part.name: part.size_bytes for part in made.disk},
    }


def _show(made: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    from loramix.diagnose.wording import counted, size

    title = f"{made.base}, {counted(made.n_skills, 'skill')}, {made.n_ctx:,} tokens"
    table = Table(title=title, title_justify="left")
    table.add_column("memory")
    table.add_column("", justify="right")
    table.add_column("")
    for part in made.memory:
        if part.size_bytes:
            table.add_row(part.name, size(part.size_bytes), part.note)
    table.add_row("in all", size(made.memory_bytes), style="bold")
    table.add_section()
    for part in made.disk:
        table.add_row(f"disk: {part.name}", size(part.size_bytes), part.note)
    table.add_row("disk in all", size(made.disk_bytes), style="bold")
    console = Console()
    if console.width < 40:  # COLUMNS=0, as without a terminal, prints nothing
        console.width = 80
    console.print(table)
