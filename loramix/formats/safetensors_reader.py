"""A strict reader of safetensors files into float32 arrays; also rejects NaN and repeated names."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.errors import InvalidArtifact
from loramix.formats.sniff import HEAD, sniff

MAX_HEADER = 100 * 10**6
MAX_TENSORS = 100_000
AGAIN = "copy or download it again"
TRAIN_AGAIN = "training has diverged: use an earlier checkpoint, or train with a lower learning rate"
_QUANTIZED = ("I8", "I32", "U8", "U32", "F4", "F6_", "F8_")
"""Starts of the types of packed and 8-bit weights."""
_DTYPES = {"F64": ("<f8", 8), "F32": ("<f4", 4), "F16": ("<f2", 2), "BF16": ("<u2", 2)}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor's name, type, shape and position in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Position in bytes from the start of the file."""
    nbytes: int


class SafetensorsFile:
    """A file with a validated header, read tensor by tensor; a context manager.

    Args:
        path: a ``.safetensors`` file of F64, F32, F16 or BF16 tensors.

    Raises:
        InvalidArtifact: not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            head = self._file.read(8)
            length = int.from_bytes(head, "little")
            # reject a larger header before reading it; some bytes are needed to identify the file
            head += self._file.read(length if length <= MAX_HEADER else HEAD)
            self.entries = {entry.name: entry for entry in _layout(head, self._size, str(path))}
        except BaseException:
            self._file.close()
            raise

    def chunks(self, name: str, size: int = 1 << 22) -> Iterator[npt.NDArray[Any]]:
        """Yield a tensor's values in order, as stored (BF16 as uint16), at most ``size`` at a time.

        Raises:
            InvalidArtifact: a value is not finite, or the file has become shorter.
        """
        entry = self.entries[name]
        code, width = _DTYPES[entry.dtype]
        at, end = entry.offset, entry.offset + entry.nbytes
        while at < end:
            self._file.seek(at)
            data = self._file.read(min(size * width, end - at))
            if len(data) != min(size * width, end - at):
                raise _bad(str(self.path), f"it ends inside tensor {name!r}", AGAIN)
            at += len(data)
            raw = np.frombuffer(data, code)
            if not finite(raw, entry.dtype):
                raise _bad(str(self.path), f"tensor {name!r} has values that are not finite", TRAIN_AGAIN)
            yield raw

    def close(self) -> None:
        """Close the file; may be called repeatedly."""
        self._file.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def widened(raw: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Return stored values as floats; BF16 is the upper half of a float32, other types are unchanged."""
    return (raw.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else raw


def finite(raw: npt.NDArray[Any], dtype: str) -> bool:
    """Whether all stored values are finite; BF16's exponent is checked in place."""
    return bool(((raw & 0x7F80) != 0x7F80).all() if dtype == "BF16" else np.isfinite(raw).all())


def read_safetensors(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Read all tensors of a file.

    Args:
        path: a ``.safetensors`` file of F64, F32, F16 or BF16 tensors.

    Returns:
        float32 arrays by name.

    Raises:
        InvalidArtifact: not a safetensors file, or a value is not finite.
    """
    return parse_safetensors(path.read_bytes(), str(path))


def parse_safetensors(data: bytes, name: str) -> dict[str, npt.NDArray[np.float32]]:
    """Read all tensors of a file's content; see `read_safetensors`."""
    tensors = dict[str, npt.NDArray[np.float32]]()
    for entry in _layout(data, len(data), name):
        code, width = _DTYPES[entry.dtype]
        raw = np.frombuffer(data, code, entry.nbytes // width, entry.offset)
        if not finite(raw, entry.dtype):
            raise _bad(name, f"tensor {entry.name!r} has values that are not finite", TRAIN_AGAIN)
        with np.errstate(over="ignore"):
            values = widened(raw, entry.dtype).astype(np.float32).reshape(entry.shape)
        if not np.isfinite(values).all():
            raise _bad(name, f"tensor {entry.name!r} has values out of the range of float32")
        tensors[entry.name] = values
    return tensors


def _bad(name: str, why: str, advice: str = "save it again") -> InvalidArtifact:
    return InvalidArtifact(f"{name} is not a usable safetensors file: {why}; {advice}.")


def _layout(data: bytes, size: int, name: str) -> list[Entry]:
    """Check a header and return its tensors in file order.

    Args:
        data: the file's first bytes, with the complete header.
        size: the file's size in bytes.
        name: name of the file, for messages.
    """
    bad = partial(_bad, name)
    if size == 0 or data[8:9] != b"{":
        if wrong := sniff(data[:HEAD], size):
            raise InvalidArtifact(f"{name} is not a usable safetensors file: {wrong}.")
        raise bad("it is too short" if len(data) < 8 else "its header is invalid")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER or length > size - 8:
        raise bad(
            f"its header claims {length} bytes and the file has {size}: it is truncated or damaged", AGAIN
        )
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise bad(f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise bad("its header is not an object")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise bad(f"it claims {len(header)} tensors")
    entries = sorted((_entry(key, value, bad) for key, value in header.items()), key=lambda entry: entry[3])
    end, found = 0, []
    for key, dtype, shape, start, stop in entries:
        if start != end or stop > size - 8 - length:
            cut = start == end and size < 8 + length + max(entry[4] for entry in entries)
            if cut:
                raise bad(f"it ends inside tensor {key!r}: it is truncated", AGAIN)
            raise bad(
                f"tensor {key!r} leaves a gap, overlaps another tensor or ends after the end of the file"
            )
        end = stop
        if math.prod(shape) * _DTYPES[dtype][1] != stop - start:
            raise bad(f"tensor {key!r} of shape {shape} has {stop - start} bytes")
        found.append(Entry(key, dtype, shape, 8 + length + start, stop - start))
    if end != size - 8 - length:
        raise bad("it has bytes that belong to no tensor")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _entry(key: str, value: Any, bad: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    try:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise bad(f"tensor {key!r} lacks dtype, shape or offsets") from None
    numbers = [*shape, start, stop] if isinstance(shape, list) else [None]
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48 for n in numbers):
        raise bad(f"tensor {key!r} has a shape or offsets that are not integers")
    if isinstance(dtype, str) and dtype.startswith(_QUANTIZED):
        raise bad(
            f"tensor {key!r} is {dtype}, as in weights that are quantized already (GPTQ, AWQ, bitsandbytes, FP8)",
            "use the original in full precision",
        )
    if not isinstance(dtype, str) or dtype not in _DTYPES or len(shape) > 8 or stop < start:
        raise bad(
            f"tensor {key!r} is {dtype!r} of {len(shape)} dimensions; F64, F32, F16 and BF16 are supported"
        )
    return key, dtype, tuple(shape), start, stop
