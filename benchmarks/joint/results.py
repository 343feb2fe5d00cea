"""Results of slots as files that are complete or absent, small enough to be fetched one by one.

A result is ``NAME.0.npz``, ``NAME.1.npz`` …: an adapter's matrices in float16, and in each file the same record (JSON).
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PART_BYTES = 14 * 2**20
"""Bytes of the matrices of a file; with its index it has at most 15 MiB."""


def save(
    out: Path, name: str, arrays: Mapping[str, npt.NDArray[np.float32]], record: Mapping[str, Any]
) -> None:
    """Write a slot's result; an interrupted write leaves parts with different records, which `load` ignores.

    Args:
        out: directory of the run.
        name: name of the slot.
        arrays: matrices by name.
        record: settings and figures, as JSON.
    """
    parts: list[dict[str, npt.NDArray[np.float16]]] = [{}]
    size = 0
    for key, array in arrays.items():
        half = array.astype(np.float16)
        if size + half.nbytes > PART_BYTES and parts[-1]:
            parts.append({})
            size = 0
        parts[-1][key] = half
        size += half.nbytes
    text = json.dumps({**record, "parts": len(parts)})
    for number, part in enumerate(parts):
        buffer = io.BytesIO()
        np.savez(buffer, record=np.array(text), **part)  # type: ignore[arg-type]  # its stub has one option by name
        _write(out / f"{name}.{number}.npz", buffer.getvalue())


def load(out: Path, name: str) -> tuple[dict[str, npt.NDArray[np.float16]], dict[str, Any]] | None:
    """Read a slot's result.

    Returns:
        Matrices by name, and the record; None if there is no complete result.
    """
    try:
        arrays, first = _read(out / f"{name}.0.npz")
        for number in range(1, first["parts"]):
            more, record = _read(out / f"{name}.{number}.npz")
            if record != first:
                return None
            arrays |= more
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return arrays, first


def _read(path: Path) -> tuple[dict[str, npt.NDArray[np.float16]], dict[str, Any]]:
    with path.open("rb") as file, np.load(file) as stored:  # never unpickles
        arrays = {key: stored[key] for key in stored.files}
    record: dict[str, Any] = json.loads(str(arrays.pop("record")))
    return arrays, record


def _write(path: Path, content: bytes) -> None:
    """Write a file atomically: temporary file, fsync, replace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
