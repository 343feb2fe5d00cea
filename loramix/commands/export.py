"""The commands ``loramix export peft``, ``adapter``, ``gguf`` and ``ollama``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loramix.commands.fetch_base import fetch_base_of
from loramix.commands.options import CTX, PACK, PATH, training_extra
from loramix.defaults import EXPORT_QUANTS

if TYPE_CHECKING:
    from loramix.convert.export import Distance

MIX = click.option("--mix", "-m", required=True, help="Mix to export: 'sentiment=0.7,summarize=0.3'.")
QUANT = click.option(
    "--quant", type=click.Choice(EXPORT_QUANTS), help="Type of the matrices; by default the base's own."
)


def out_option(what: str) -> Callable[[Any], Any]:
    """Build the option for the output path."""
    return click.option("--out", "-o", type=PATH, required=True, help=what)


@click.group()
def export() -> None:
    """Export skills of a pack for other programs."""


@export.command("peft")
@click.argument("skill")
@PACK
@out_option("Directory to create.")
def export_peft(skill: str, pack: str, out: Path) -> None:
    """Write the adapter of SKILL in PEFT's format, to continue training or to compare."""
    from loramix.formats.validate import read_base
    from loramix.models import bases
    from loramix.pack.pack import Pack

    fetch_base_of(pack)
    with training_extra():
        from loramix.convert import peft

        found = Pack.load(pack)
        _, shape = read_base(bases.resolve(found.manifest.base.name))
        peft.export_peft(found.adapter_bytes(skill), shape, out, skill)
    click.echo(str(out))


@export.command("adapter")
@MIX
@PACK
@out_option("GGUF LoRA file to write.")
def export_adapter(mix: str, pack: str, out: Path) -> None:
    """Write a mix as one GGUF LoRA, e.g. for ``llama-server --lora FILE``; its scale is 1."""
    from loramix.convert.export import choose
    from loramix.convert.export import export_adapter as work

    fetch_base_of(pack)
    work(choose(pack, mix), out)
    click.echo(str(out))


@export.command("gguf")
@MIX
@PACK
@QUANT
@out_option("GGUF file to write.")
def export_gguf(mix: str, pack: str, quant: str | None, out: Path) -> None:
    """Merge a mix into the base's weights, and compare the result with the running mix."""
    from loramix.convert.export import choose
    from loramix.convert.export import export_gguf as work

    fetch_base_of(pack)
    _report(work(choose(pack, mix), out, quant))
    click.echo(str(out))


@export.command("ollama")
@MIX
@PACK
@QUANT
@CTX
@out_option("Directory to create.")
def export_ollama(mix: str, pack: str, quant: str | None, ctx: int, out: Path) -> None:
    """Write a merged base with an Ollama Modelfile; routing is not exported."""
    from loramix.convert.export import choose
    from loramix.convert.ollama import export_ollama as work

    fetch_base_of(pack)
    _report(work(choose(pack, mix), out, quant=quant, n_ctx=ctx))
    click.echo(f"routing is not exported: ollama create NAME -f {out / 'Modelfile'}", err=True)
    click.echo(str(out))


def _report(found: Distance) -> None:
    click.echo(
        f"KL to the running mix {found.mean_kl:.5f} nats a token (the bare base {found.bare_kl:.5f}); same choice at "
        f"{found.same_argmax:.1%} of positions",
        err=True,
    )
