"""Fuses a mix of adapters into one, with ranks concatenated and scales folded in, at the cost of one adapter.

``Σ sᵢ·(αᵢ/rᵢ)·Bᵢ·Aᵢ`` equals ``(α/R)·B·A`` with the Aᵢ and the scaled Bᵢ concatenated along the rank, up to float32
rounding. llama.cpp spends four graph nodes on each matrix of each adapter, whatever the rank
(src/llama-graph.cpp, ``build_lora_mm``).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from loramix.formats.gguf_reader import (
    ARRAY,
    BLOCK,
    BLOCK_BYTES,
    FLOAT32,
    STRING,
    UINT32,
    GGUFFile,
    read_gguf,
    tensor_values,
)

Q8_0 = 8
_ALIGNMENT = 32
_GGML_TYPES = {"float32": 0, "float16": 1, "uint8": Q8_0}

Quantize = Callable[[npt.NDArray[Any], int], npt.NDArray[np.uint8]]

Value = str | float | tuple[int, ...]


class Half(NamedTuple):
    """A skill's LoRA matrices for one base matrix."""

    a: npt.NDArray[Any]
    """(R, in) floats, or (R, in / 32 * 34) uint8 with rows of Q8_0 blocks."""
    b: npt.NDArray[Any]
    """(out, R) floats."""
    scaling: float
    """alpha / R."""


@dataclass(frozen=True)
class Part:
    """A skill's adapter, read and quantized once for all mixes.

    B stays in floats, because the mix's scale is applied to it and its blocks may span two skills.
    """

    architecture: str
    halves: dict[str, Half]
    """By base tensor."""

    @classmethod
    def read(cls, data: bytes, quantize: Quantize | None = None) -> Part:
        """Read a GGUF LoRA validated by `loramix.formats.validate.check_adapter`.

        Args:
            data: content of the file; with ``quantize`` it is copied, otherwise referenced.
            quantize: see `fuse`.
        """
        file = read_gguf(data, "adapter")
        halves = _halves(data, file)
        if quantize:
            for target, (a, b, scaling) in halves.items():
                a = quantize(a, Q8_0) if a.shape[1] % BLOCK == 0 else a.copy()
                halves[target] = Half(a, b.copy(), scaling)
        return cls(file.metadata["general.architecture"], halves)


def fuse(
    parts: Sequence[tuple[Part | bytes, float]],
    metadata: Mapping[str, Value] | None = None,
    *,
    quantize: Quantize | None = None,
) -> bytes:
    """Fuse several GGUF LoRAs into one.

    Args:
        parts: pairs of an adapter and its scale; GGUF bytes, or the result of `Part.read` with the same
            ``quantize``. Ranks and adapted matrices may differ.
        metadata: additional metadata.
        quantize: quantizes rows of floats to a GGML type (`loramix.runtime.llama.model.quantize_rows`). The result
            is then Q8_0 with ranks padded with zeros to multiples of 32, which is fastest and bit-identical for
            single tokens and batches (measured; docs/performance.md).

    Returns:
        A GGUF LoRA for scale 1. Without ``quantize`` it is float32, or, for a single part at scale 1, in that
        part's type.
    """
    read = [(Part.read(part, quantize) if isinstance(part, bytes) else part, scale) for part, scale in parts]
    stacks: dict[str, list[tuple[Half, float]]] = {}
    for part, scale in read:
        for target, half in part.halves.items():
            stacks.setdefault(target, []).append((half, scale * half.scaling))
    (first, factor), *_ = next(iter(stacks.values()))
    step = BLOCK if quantize else 1
    alpha = factor * padded(first.a.shape[0], step) if len(read) == 1 else float(BLOCK)
    alpha = float(np.float32(alpha))
    tensors: dict[str, npt.NDArray[Any]] = {}
    for target, stack in stacks.items():
        width = padded(sum(half.a.shape[0] for half, _ in stack), step)
        weighed = [(half, weight * width / alpha) for half, weight in stack]
        a, b = _joined(weighed, width)
        tensors[f"{target}.lora_a"] = a
        tensors[f"{target}.lora_b"] = quantize(b, Q8_0) if quantize else b
    return write_lora(read[0][0].architecture, alpha, tensors, metadata)


def read_pairs(data: bytes) -> dict[str, Half]:
    """Read A (R, in), B (out, R) and the scaling of each adapted matrix of a GGUF LoRA.

    Args:
        data: content of a file validated by `loramix.formats.validate.check_adapter`.

    Returns:
        The matrices by base tensor. The scaling is alpha / R, or 1 if the file has no alpha, as in llama.cpp
        (src/llama-adapter.h, ``get_scale``).
    """
    return _halves(data, read_gguf(data, "adapter"))


def _halves(data: bytes, file: GGUFFile) -> dict[str, Half]:
    alpha = file.metadata.get("adapter.lora.alpha")
    found = {}
    for target in dict.fromkeys(name.rpartition(".")[0] for name in file.tensors):
        a, b = (tensor_values(data, file.tensors[f"{target}.lora_{half}"]) for half in "ab")
        found[target] = Half(a, b, 1.0 if alpha is None else float(alpha) / a.shape[0])
    return found


def write_lora(
    architecture: str,
    alpha: float,
    tensors: Mapping[str, npt.NDArray[Any]],
    metadata: Mapping[str, Value] | None = None,
) -> bytes:
    """Build a GGUF LoRA in memory with the metadata that llama.cpp requires.

    Args:
        architecture: architecture of the base.
        alpha: LoRA alpha, which llama.cpp divides by the rank.
        tensors: ``….lora_a`` (R, in) and ``….lora_b`` (out, R), see `write_gguf`.
        metadata: additional metadata.
    """
    needed: dict[str, Value] = {
        "general.type": "adapter",
        "general.architecture": architecture,
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    return write_gguf({**needed, **(metadata or {})}, tensors)


def padded(rank: int, step: int = BLOCK) -> int:
    """Round a rank up to a multiple of ``step``."""
    return -(-rank // step) * step


def _joined(weighed: Sequence[tuple[Half, float]], width: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Concatenate A (R, in) and weighted B (out, R) of one matrix, padded with zeros to rank ``width``."""
    first, weight = weighed[0]
    plain = len(weighed) == 1 and math.isclose(weight, 1.0, rel_tol=1e-7)
    kind = np.result_type(first.a, first.b) if plain else np.dtype(np.float32)
    a_all = np.zeros((width, first.a.shape[1]), np.uint8 if first.a.dtype == np.uint8 else kind)
    b_all = np.empty((first.b.shape[0], width), kind)
    at = 0
    for half, factor in weighed:
        end = at + half.a.shape[0]
        a_all[at:end] = half.a
        if plain:
            b_all[:, :end] = half.b
        else:
            np.multiply(half.b, np.float32(factor), out=b_all[:, at:end])
        at = end
    b_all[:, at:] = 0
    return a_all, b_all


def write_gguf(metadata: Mapping[str, Value], tensors: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Build a GGUF file (version 3) in memory; ``gguf``'s writer needs a path and takes 0.3 s to import.

    Args:
        metadata: strings, floats (written as float32) and tuples (written as uint32 arrays).
        tensors: row-major float32 or float16 arrays; uint8 arrays hold rows of Q8_0 blocks.
    """
    head = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        head.append(_string(key))
        if isinstance(value, str):
            head.append(struct.pack("<I", STRING) + _string(value))
        elif isinstance(value, tuple):
            head.append(struct.pack(f"<IIQ{len(value)}I", ARRAY, UINT32, len(value), *value))
        else:
            head.append(struct.pack("<If", FLOAT32, value))
    offset = 0
    for name, values in tensors.items():
        shape = values.shape[::-1]
        if values.dtype == np.uint8:
            shape = (shape[0] // BLOCK_BYTES * BLOCK, *shape[1:])
        head.append(_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        head.append(struct.pack("<IQ", _GGML_TYPES[values.dtype.name], offset))
        offset += values.nbytes + _padding(values.nbytes)
    pieces: list[Any] = [start := b"".join(head), bytes(_padding(len(start)))]
    for values in tensors.values():
        pieces += [np.ascontiguousarray(values).data.cast("B"), bytes(_padding(values.nbytes))]
    return b"".join(pieces)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _padding(size: int) -> int:
    return -size % _ALIGNMENT
