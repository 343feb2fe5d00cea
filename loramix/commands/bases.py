"""``loramix pull``: base models by name or from the hub."""

from __future__ import annotations

import click


@click.command()
@click.argument("name")
@click.option("--quant", default="", help="Quantization where there are several, e.g. Q4_0.")
@click.option("--revision", default="", help="Branch, tag or commit on the hub.")
@click.option("--sha256", default="", help="What the file must be.")
def pull(name: str, **options: str) -> None:
    """Fetch the base NAME, or OWNER/REPO[:FILE] of the Hugging Face hub."""
    from loramix.models import bases

    click.echo(str(bases.pull(name, **options)))
