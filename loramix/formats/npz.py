"""Reads and writes uncompressed .npz files of float32 and byte arrays; what is read is untrusted.

NumPy itself evaluates array headers as Python and may load pickles, so headers are matched as text here.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.errors import InvalidArtifact
from loramix.formats.sniff import HEAD, sniff

_MAX_DIRECTORY_BYTES = 16 * 2**10
_HEADER = re.compile(rb"\{'descr': '(<f4|\|u1)', 'fortran_order': False, 'shape': \(([0-9, ]*)\), \} *\n")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date of a zip: equal arrays give equal bytes

Refusal = Callable[[str], InvalidArtifact]
"""Makes the error for a reason."""


def read_npz(data: bytes, limit: int, refused: Refusal) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of an .npz file; sizes are bounded before anything is read or allocated.

    Args:
        data: content of the file.
        limit: maximum bytes of the file.
        refused: makes the error, see `Refusal`.

    Raises:
        InvalidArtifact: not a file that `npz_bytes` could have made.
    """
    if len(data) > limit:
        raise refused(f"it is larger than the {limit // 2**20} MB a gate may have")
    # the end record bounds the directory that zipfile will parse; "PK67" would override it (zip64)
    end = data[-22:]
    if len(end) < 22 or end[:4] != b"PK\5\6" or data[-42:-38] == b"PK\6\7":
        found = None if data.startswith(b"PK") else sniff(data[:HEAD], len(data))
        raise refused(str(found or "it is not a whole .npz file"))
    if struct.unpack_from("<I", end, 12)[0] > _MAX_DIRECTORY_BYTES:
        raise refused("its directory is too long")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1 for m in members):
                raise refused("its arrays are compressed or encrypted, not stored")
            if sum(member.file_size for member in members) > len(data):
                raise refused("its arrays are declared larger than the file")
            if len({member.filename for member in members}) != len(members):
                raise refused("it names an array twice")
            return {
                m.filename.removesuffix(".npy"): _read_npy(archive.read(m), m.filename, refused)
                for m in members
            }
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, struct.error) as error:
        raise refused(f"it is not a readable .npz file ({error})") from None


def read_described(data: bytes, limit: int, refused: Refusal) -> tuple[bytes, dict[str, npt.NDArray[Any]]]:
    """Return the bytes of the array ``info`` of an .npz file, and its other arrays; see `read_npz`."""
    arrays = read_npz(data, limit, refused)
    info = arrays.pop("info", None)
    if info is None or info.dtype != np.uint8 or info.ndim != 1:
        raise refused("it has no 'info' array of bytes")
    return info.tobytes(), arrays


def npz_bytes(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return an .npz file of float32 and uint8 arrays; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:
        for key, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{key}.npy", _EPOCH), member.getvalue())
    return buffer.getvalue()


def _read_npy(data: bytes, member: str, refused: Refusal) -> npt.NDArray[Any]:
    length = int.from_bytes(data[8:10], "little")
    header = _HEADER.fullmatch(data[10 : 10 + length])
    if data[:8] != b"\x93NUMPY\x01\x00" or header is None or not member.endswith(".npy"):
        raise refused(f"{member[:40]!r} is not a plain float32 or byte array")
    shape = tuple(int(size) for size in header[2].replace(b" ", b"").split(b",") if size)
    dtype = np.dtype(header[1].decode())
    body = data[10 + length :]
    if any(size > 2**31 for size in shape) or math.prod(shape) * dtype.itemsize != len(body):
        raise refused(f"{member[:40]!r} declares shape {shape[:4]} but holds {len(body)} bytes")
    return np.frombuffer(body, dtype).reshape(shape).copy()  # the copy is aligned
