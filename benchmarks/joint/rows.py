"""Prepared rows of a skill, packed into sequences of one length so that no row sees another.

The format of the file is written by ``prepare``; token ids are the runtime's. Knows nothing of adapters.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from . import JointError

OPEN = 40
"""Sequences that are filled at the same time; more of them leave fewer gaps and take longer."""


@dataclass(frozen=True)
class Rows:
    """Tokenized rows of one split or of one pass over the training rows."""

    ids: Sequence[npt.NDArray[np.int32]]
    """Prompt and answer of each row, (T,)."""
    answers: npt.NDArray[np.int32]
    """Number of tokens of each row's answer, at its end."""
    labels: npt.NDArray[np.int32] | None = None
    """Number of each row's label, -1 if it has none; None for skills without labels."""
    sources: npt.NDArray[np.int32] | None = None
    """Number of each row's source in `source_names`."""
    source_names: tuple[str, ...] = ()

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each row."""
        return [len(row) for row in self.ids]


PackedSequence: TypeAlias = tuple[Rows, list[int]]
"""The numbers of the rows in one sequence."""


@dataclass(frozen=True)
class SkillRows:
    """The prepared rows of a skill."""

    passes: tuple[Rows, ...]
    dev: Rows
    test: Rows | None
    labels: tuple[str, ...]
    """Empty for skills that answer in free text."""
    label_tokens: npt.NDArray[np.int32]
    """First token of each label, all different."""
    base_sha256: str
    """Of the base whose tokenizer made the ids."""
    digest: str
    """SHA-256 of the file."""


def read_skill(path: Path) -> SkillRows:
    """Read a file of ``prepare``.

    Raises:
        JointError: the file is missing or damaged.
    """
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        with path.open("rb") as file, np.load(file) as stored:  # never unpickles
            arrays = {name: stored[name] for name in stored.files}
        count = sum(name.startswith("pass") and name.endswith(".ids") for name in arrays)
        return SkillRows(
            passes=tuple(_rows(arrays, f"pass{number}") for number in range(count)),
            dev=_rows(arrays, "dev"),
            test=_rows(arrays, "test") if "test.ids" in arrays else None,
            labels=tuple(map(str, arrays["labels"])),
            label_tokens=arrays["label_tokens"],
            base_sha256=str(arrays["base_sha256"]),
            digest=digest,
        )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise JointError(f"{path} has no prepared rows ({error}); make it with joint.prepare.") from None


def _rows(arrays: Mapping[str, Any], name: str) -> Rows:
    lengths, ids = arrays[f"{name}.lengths"], arrays[f"{name}.ids"]
    return Rows(
        ids=np.split(ids, np.cumsum(lengths)[:-1]),
        answers=arrays[f"{name}.answers"],
        labels=arrays.get(f"{name}.labels"),
        sources=arrays.get(f"{name}.sources"),
        source_names=tuple(map(str, arrays.get(f"{name}.source_names", ()))),
    )


def pack(lengths: Sequence[int], order: Sequence[int], limit: int) -> list[list[int]]:
    """Put rows into as few sequences as a first fit finds.

    Args:
        lengths: tokens of each row, at most ``limit``.
        order: numbers of the rows, in the order in which they are placed.
        limit: tokens of a sequence.

    Returns:
        Numbers of the rows of each sequence; each row is in one of them.
    """
    full: list[list[int]] = []
    open_: list[tuple[int, list[int]]] = []  # tokens and rows
    for row in order:
        for i, (size, rows) in enumerate(open_):
            if size + lengths[row] <= limit:
                open_[i] = size + lengths[row], [*rows, row]
                break
        else:
            open_.append((lengths[row], [row]))
        if len(open_) > OPEN:
            longest = max(range(len(open_)), key=lambda i: open_[i][0])
            full.append(open_.pop(longest)[1])
    return full + [rows for _, rows in open_]


def training_sequences(
    skill: SkillRows, passes: Sequence[int], limit: int, seed: int
) -> list[PackedSequence]:
    """Pack the rows of some passes, each in a random order of its own.

    Args:
        skill: prepared rows.
        passes: numbers of the passes, in order.
        limit: tokens of a sequence.
        seed: seed of the order.
    """
    found: list[PackedSequence] = []
    for number in passes:
        rows = skill.passes[number]
        order = np.random.default_rng([seed, number]).permutation(len(rows.ids))
        found += [(rows, numbers) for numbers in pack(rows.lengths, order.tolist(), limit)]
    return found


def evaluation_sequences(rows: Rows, limit: int) -> list[PackedSequence]:
    """Pack rows from the longest to the shortest, which leaves the fewest gaps."""
    order = np.argsort([-length for length in rows.lengths], kind="stable")
    return [(rows, numbers) for numbers in pack(rows.lengths, order.tolist(), limit)]


@dataclass(frozen=True)
class Batch:
    """Packed sequences as tensors (B, T)."""

    ids: torch.Tensor
    """int64; 0 in padding."""
    positions: torch.Tensor
    """int32, position of each token in its row."""
    segments: torch.Tensor
    """int32, number of each token's row in its sequence; -1 in padding."""
    targets: torch.Tensor
    """int64, the next token where it is a token of an answer, else -100."""
    starts: torch.Tensor
    """int32, number of the row whose answer begins with the next token, else -1."""


def collate(sequences: Sequence[PackedSequence], limit: int, device: torch.device) -> Batch:
    """Return sequences as tensors, padded on the right to ``limit`` tokens."""
    shape = len(sequences), limit
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int32)
    segments, starts = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
    targets = np.full(shape, -100, np.int64)
    for b, (rows, numbers) in enumerate(sequences):
        begin = 0
        for segment, number in enumerate(numbers):
            row, n_answer = rows.ids[number], int(rows.answers[number])
            end = begin + len(row)
            ids[b, begin:end] = row
            positions[b, begin:end] = np.arange(len(row))
            segments[b, begin:end] = segment
            targets[b, end - n_answer - 1 : end - 1] = row[-n_answer:]
            starts[b, end - n_answer - 1] = number
            begin = end
    tensors = (torch.from_numpy(array).to(device) for array in (ids, positions, segments, targets, starts))
    return Batch(*tensors)
