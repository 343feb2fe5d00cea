"""Where the states of a training's prompts are: files of `PART` conversations each. Imports no native code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PART = 250
Turns = Sequence[tuple[str, Sequence[tuple[str, int]]]]
"""Of each message its role and its pieces, with their tags."""


def part_file(directory: Path, number: int, what: str) -> Path:
    """A file of a part: ``tokens`` (written last) or ``L4``, the states at the input of layer 4."""
    return directory / f"{number:05}.{what}.{'npz' if what == 'tokens' else 'npy'}"
