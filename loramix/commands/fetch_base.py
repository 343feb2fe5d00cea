"""Offer to fetch a missing base; only on a terminal, so that scripts get the error instead."""

from __future__ import annotations

import sys

import click


def fetch_base(name: str) -> None:
    """Offer to fetch a missing base; do nothing without a terminal or if the user declines.

    Opening the base then fails with an error that names the command to fetch it.

    Args:
        name: argument of `loramix.models.bases.resolve`.

    Raises:
        LoramixError: the download failed.
    """
    from loramix.models import bases

    if not (sys.stdin.isatty() and sys.stderr.isatty()) or bases.is_here(name):
        return
    size = bases.download_bytes(name)
    if size is None:
        return
    question = f"Base {name} is not on this machine. Fetch it now ({max(1, round(size / 1e6)):,} MB)?"
    try:
        wanted = click.confirm(question, default=True, err=True)
    except click.Abort:  # Ctrl-C or Ctrl-D
        click.echo(err=True)
        wanted = False
    if wanted:
        click.echo(f"fetching {name} ...", err=True)
        bases.pull(name)


def fetch_base_of(pack: str) -> None:
    """Offer to fetch the base of a pack; see `fetch_base`.

    Args:
        pack: name or directory of the pack.
    """
    from loramix.pack.pack import Pack

    fetch_base(Pack.load(pack).manifest.base.name)
