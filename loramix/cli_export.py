"""Commands that take skills out of a pack, for other programs: ``loramix export``."""

from __future__ import annotations

from pathlib import Path

import click

from loramix.cli_train import PATH, training_extra


@click.group()
def export() -> None:
    """Take skills out of a pack, for other programs."""


@export.command("peft")
@click.argument("skill")
@click.option("--pack", default="smollm2-135m", show_default=True, help="Pack: name or directory.")
@click.option("--out", "-o", type=PATH, required=True, help="Directory to make.")
def export_peft(skill: str, pack: str, out: Path) -> None:
    """Write the adapter of SKILL as PEFT would have, to train on or to compare."""
    from loramix.convert.validate import read_base
    from loramix.models import bases
    from loramix.pack import Pack

    with training_extra():
        from loramix.convert import peft

        found = Pack.load(pack)
        _, shape = read_base(bases.resolve(found.manifest.base.name))
        peft.export_peft(found.adapter_bytes(skill), shape, out, skill)
    click.echo(str(out))
