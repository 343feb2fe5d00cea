"""The commands ``loramix convert adapter``, ``base`` and ``gate``."""

from __future__ import annotations

from pathlib import Path

import click

from loramix.commands.fetch_base import fetch_base
from loramix.commands.options import PATH, training_extra
from loramix.defaults import BASE_QUANTS, DEFAULT_PACK, DEFAULT_QUANT
from loramix.errors import MissingExtra, UsageError
from loramix.models.known_bases import BASES


@click.group()
def convert() -> None:
    """Convert trained adapters, bases and gates to the runtime's formats."""


@convert.command("adapter")
@click.argument("directory", type=PATH)
@click.option("--out", "-o", type=PATH, required=True, help="GGUF LoRA file to write.")
@click.option("--base", default=DEFAULT_PACK, show_default=True, help="Base: name or GGUF.")
@click.option("--outtype", type=click.Choice(["f16", "f32"]), default="f16", show_default=True)
@click.option("--check/--no-check", default=True, show_default=True, help="Compare with PyTorch afterwards.")
def convert_adapter(directory: Path, out: Path, base: str, outtype: str, check: bool) -> None:
    """Convert the PEFT or mlx-lm LoRA in DIRECTORY, and check that llama.cpp gives the same results."""
    from loramix.convert import adapter, peft, selfcheck
    from loramix.models import bases

    fetch_base(base)
    base_path = bases.resolve(base)
    named = base if base in BASES else base_path.name
    adapter.convert_adapter(
        directory,
        base_path,
        out,
        base_name=named,
        base_sha256=bases.digest(base_path),
        outtype=outtype,
    )
    if check:
        try:
            with training_extra(), peft.as_peft(directory) as source:
                found = selfcheck.check(base_path, out, source, exact=False)
            click.echo(
                f"as in PyTorch: mean KL {found.mean_kl:.5f}, same choice at {found.same_argmax:.1%} of positions; "
                f"it moves logits by up to {found.effect:.2f}",
                err=True,
            )
        except MissingExtra as error:
            effect = selfcheck.applied(base_path, out)
            click.echo(f"applied (moves logits by up to {effect:.2f}); {error}", err=True)
    click.echo(str(out))


@convert.command("base")
@click.argument("source", type=PATH)
@click.option("--out", "-o", type=PATH, required=True, help="GGUF file to write.")
@click.option(
    "--quant",
    type=click.Choice(BASE_QUANTS),
    help=f"Type of the matrices; only for a directory.  [default: {DEFAULT_QUANT}]",
)
@click.option("--imatrix-text", type=PATH, help="UTF-8 text for the importance matrix of 4-bit quantization.")
@click.option(
    "--chat-template",
    help="Jinja file to use instead of the base's own chat template; 'plain' for none.",
)
@click.option("--check/--no-check", default=True, show_default=True, help="Compare with PyTorch afterwards.")
def convert_base(
    source: Path,
    out: Path,
    quant: str | None,
    imatrix_text: Path | None,
    chat_template: str | None,
    check: bool,
) -> None:
    """Convert the Hugging Face checkpoint in the directory SOURCE to a GGUF base.

    Checkpoints of Llama, Mistral, Qwen2, Qwen2.5 and Qwen3 are converted.
    SOURCE may be a GGUF base, to copy it with another chat template.
    """
    from loramix.convert import selfcheck
    from loramix.convert.hf.template import given_template
    from loramix.convert.hf.to_gguf import convert_base as work

    template = given_template(chat_template) if chat_template is not None else None
    if source.is_file():
        from loramix.templates.base_template import with_template

        if template is None or quant or imatrix_text:
            raise UsageError(
                f"{source} is a file: a GGUF base is copied with --chat-template FILE and no other option; "
                "give a directory to convert a checkpoint."
            )
        with_template(source, out, template)
        click.echo(str(out))
        return
    quant = quant or DEFAULT_QUANT
    work(source, out, quant, imatrix_text, template)
    if check:
        if n_texts := selfcheck.check_tokens(source, out):
            click.echo(f"cuts {n_texts} texts as its tokenizer.json does", err=True)
        try:
            found = selfcheck.check_base(source, out, quant)
            before, after = found.perplexity
            click.echo(
                f"as in PyTorch: mean KL {found.mean_kl:.5f}, same choice at {found.same_argmax:.1%} of positions, "
                f"perplexity {before:.2f} → {after:.2f} on {found.n_tokens} tokens",
                err=True,
            )
        except MissingExtra as error:
            click.echo(f"runs in llama.cpp, logits are finite; {error}", err=True)
    click.echo(str(out))


@convert.command("gate")
@click.argument("directory", type=PATH)
@click.option("--out", "-o", type=PATH, required=True, help="gate.npz to write.")
def convert_gate(directory: Path, out: Path) -> None:
    """Convert the PyTorch gate of format 1 in DIRECTORY to NumPy, and compare the two.

    'loramix train gate' writes gates of today's format into the pack, without conversion.
    """
    with training_extra():
        from loramix.convert.gate import convert_gate as work

        difference = work(directory, out)
    click.echo(f"largest difference to torch {difference:.1e}", err=True)
    click.echo(str(out))
