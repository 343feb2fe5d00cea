"""Asks on a terminal whether to fetch a base that is not on this machine; a script gets the error as before."""

from __future__ import annotations

import sys

import click


def fetch_base(name: str) -> None:
    """Offer to fetch a base that is missing; where nobody can be asked, or the answer is no, do nothing.

    What opens the base next then says that it is missing, and with which command it is fetched.

    Args:
        name: as `loramix.models.bases.resolve` takes it.

    Raises:
        LoramixError: it was to be fetched, and that failed.
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
    """`fetch_base` for the base of a pack.

    Args:
        pack: name or directory.
    """
    from loramix.pack.pack import Pack

    fetch_base(Pack.load(pack).manifest.base.name)
