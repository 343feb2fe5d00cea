"""Converts a quantized GGUF base to another tensor type, with the same bytes on every machine.

llama.cpp's quantizer is faster, but its rounding depends on how it was compiled (fused multiply-add). Element-wise
NumPy does not, so the digest of a derived base can be pinned.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.formats.gguf_output import gguf_output
from loramix.formats.gguf_reader import BLOCK
from loramix.paths import atomic_path

_STEPS = np.linspace(0.80, 1.12, 17, dtype=np.float32)  # candidate widths of the Q4_0 grid, 1 = full range


def quantize_q4_0(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Round a matrix to Q4_0, choosing each block's scale for the least squared error.

    The file format is GGML's (ggml-quants.c, ``quantize_row_q4_0_ref``); the scale search is Loramix's,
    and the value of largest magnitude determines the sign of the scale, as in GGML.

    Args:
        weights: (rows, columns) float32, columns a multiple of 32.

    Returns:
        (rows, columns / 32 * 18) uint8: per block one float16 scale and 16 bytes of nibbles.
    """
    rows, columns = weights.shape
    # shape (32, blocks): sums over a block are 32 ordered additions, independent of the SIMD width
    x = np.ascontiguousarray(weights.reshape(-1, BLOCK).T)
    widest = np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]
    best_error = np.full(widest.shape, np.inf, np.float32)
    best_scale = np.zeros(widest.shape, np.float16)
    for sign in (np.float32(-8), np.float32(8)):
        for step in _STEPS:
            scale = (widest * step / sign).astype(np.float16)
            levels = _levels(x, scale.astype(np.float32))
            error = np.zeros(widest.shape, np.float32)
            for row, level in zip(x, levels, strict=True):
                difference = row - (level - np.float32(8)) * scale.astype(np.float32)
                error += difference * difference
            better = error < best_error
            best_error[better] = error[better]
            best_scale[better] = scale[better]
    final = _levels(x, best_scale.astype(np.float32)).astype(np.uint8)
    nibbles = final[:16] | (final[16:] << 4)
    blocks = np.concatenate([best_scale.view(np.uint8).reshape(-1, 2), nibbles.T], axis=1)
    return np.ascontiguousarray(blocks).reshape(rows, columns // BLOCK * 18)


def _levels(x: npt.NDArray[np.float32], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the nearest of the 16 levels (0..15, zero at 8) of each value, (32, blocks) float32."""
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    levels: npt.NDArray[np.float32] = np.clip(np.floor(x * inverse + np.float32(8.5)), 0, 15)
    return levels


def requantize(
    source: Path,
    out: Path,
    types: dict[str, str],
    *,
    fix: str = "free some space, or write to another disk with --out.",
) -> None:
    """Copy a GGUF base with some of its matrices in another type.

    Args:
        source: a validated GGUF base.
        out: file to write atomically.
        types: new type (``Q4_0`` or ``Q8_0``) by tensor-name prefix; the longest prefix wins.
        fix: how to free space, for the message.

    Raises:
        NoSpace: the disk is full.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    with (
        atomic_path(out) as temporary,
        gguf_output(temporary, architecture_of(reader), name=str(out), fix=fix) as writer,
    ):
        copy_metadata(reader, writer, file_type(types.get("blk.", "Q4_0")))
        for tensor in reader.tensors:
            kind = _wanted(tensor.name, types)
            if kind is None or kind == tensor.tensor_type.name or len(tensor.shape) < 2:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
                continue
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            wanted = gguf.GGMLQuantizationType[kind]
            packed = quantize_q4_0(values) if kind == "Q4_0" else gguf.quants.quantize(values, wanted)
            writer.add_tensor(tensor.name, packed, raw_dtype=wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _wanted(name: str, types: dict[str, str]) -> str | None:
    matches = [prefix for prefix in types if name.startswith(prefix)]
    return types[max(matches, key=len)] if matches else None


def file_type(kind: str) -> int:
    """Return ``general.file_type`` of a file with matrices of one type (llama.h, ``llama_ftype``)."""
    import gguf

    return int(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])


def architecture_of(reader: Any) -> str:
    """Name of the architecture of the base that a ``gguf.GGUFReader`` reads."""
    return str(reader.fields["general.architecture"].contents())


def copy_metadata(reader: Any, writer: Any, file_type: int | None = None, but: Collection[str] = ()) -> None:
    """Copy a GGUF file's metadata.

    Args:
        reader: ``gguf.GGUFReader`` of the source.
        writer: ``gguf.GGUFWriter`` of the new file.
        file_type: new value of ``general.file_type``, if the source has this key.
        but: keys to omit.
    """
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in but:
            continue
        value = field.contents()
        if key == "general.file_type" and file_type is not None:
            value = file_type
        if key == "general.alignment":
            writer.data_alignment = int(value)
        writer.add_key_value(key, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
