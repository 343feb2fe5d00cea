"""A strict reader of safetensors files into float32 arrays; refuses what the library lets pass (NaN, repeats)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.errors import InvalidArtifact

MAX_HEADER = 100 * 10**6
MAX_TENSORS = 100_000
_DTYPES = {"F64": ("<f8", 8), "F32": ("<f4", 4), "F16": ("<f2", 2), "BF16": ("<u2", 2)}


def read_safetensors(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Read all tensors of a file.

    Args:
        path: a ``.safetensors`` file of F64, F32, F16 or BF16 tensors.

    Returns:
        float32 arrays by name.

    Raises:
        InvalidArtifact: not such a file, or a value that is not finite.
    """
    return parse_safetensors(path.read_bytes(), str(path))


def parse_safetensors(data: bytes, name: str) -> dict[str, npt.NDArray[np.float32]]:
    """Read all tensors of a file's content; see `read_safetensors`."""

    def bad(why: str) -> InvalidArtifact:
        return InvalidArtifact(f"{name} is not a usable safetensors file: {why}; save it again.")

    if data[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") or data[:4] == b"PK\x03\x04":
        raise bad("it is a pickle under another name, which can run code")
    if len(data) < 8:
        raise bad("it is too short")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER or length > len(data) - 8:
        raise bad(f"its header claims {length} bytes")
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
    body = memoryview(data)[8 + length :]
    end, tensors = 0, dict[str, npt.NDArray[np.float32]]()
    for key, dtype, shape, start, stop in entries:
        if start != end or stop > len(body):
            raise bad(f"tensor {key!r} leaves a hole, overlaps another or ends beyond the file")
        end = stop
        code, width = _DTYPES[dtype]
        count = 1
        for extent in shape:
            count *= extent
        if count * width != stop - start:
            raise bad(f"tensor {key!r} of shape {shape} has {stop - start} bytes")
        raw = np.frombuffer(body[start:stop], code)
        if dtype == "BF16":  # the upper half of a float32
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        if not np.isfinite(raw).all():
            raise bad(f"tensor {key!r} holds values that are not finite")
        with np.errstate(over="ignore"):
            values = raw.astype(np.float32).reshape(shape)
        if not np.isfinite(values).all():
            raise bad(f"tensor {key!r} holds values beyond float32")
        tensors[key] = values
    if end != len(body):
        raise bad("it has bytes that no tensor owns")
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _entry(key: str, value: Any, bad: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    try:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise bad(f"tensor {key!r} lacks dtype, shape or offsets") from None
    numbers = [*shape, start, stop] if isinstance(shape, list) else [None]
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48 for n in numbers):
        raise bad(f"tensor {key!r} has a shape or offsets that are no plain numbers")
    if not isinstance(dtype, str) or dtype not in _DTYPES or len(shape) > 8 or stop < start:
        raise bad(f"tensor {key!r} is {dtype!r} of {len(shape)} dimensions; F64, F32, F16 and BF16 are known")
    return key, dtype, tuple(shape), start, stop
