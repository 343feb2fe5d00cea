"""``python -P -m loramix.convert.quantize JOB.json``: runs llama.cpp's quantizer in a child process.

A child process can be interrupted, cannot crash the caller, and frees all memory at its end.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loramix.errors import NativeError, NoSpace
from loramix.formats.validate import read_base
from loramix.paths import atomic_path, need_space

FILE_TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}  # llama_ftype, llama.h
BITS = {"Q8_0": 8.5, "Q4_0": 4.9, "Q4_K_M": 5.2}  # upper bound per weight, with a larger type for the head
BUFFER = 128 * 2**20  # maximum size of the rows processed at once, in bytes


def quantize(source: Path, out: Path, quant: str, imatrix: Path | None = None) -> None:
    """Quantize a GGUF base of float matrices.

    Args:
        source: the base, F32, F16 or BF16.
        out: file to write atomically.
        quant: a name of `FILE_TYPES`.
        imatrix: importance matrix from `loramix.convert.imatrix`, for smaller errors in important columns.

    Raises:
        InvalidArtifact: the source is not a base.
        NoSpace: the disk is full.
        NativeError: llama.cpp fails.
    """
    _, shape = read_base(source)
    weights = sum(rows * columns for rows, columns in shape.tensors.values())
    with atomic_path(out) as temporary:
        needed = quantized_size(weights, quant)
        need_space(out, needed, out.name)
        job = {"source": str(source), "out": str(temporary), "file_type": FILE_TYPES[quant]}
        if imatrix:
            job["imatrix"] = str(imatrix)
        command = [sys.executable, "-P", "-m", "loramix.convert.quantize", json.dumps(job)]
        child = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if child.returncode or not temporary.is_file():
            lines = child.stderr.strip().splitlines()
            said = lines[-1] if lines else f"exit code {child.returncode}"
            if "basic_ios" in said or "iostream" in said:  # an ofstream's error after a failed write
                raise NoSpace(f"{out} could not be written to the end; free {needed / 1e6:.0f} MB.")
            raise NativeError(f"llama.cpp could not quantize {source.name} to {quant}: {said}.")


def quantized_size(weights: int, quant: str) -> int:
    """Return the maximum size of a number of weights, in bytes."""
    return int(weights * BITS[quant] / 8)


def main(arguments: Sequence[str]) -> int:
    """Run one job: ``{"source", "out", "file_type", "imatrix"}`` as JSON; ``imatrix`` is optional."""
    from loramix.hardware import cpu_count
    from loramix.runtime.llama.model import C, start, why

    job: dict[str, Any] = json.loads(arguments[0])
    start()
    parameters = C.llama_model_quantize_default_params()
    parameters.ftype = job["file_type"]
    parameters.nthread = cpu_count()
    parameters.max_buf_size = BUFFER
    if "imatrix" in job:
        with np.load(job["imatrix"], allow_pickle=False) as archive:
            columns = {name: np.ascontiguousarray(archive[name], np.float32) for name in archive}
        listed = (C.llama_model_imatrix_data * (len(columns) + 1))()  # a last entry of zeros ends the list
        for entry, (name, values) in zip(listed, columns.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        parameters.imatrix = listed
    code = C.llama_model_quantize(
        os.fsencode(job["source"]), os.fsencode(job["out"]), ctypes.byref(parameters)
    )
    if code:
        print(why().strip(" ()"), file=sys.stderr)
    return int(code != 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
