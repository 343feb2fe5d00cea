"""Merges a mix into the base's weights, ``W + Σ sᵢ·(αᵢ/rᵢ)·Bᵢ·Aᵢ``, as a GGUF for any llama.cpp.

Each adapted tensor is dequantized, updated and quantized again; other tensors are copied. Activated adapters, which
act on part of the tokens only, cannot be merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.errors import SelfCheckFailed
from loramix.formats.gguf_output import gguf_output
from loramix.formats.gguf_reader import TYPES
from loramix.formats.requantize import architecture_of, copy_metadata, file_type, quantize_q4_0
from loramix.models.fuse import read_pairs
from loramix.paths import need_space

_FLOATS = ("F32", "F16", "BF16")
_SIZES = {name: (block, size) for name, block, size in TYPES.values()}
_CHUNK = 1 << 21  # values processed at once, which bounds the memory of their float32 copies

Delta = tuple[npt.NDArray[Any], npt.NDArray[Any], float]


def merge(
    base: Path,
    parts: Sequence[tuple[bytes, float]],
    out: Path,
    *,
    quant: str | None = None,
    metadata: Mapping[str, str],
) -> None:
    """Write a base with a mix of adapters merged into its weights.

    Args:
        base: a GGUF base validated by `loramix.formats.validate.read_base`.
        parts: contents of GGUF LoRA files validated by ``check_adapter``, with their scales.
        out: the GGUF to write; a temporary file, since a failure leaves part of it.
        quant: one of `EXPORT_QUANTS` for all matrices, see `wanted_type`; by default each keeps its type.
        metadata: strings that are added to the base's metadata or replace its values.

    Raises:
        NoSpace: the disk has too little free space.
        Unsupported: a type that cannot be written.
    """
    import gguf

    reader = gguf.GGUFReader(base)
    deltas: dict[str, list[Delta]] = {}
    for content, scale in parts:
        for target, (a, b, scaling) in read_pairs(content).items():
            deltas.setdefault(target, []).append((a, b, scale * scaling))
    types = {
        tensor.name: wanted_type(tensor.name, _shape(tensor), _own(tensor), quant)
        for tensor in reader.tensors
    }
    sizes = {tensor.name: _nbytes(_shape(tensor), types[tensor.name]) for tensor in reader.tensors}
    need_space(out, reader.data_offset + sum(sizes.values()), "the merged base")
    with gguf_output(out, architecture_of(reader), name="the merged base") as writer:
        copy_metadata(reader, writer, file_type(quant) if quant else None, but=metadata)
        if "general.quantization_version" not in reader.fields:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in metadata.items():
            writer.add_string(key, value)
        for tensor in reader.tensors:
            kind = types[tensor.name]
            shape, dtype = _shape(tensor), {"F32": np.float32, "F16": np.float16}.get(kind, np.uint8)
            if dtype is np.uint8:
                block, size = _SIZES[kind]
                shape = (*shape[:-1], shape[-1] // block * size)
            writer.add_tensor_info(
                tensor.name, shape, np.dtype(dtype), sizes[tensor.name], gguf.GGMLQuantizationType[kind]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            kind, changes = types[tensor.name], deltas.get(tensor.name, [])
            if kind == _own(tensor) and not changes:
                writer.write_tensor_data(tensor.data)
            else:
                writer.write_tensor_data(np.concatenate(list(_rows(tensor, changes, kind))))


def wanted_type(name: str, shape: tuple[int, ...], own: str, quant: str | None) -> str:
    """Select the type that a tensor is written in.

    Args:
        name: name of the tensor.
        shape: its shape, rows first.
        own: its type in the base.
        quant: requested type; None keeps the base's types.

    Returns:
        The base's type if the tensor is not a matrix or no type is requested. Embedding and head lose most with
        four bits, so they keep a quantized type of the base, or become Q8_0. F16 if a row is not a whole number of
        blocks.
    """
    if quant is None or len(shape) != 2 or "norm" in name:
        return own
    wanted = quant
    if quant in ("Q4_0", "Q4_1") and not name.startswith("blk."):
        wanted = "Q8_0" if own in _FLOATS else own
    return wanted if shape[-1] % _SIZES[wanted][0] == 0 else "F16"


def _rows(tensor: Any, deltas: Sequence[Delta], kind: str) -> Iterator[npt.NDArray[Any]]:
    """Yield a tensor's rows in a type with the deltas added, some rows at a time."""
    import gguf

    n_rows, columns = _shape(tensor)
    step = max(1, _CHUNK // columns)
    for start in range(0, n_rows, step):
        part = slice(start, start + step)
        values = gguf.quants.dequantize(tensor.data[part], tensor.tensor_type).astype(np.float32)
        for a, b, factor in deltas:
            values += np.float32(factor) * (b[part].astype(np.float32) @ a.astype(np.float32))
        if not np.isfinite(values).all():
            raise SelfCheckFailed(f"{tensor.name} is not finite under this mix; use smaller scales.")
        yield _pack(values, kind)


def _pack(values: npt.NDArray[np.float32], kind: str) -> npt.NDArray[Any]:
    import gguf

    if kind == "Q4_0":
        return quantize_q4_0(values)
    wanted = gguf.GGMLQuantizationType[kind]
    try:
        packed: npt.NDArray[Any] = gguf.quants.quantize(values, wanted)
    except NotImplementedError:  # k-quants: only llama.cpp can quantize them
        from loramix.runtime.llama.model import quantize_rows

        packed = quantize_rows(values, int(wanted))
    return packed


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(extent) for extent in reversed(tensor.shape))


def _own(tensor: Any) -> str:
    return str(tensor.tensor_type.name)


def _nbytes(shape: tuple[int, ...], kind: str) -> int:
    block, size = _SIZES[kind]
    return int(np.prod(shape, dtype=np.int64)) // block * size
