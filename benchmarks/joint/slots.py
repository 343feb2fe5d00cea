"""The slots of a run: one adapter each, with its settings, start values and place in a flat vector."""

from __future__ import annotations

import hashlib
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from . import JointError
from .model import MATRICES, SCALING, Adapters, Shape

MAX_RANK = 128
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Slot:
    """One adapter to train."""

    name: str
    """Name of the result's files."""
    skill: str
    """Name of the file of prepared rows."""
    rate: float
    """Highest learning rate."""
    passes: tuple[int, ...] = (0,)
    """Numbers of the prepared passes over the rows, in order."""
    rank: int = 8
    matrices: tuple[str, ...] = MATRICES
    start: Path | None = None
    """GGUF LoRA to continue from, relative to the configuration; by default a new adapter."""
    start_arrays: Mapping[str, npt.NDArray[np.float32]] = field(
        default_factory=dict, repr=False, compare=False
    )
    """Matrices of that adapter, with B for alpha = `SCALING` * rank."""
    start_sha256: str = ""


def read_slots(path: Path) -> list[Slot]:
    """Read a configuration: TOML with a table ``[[slots]]`` for each slot, with the keys of `Slot`.

    A slot with ``start`` and without ``matrices`` trains the matrices of its start.

    Raises:
        JointError: not TOML, unknown keys, wrong values, or a start that cannot be read.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JointError(f"{path} cannot be read as TOML ({error}); fix it.") from None
    entries = content.get("slots")
    if not isinstance(entries, list) or not entries or content.keys() != {"slots"}:
        raise JointError(f"{path} needs a table [[slots]] for each adapter, and nothing else.")
    slots = [_slot(entry, path) for entry in entries]
    names = [slot.name for slot in slots]
    if double := {name for name in names if names.count(name) > 1}:
        raise JointError(f"{path} has two slots {min(double)!r}; rename one of them.")
    return slots


def _slot(entry: dict[str, Any], path: Path) -> Slot:
    def bad(why: str) -> JointError:
        return JointError(f"{path}: slot {str(entry.get('name'))[:64]!r}: {why}.")

    known = {"name", "skill", "rate", "passes", "rank", "matrices", "start"}
    if wrong := entry.keys() - known:
        raise bad(f"unknown key {min(wrong)!r}; use {', '.join(sorted(known))}")
    for key in ("name", "skill"):
        if not isinstance(entry.get(key), str) or not _NAME.fullmatch(entry[key]):
            raise bad(f"{key} needs 1 to 64 of a-z, 0-9, '_' and '-', and a letter or digit first")
    rate, rank = entry.get("rate"), entry.get("rank", 8)
    if not isinstance(rate, float) or not 0 < rate < 1:
        raise bad("rate needs a number between 0 and 1")
    if not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise bad(f"rank needs a number from 1 to {MAX_RANK}")
    passes = entry.get("passes", [0])
    if not isinstance(passes, list) or not passes or not all(isinstance(i, int) and i >= 0 for i in passes):
        raise bad("passes needs a list of numbers of passes, from 0")
    start, digest = None, ""
    arrays: dict[str, npt.NDArray[np.float32]] = {}
    if "start" in entry:
        start = path.parent / str(entry["start"])
        arrays, digest = read_start(start)
    own = {name.split(".")[2] for name in arrays}
    chosen = entry.get("matrices", list(own or MATRICES))
    if not isinstance(chosen, list) or not chosen or not all(name in MATRICES for name in chosen):
        raise bad(f"matrices needs some of {', '.join(MATRICES)}")
    if lost := own - set(chosen):
        raise bad(f"its start has {min(lost)}; add it to matrices")
    if (most := max((a.shape[0] for name, a in arrays.items() if name.endswith("lora_a")), default=0)) > rank:
        raise bad(f"its start has rank {most}; set rank to at least that")
    matrices = tuple(name for name in MATRICES if name in chosen)
    return Slot(entry["name"], entry["skill"], rate, tuple(passes), rank, matrices, start, arrays, digest)


def read_start(path: Path) -> tuple[dict[str, npt.NDArray[np.float32]], str]:
    """Read the matrices of a GGUF LoRA to continue from.

    Returns:
        A (R, in) and B (out, R) by name, B multiplied so that alpha = `SCALING` * R; and the file's SHA-256.

    Raises:
        JointError: not a GGUF LoRA.
    """
    try:
        reader = gguf.GGUFReader(path)
        alpha = float(reader.fields["adapter.lora.alpha"].contents())
        arrays = {
            tensor.name: np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
            for tensor in reader.tensors
        }
        for name in [name for name in arrays if name.endswith(".lora_b")]:
            rank = arrays[name.removesuffix("b") + "a"].shape[0]
            arrays[name] *= np.float32(alpha / rank / SCALING)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise JointError(f"{path} is not a GGUF LoRA ({error}); give one to start from.") from None
    if wrong := [name for name in arrays if not re.fullmatch(r"blk\.\d+\.\w+\.weight\.lora_[ab]", name)]:
        raise JointError(f"{path} has {wrong[0]!r}, which cannot be trained; start from another adapter.")
    return arrays, hashlib.sha256(path.read_bytes()).hexdigest()


class Layout:
    """The places of adapters' matrices in a flat vector, so that adapters are stacked in one tensor.

    Args:
        shape: shape of the base.
        slots: slots of a run; lower ranks and missing matrices are padded with zeros, which stay zeros.
        first: lowest layer with matrices.
    """

    def __init__(self, shape: Shape, slots: Iterable[Slot], first: int) -> None:
        slots = list(slots)
        rank = max(slot.rank for slot in slots)
        self.sizes: dict[str, tuple[int, int]] = {}
        for layer in range(first, shape.n_layer):
            for matrix in MATRICES:
                if any(matrix in slot.matrices for slot in slots):
                    out, width = shape.matrices[matrix]
                    self.sizes[f"blk.{layer}.{matrix}.weight.lora_a"] = rank, width
                    self.sizes[f"blk.{layer}.{matrix}.weight.lora_b"] = out, rank
        self.counts = [math.prod(size) for size in self.sizes.values()]

    def adapters(self, flat: torch.Tensor) -> Adapters:
        """Return the matrices of adapters (S, N), as views."""
        parts = flat.split(self.counts, 1)
        blocks = [part.view(-1, *size) for part, size in zip(parts, self.sizes.values(), strict=True)]
        names = [name.removesuffix(".lora_a") for name in self.sizes][::2]
        return dict(zip(names, zip(blocks[::2], blocks[1::2], strict=True), strict=True))

    def start(self, slot: Slot, seed: int) -> torch.Tensor:
        """Return a slot's adapter before its training, (N,) float32.

        New rows of A are random as in PEFT, B is zero, so that a new adapter changes nothing. The values depend on
        the seed and the slot alone, not on other slots.

        Raises:
            JointError: the slot's start has matrices that do not fit the base or the trained layers.
        """
        rng = np.random.default_rng([seed, *slot.name.encode()])
        blocks = {name: np.zeros(size, np.float32) for name, size in self.sizes.items()}
        for name, block in blocks.items():
            if name.endswith("lora_a") and name.split(".")[2] in slot.matrices:
                width = block.shape[1]
                block[: slot.rank] = rng.uniform(-1, 1, (slot.rank, width)) / math.sqrt(width)
        for name, array in slot.start_arrays.items():
            rows, columns = array.shape
            block = blocks.get(name, np.zeros((0, 0), np.float32))
            if (columns if name.endswith("lora_a") else rows) != block.shape[name.endswith("lora_a")]:
                raise JointError(
                    f"{slot.start} has {name!r} ({rows} x {columns}), which is not among the trained matrices of this "
                    "base; lower --skip-lowest, or use its own base."
                )
            block[:rows, :columns] = array
        return torch.from_numpy(np.concatenate([block.ravel() for block in blocks.values()]))

    def arrays(self, flat: torch.Tensor, slot: Slot) -> dict[str, npt.NDArray[np.float32]]:
        """Return a slot's matrices by name, A (R, in) and B (out, R), from its vector (N,)."""
        found = {}
        for (name, size), part in zip(
            self.sizes.items(), flat.detach().cpu().split(self.counts), strict=True
        ):
            if name.split(".")[2] in slot.matrices:
                block = part.view(size).numpy()
                found[name] = block[: slot.rank] if name.endswith("lora_a") else block[:, : slot.rank]
        return found


def settings(slot: Slot) -> dict[str, Any]:
    """Return a slot's settings for its result's record, as JSON."""
    return {
        "name": slot.name,
        "skill": slot.skill,
        "rate": slot.rate,
        "passes": list(slot.passes),
        "rank": slot.rank,
        "matrices": list(slot.matrices),
        "start": slot.start.name if slot.start else None,
        "start_sha256": slot.start_sha256,
    }
