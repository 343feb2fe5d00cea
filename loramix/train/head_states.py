"""The states that an early head is trained on: of all tokens of all prompts, in memory-mapped files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from loramix.runtime.state_parts import PART, part_file

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
SAMPLE = 3000  # prompts whose states give the mean and the standard deviation
NEIGHBOURS = 20  # batches that are sorted by length together


class Rows(Protocol):
    """States of all tokens at a layer, (tokens, width): an array, or an object that reads parts of one."""

    def __getitem__(self, part: slice) -> npt.NDArray[Any]:
        """Some of the tokens."""


class Joined:
    """Several arrays concatenated; a slice must be within one of them.

    Args:
        parts: (tokens, width) each.
    """

    def __init__(self, parts: Sequence[npt.NDArray[Any]]) -> None:
        self._parts = list(parts)
        self._begins = np.cumsum([0, *(len(part) for part in parts)])

    def __getitem__(self, part: slice) -> npt.NDArray[Any]:
        """Some of the tokens."""
        i = int(np.searchsorted(self._begins, part.start, "right")) - 1
        begin = int(self._begins[i])
        found: npt.NDArray[Any] = self._parts[i][part.start - begin : part.stop - begin]
        return found


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of prompts, padded to the longest."""

    states: torch.Tensor
    """(B, T, width x layers) float32."""
    places: torch.Tensor
    """(B, T) int64: which token of its prompt each is."""
    lengths: torch.Tensor
    """(B,) int64."""
    tags: torch.Tensor
    """(B, T) int64; -1: not known."""
    targets: torch.Tensor
    """(B, K + 1) float32."""


@dataclass(frozen=True)
class TokenStates:
    """Prompts of a training as the head reads them."""

    layers: Sequence[Rows]
    lengths: Ints
    """(B,) tokens of each prompt."""
    targets: Floats
    """(B, K + 1), rows sum to 1; the last column is the base."""
    tags: npt.NDArray[np.int8]
    """(tokens,); -1: not known."""

    @classmethod
    def load(cls, directory: Path, layers: Sequence[int], targets: Floats) -> TokenStates:
        """Map what `loramix.runtime.token_states` wrote.

        Args:
            directory: of the parts.
            layers: those that are read, side by side in this order.
            targets: of each request.
        """
        lengths, tags = [], []
        parts: dict[int, list[npt.NDArray[Any]]] = {layer: [] for layer in layers}
        for number in range(-(-len(targets) // PART)):
            with np.load(part_file(directory, number, "tokens"), allow_pickle=False) as archive:
                lengths.append(archive["lengths"])
                tags.append(archive["tags"])
            for layer in layers:
                path = part_file(directory, number, f"L{layer}")
                parts[layer].append(np.load(path, mmap_mode="r", allow_pickle=False))
        rows = [Joined(parts[layer]) for layer in layers]
        return cls(rows, np.concatenate(lengths), targets, np.concatenate(tags))

    @cached_property
    def starts(self) -> Ints:
        """(B,) first token of each prompt."""
        found: Ints = np.cumsum(self.lengths) - self.lengths
        return found

    def standard(self, rows: Ints) -> tuple[Floats, Floats]:
        """Mean and standard deviation (width x layers,) over some prompts' tokens without the first one, an outlier."""
        starts, chosen = self.starts, np.sort(rows[:SAMPLE])
        total = square = np.zeros(1)
        count = 0
        for i in chosen.tolist():
            a, b = int(starts[i]) + 1, int(starts[i] + self.lengths[i])
            if a == b:
                continue
            part = np.concatenate([layer[a:b] for layer in self.layers], 1).astype(np.float64)
            total, square, count = total + part.sum(0), square + np.square(part).sum(0), count + b - a
        mean = total / max(count, 1)
        std = np.sqrt(np.maximum(square / max(count, 1) - np.square(mean), 0)).clip(1e-4)
        return mean.astype(np.float32), std.astype(np.float32)

    def batch(self, rows: Ints, *, dropped: float = 0.0, rng: np.random.Generator | None = None) -> Batch:
        """A batch of some prompts, without a random share of their tokens; the last token is always kept."""
        starts, lengths = self.starts, self.lengths
        kept = [np.arange(lengths[row]) for row in rows]
        if rng is not None:
            kept = [part[(rng.random(len(part)) >= dropped) | (part == len(part) - 1)] for part in kept]
        counts = np.asarray([len(part) for part in kept], np.int64)
        shape = (len(rows), int(counts.max()))
        states = np.zeros((*shape, sum(layer[0:1].shape[1] for layer in self.layers)), np.float32)
        tags, places = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
        for i, (row, part) in enumerate(zip(rows.tolist(), kept, strict=True)):
            begin, end, at = int(starts[row]), int(starts[row] + lengths[row]), 0
            for layer in self.layers:
                values = layer[begin:end]
                states[i, : len(part), at : at + values.shape[1]] = values[part]
                at += values.shape[1]
            tags[i, : len(part)], places[i, : len(part)] = self.tags[begin:end][part], part
        return Batch(
            torch.from_numpy(states),
            torch.from_numpy(places),
            torch.from_numpy(counts),
            torch.from_numpy(tags),
            torch.from_numpy(self.targets[rows]),
        )

    def by_length(self, rows: Ints, size: int) -> Iterator[tuple[Ints, Batch]]:
        """Batches of some prompts, shortest first: their places in ``rows``, and the batch with all tokens."""
        order = np.argsort(self.lengths[rows], kind="stable")
        for at in range(0, len(rows), size):
            part = order[at : at + size]
            yield part, self.batch(rows[part])

    def batches(self, rows: Ints, size: int, rng: np.random.Generator) -> Iterator[Ints]:
        """All of some prompts in random order, those of similar length together."""
        rows, found = rng.permutation(rows), []
        for at in range(0, len(rows), size * NEIGHBOURS):
            part = rows[at : at + size * NEIGHBOURS]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            found += [part[k : k + size] for k in range(0, len(part), size)]
        for i in rng.permutation(len(found)):
            yield found[i]
