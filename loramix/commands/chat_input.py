"""Input of the terminal chat: single lines, multi-line messages between ``\"\"\"``, and pasted text."""

from __future__ import annotations

import os
import select
import sys

import click

QUOTES = '"""'
_PASTE_S = 0.03
"""Seconds within which a further line counts as part of a paste, since nobody types that fast."""


def read_message(prompt: str = "> ") -> tuple[str, bool]:
    """Read one message or command.

    Args:
        prompt: shown on a terminal.

    Returns:
        The text, stripped, and whether it may be a command: one line that was not quoted.

    Raises:
        EOFError: the input has ended.
        KeyboardInterrupt: the user pressed Ctrl-C.
    """
    line = input(prompt).removeprefix("\ufeff")  # a piped file may begin with a byte-order mark
    if line.lstrip().startswith(QUOTES):
        return _quoted(line.lstrip()[len(QUOTES) :]), False
    lines = [line]
    while not line.startswith("/") and _more_is_here():
        try:
            lines.append(input())
        except EOFError:
            break
    text = "\n".join(lines).strip()
    return text, "\n" not in text


def _quoted(first: str) -> str:
    """Read lines up to the closing quotes; return an empty text if the input ends first."""
    lines = [first]
    while not lines[-1].rstrip().endswith(QUOTES):
        try:
            lines.append(input("... "))
        except EOFError:
            click.echo(f"\nnot sent: the message was not closed with {QUOTES}", err=True)
            return ""
    lines[-1] = lines[-1].rstrip()[: -len(QUOTES)]
    return "\n".join(lines).strip()


def _more_is_here() -> bool:
    """Return whether the terminal has more input ready, as after a paste."""
    if os.name == "nt" or not sys.stdin.isatty():
        return False
    return bool(select.select([sys.stdin], [], [], _PASTE_S)[0])


def enable_line_editing() -> None:
    """Enable line editing and history for ``input``, if readline is available."""
    try:
        import readline  # noqa: F401  # importing it is enough
    except ImportError:
        pass
