"""A strict reader of GGUF headers that checks every count, length and offset before it uses it.

Covers the format only (ggml, docs/gguf.md, versions 2 and 3, little endian); `validate` checks the content of
bases and adapters. Native code reads a file only after this reader has accepted it.
"""

from __future__ import annotations

import itertools
import mmap
import struct
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from loramix.errors import InvalidArtifact
from loramix.formats.sniff import HEAD, sniff

Buffer: TypeAlias = bytes | mmap.mmap
MAX_TENSORS = 100_000
MAX_KEYS = 100_000
MAX_STRING = 1 << 20
MAX_NAME = 64

# ggml type: (name, values per block, bytes per block); ggml.h and ggml-common.h
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
BLOCK, BLOCK_BYTES = TYPES[8][1:]
"""Values of a block of Q8_0 or Q4_0, and bytes of one of Q8_0."""
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
MAX_KEPT = 64
UINT32, INT32, FLOAT32, STRING, ARRAY = 4, 5, 6, 8, 9


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's name, shape, type and position in the file."""

    name: str
    shape: tuple[int, ...]
    """NumPy order: rows first, the reverse of ggml's ``ne``."""
    type_name: str
    offset: int
    """Position in bytes from the start of the file."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """A checked metadata array; its values are kept only if it is a short array of uint32."""

    element_type: int
    length: int
    values: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A GGUF header: metadata with value types, and tensors by name."""

    name: str
    version: int
    alignment: int
    metadata: dict[str, Any]
    types: dict[str, int]
    tensors: dict[str, TensorInfo] = field(repr=False)
    data_offset: int = 0


class _Cursor:
    """Reads numbers and strings, and rejects reads beyond the end of the file."""

    def __init__(self, data: Buffer, name: str, advice: str) -> None:
        self.data, self.name, self.at, self.size, self.advice = data, name, 0, len(data), advice

    def bad(self, why: str) -> InvalidArtifact:
        return InvalidArtifact(f"{self.name} is not a usable GGUF file: {why}; {self.advice}.")

    def skip(self, count: int, what: str) -> int:
        """Skip ``count`` bytes; return their position."""
        start = self.at
        if count > self.size - start:
            raise self.bad(f"it ends inside {what}")
        self.at = start + count
        return start

    def number(self, form: str, what: str) -> Any:
        start = self.skip(struct.calcsize(form), what)
        return struct.unpack_from(form, self.data, start)[0]

    def string(self, what: str, limit: int = MAX_STRING) -> str:
        length = self.number("<Q", what)
        if length > limit:
            raise self.bad(f"{what} claims {length} bytes, at most {limit} are allowed")
        start = self.skip(length, what)
        try:
            return bytes(self.data[start : start + length]).decode("utf-8")
        except UnicodeDecodeError:
            raise self.bad(f"{what} is not UTF-8") from None


def read_gguf(data: Buffer, name: str, advice: str = "get or convert it again") -> GGUFFile:
    """Read and check a GGUF header.

    Args:
        data: content of the file, in memory or mapped.
        name: name of the file, for messages.
        advice: fix for a damaged file, for messages.

    Raises:
        InvalidArtifact: the header is not safe to load in llama.cpp.
    """
    cursor = _Cursor(data, name, advice)
    if bytes(data[:4]) != b"GGUF":
        if wrong := sniff(bytes(data[:HEAD]), len(data)):
            raise InvalidArtifact(
                f"{name} is not a usable GGUF file: it begins with {bytes(data[:4])!r}, {wrong}."
            )
        raise cursor.bad(f"it begins with {bytes(data[:4])!r}, not 'GGUF'")
    cursor.at = 4
    version = cursor.number("<I", "the version")
    if version in (2 << 24, 3 << 24):
        raise cursor.bad("it is big-endian, and only little-endian files are supported")
    if version not in (2, 3):
        raise cursor.bad(f"its version is {version}, 2 and 3 are supported")
    n_tensors = cursor.number("<Q", "the tensor count")
    n_keys = cursor.number("<Q", "the key count")
    if n_tensors > MAX_TENSORS or n_keys > MAX_KEYS:
        raise cursor.bad(f"it claims {n_tensors} tensors and {n_keys} keys")
    metadata, types = _read_metadata(cursor, n_keys)
    alignment = metadata.get("general.alignment", 32)
    if "general.alignment" in types and types["general.alignment"] != UINT32:
        raise cursor.bad("general.alignment is not a uint32")
    if not 8 <= alignment <= 65536 or alignment & (alignment - 1):
        raise cursor.bad(f"its alignment is {alignment}")
    raw = [_read_tensor(cursor) for _ in range(n_tensors)]
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for tensor in raw:
        if tensor.name in tensors:
            raise cursor.bad(f"tensor {tensor.name!r} occurs twice")
        if tensor.offset % alignment:
            raise cursor.bad(f"tensor {tensor.name!r} is not aligned")
        placed = TensorInfo(tensor.name, tensor.shape, tensor.type_name, start + tensor.offset, tensor.nbytes)
        if placed.offset + placed.nbytes > cursor.size:
            raise cursor.bad(f"tensor {tensor.name!r} ends after the end of the file, which is truncated")
        tensors[tensor.name] = placed
    ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for before, after in itertools.pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise cursor.bad(f"tensors {before.name!r} and {after.name!r} overlap")
    return GGUFFile(name, version, alignment, metadata, types, tensors, start)


def tensor_values(data: Buffer, tensor: TensorInfo) -> npt.NDArray[Any]:
    """Read a tensor's values in its shape: float32, or float16 as stored.

    Args:
        data: content of the file.
        tensor: an F32, F16, BF16 or Q8_0 tensor with rows of complete blocks.
    """
    raw = np.frombuffer(data, np.uint8, tensor.nbytes, tensor.offset)
    if tensor.type_name == "Q8_0":
        blocks = raw.reshape(-1, 34)
        scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
        with np.errstate(invalid="ignore"):  # the caller checks for values that are not finite
            found: npt.NDArray[Any] = scale * blocks[:, 2:].view(np.int8)
    elif tensor.type_name == "BF16":  # the upper 16 bits of a float32
        found = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        found = raw.view({"F32": "<f4", "F16": "<f2"}[tensor.type_name])
    return found.reshape(tensor.shape)


def _read_metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Any], dict[str, int]]:
    metadata: dict[str, Any] = {}
    types: dict[str, int] = {}
    for _ in range(count):
        key = cursor.string("a key", 65_535)
        if not key or key in metadata:
            raise cursor.bad(f"key {key[:60]!r} is empty or occurs twice")
        kind = cursor.number("<I", f"the type of {key[:60]!r}")
        types[key] = kind
        if kind == STRING:
            metadata[key] = cursor.string(f"the value of {key[:60]!r}")
        elif kind == ARRAY:
            metadata[key] = _skip_array(cursor, key[:60])
        elif kind in _SCALARS:
            metadata[key] = cursor.number(_SCALARS[kind], f"the value of {key[:60]!r}")
        else:
            raise cursor.bad(f"key {key[:60]!r} has the unknown type {kind}")
    return metadata, types


def _skip_array(cursor: _Cursor, key: str) -> ArrayInfo:
    kind = cursor.number("<I", f"array {key!r}")
    length = cursor.number("<Q", f"array {key!r}")
    if kind == STRING:
        if length > (cursor.size - cursor.at) // 8:  # each has at least its length of 8 bytes
            raise cursor.bad(f"array {key!r} claims {length} strings, which do not fit in the file")
        data, at, size = cursor.data, cursor.at, cursor.size
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(length):
            if at + 8 > size:
                raise cursor.bad(f"it ends inside array {key!r}")
            n = unpack(data, at)[0]
            at += 8
            if n > MAX_STRING or n > size - at:
                raise cursor.bad(f"a string of array {key!r} claims {n} bytes")
            at += n
        cursor.at = at
    elif kind in _SCALARS:
        width = struct.calcsize(_SCALARS[kind])
        if length > (cursor.size - cursor.at) // width:
            raise cursor.bad(f"array {key!r} claims {length} elements, which do not fit in the file")
        start = cursor.skip(length * width, f"array {key!r}")
        if kind == UINT32 and length <= MAX_KEPT:
            return ArrayInfo(kind, length, struct.unpack_from(f"<{length}I", cursor.data, start))
    else:
        raise cursor.bad(f"array {key!r} has the unsupported type {kind}")
    return ArrayInfo(kind, length)


def _read_tensor(cursor: _Cursor) -> TensorInfo:
    name = cursor.string("a tensor's name", MAX_NAME - 1)
    if not name:
        raise cursor.bad("a tensor has no name")
    n_dims = cursor.number("<I", f"tensor {name!r}")
    if not 1 <= n_dims <= 4:
        raise cursor.bad(f"tensor {name!r} has {n_dims} dimensions")
    extents = [cursor.number("<Q", f"tensor {name!r}") for _ in range(n_dims)]
    kind = cursor.number("<I", f"tensor {name!r}")
    offset = cursor.number("<Q", f"tensor {name!r}")
    if kind not in TYPES:
        raise cursor.bad(f"tensor {name!r} has the unknown type {kind}")
    type_name, block, block_bytes = TYPES[kind]
    values = 1
    for extent in extents:
        if not 1 <= extent < 2**40:
            raise cursor.bad(f"tensor {name!r} has an extent of {extent}")
        values *= extent
    if values >= 2**50 or offset >= 2**60:
        raise cursor.bad(f"tensor {name!r} is too large")
    if extents[0] % block:
        raise cursor.bad(f"rows of tensor {name!r} do not divide into blocks of {type_name}")
    return TensorInfo(name, tuple(reversed(extents)), type_name, offset, values // block * block_bytes)
