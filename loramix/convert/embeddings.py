"""Checks full embeddings saved with an adapter: accepts copies of the base's, rejects trained ones.

PEFT saves them if the vocabulary was resized or an embedding is among its targets; some trainers always do.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loramix.convert.peft_reader import PeftAdapter
from loramix.errors import Unsupported, WrongBase
from loramix.formats.gguf_reader import GGUFFile, TensorInfo

SAMPLE = 256
# upper bound of the relative error that rounding to a type causes in a matrix
_ROUNDED = {"F32": 0.01, "F16": 0.01, "BF16": 0.02, "Q8_0": 0.03, "Q6_K": 0.06, "Q5_K": 0.1, "Q5_0": 0.1}
_COARSE = 0.2


def check_copies(adapter: PeftAdapter, base: Path, header: GGUFFile) -> None:
    """Check that full embeddings saved with an adapter equal the base's.

    Args:
        adapter: the adapter, from `read_peft` or `read_mlx`.
        base: the GGUF base that it was trained on.
        header: the base's GGUF header.

    Raises:
        Unsupported: tokens were added, or the embedding was trained.
        WrongBase: the embedding has another width than the base's.
    """
    for module, values in adapter.copies.items():
        own = header.tensors["token_embd.weight"]
        if module == "lm_head":
            own = header.tensors.get("output.weight", own)
        rows, columns = own.shape
        what = f"{adapter.name} contains a full {module} of {values.shape[0]} tokens"
        if values.shape[1] != columns:
            raise WrongBase(
                f"{what}, {values.shape[1]} wide; the base's is {columns} wide: use the base that it was trained on."
            )
        if values.shape[0] != rows:
            raise Unsupported(
                f"{what}, the base has {rows}: tokens were added, which an adapter file cannot store; train "
                "without resize_token_embeddings, on the base's own vocabulary."
            )
        chosen = np.linspace(0, rows - 1, min(rows, SAMPLE)).astype(int)
        there = _rows(base, own, chosen)
        off = float(np.linalg.norm(values[chosen] - there) / max(float(np.linalg.norm(there)), 1e-12))
        if off > _ROUNDED.get(own.type_name, _COARSE):
            raise Unsupported(
                f"{what} that differs from the base's by {off:.0%}: it was trained too, which an adapter "
                f"file cannot store; train again without {module} in modules_to_save or target_modules."
            )


def _rows(base: Path, tensor: TensorInfo, chosen: npt.NDArray[np.int_]) -> npt.NDArray[np.float32]:
    """Read the chosen rows of a GGUF matrix, (len(chosen), columns) float32."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    width = tensor.nbytes // tensor.shape[0]
    with base.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        raw = b"".join(
            data[tensor.offset + i * width : tensor.offset + (i + 1) * width] for i in chosen.tolist()
        )
    packed = np.frombuffer(raw, np.uint8).reshape(len(chosen), width)
    if tensor.type_name in ("F32", "F16"):  # gguf expects these in their own type
        return packed.view({"F32": "<f4", "F16": "<f2"}[tensor.type_name]).astype(np.float32)
    found: npt.NDArray[np.float32] = dequantize(packed, GGMLQuantizationType[tensor.type_name])
    return found
