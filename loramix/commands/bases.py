"""The commands ``loramix bases`` and ``loramix pull``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from loramix.models.base_list import Listed


@click.command("bases")
@click.option("--json", "as_json", is_flag=True, help="A JSON list instead of a table.")
def list_bases(as_json: bool) -> None:
    """List the known bases: size, licence, and where they are on this machine."""
    from loramix.models.base_list import list_bases as find_all

    rows = find_all()
    if as_json:
        click.echo(json.dumps([_json(row) for row in rows]))
        return
    cells = [("base", "architecture", "size", "licence", "on this machine")]
    for row in rows:
        name = row.name + (" (default)" if row.default else "")
        cells.append((name, row.architecture, _size(row.size_bytes), row.license, _where(row)))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for number, (name, architecture, size, license_, where) in enumerate(cells):
        line = (
            f"{name:<{widths[0]}}  {architecture:<{widths[1]}}  {size:>{widths[2]}}  {license_:<{widths[3]}}"
        )
        # the path comes last, unpadded, so that it can be copied from a narrow terminal
        click.echo(click.style(f"{line}  {where}", bold=True if number == 0 else None))
    click.echo("Get one with 'loramix pull NAME', or OWNER/REPO[:FILE] of the Hugging Face hub.", err=True)


@click.command()
@click.argument("name")
@click.option("--quant", default="", help="Quantization, if there are several, e.g. Q4_0.")
@click.option("--revision", default="", help="Branch, tag or commit on the hub.")
@click.option("--sha256", default="", help="Expected SHA-256 of the file.")
def pull(name: str, **options: str) -> None:
    """Download the base NAME (see 'loramix bases'), or OWNER/REPO[:FILE] of the Hugging Face hub."""
    from loramix.models import bases

    click.echo(str(bases.pull(name, **options)))


def _json(row: Listed) -> dict[str, str | int | bool | None]:
    return {
        "name": row.name,
        "architecture": row.architecture or None,
        "size_bytes": row.size_bytes or None,
        "license": row.license or None,
        "path": str(row.path) if row.path else None,
        "ready": row.ready,
        "default": row.default,
    }


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.0f} MB" if n_bytes else ""


def _where(row: Listed) -> str:
    if row.path is None:
        return "in installed wheels" if row.ready else "no"
    return str(row.path) if row.ready else f"{row.path.resolve()}: unusable; delete it, then pull it again"
