"""``python -P -m loramix.convert.imatrix BASE TEXT OUT.npz``: computes an importance matrix from a text.

The importance of a column is the mean square of its inputs, as in llama.cpp's own tool
(tools/imatrix/imatrix.cpp); its quantizer weights rounding errors by it. Inputs are found by the names of graph
nodes, without access to private structs.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.errors import REFUSED, InvalidData, NativeError, NotFound
from loramix.formats.textfile import read_text
from loramix.formats.validate import read_base
from loramix.paths import atomic_write

CHUNK = 256
"""Tokens per forward pass."""
MAX_CHUNKS = 128
# graph nodes whose outputs are the inputs of these matrices
INPUTS = {
    "attn_norm": ("attn_q", "attn_k", "attn_v"),
    "kqv_out": ("attn_output",),
    "ffn_norm": ("ffn_gate", "ffn_up"),
    "ffn_swiglu": ("ffn_down",),
}


def importance(base: Path, text: Path, out: Path) -> None:
    """Run a base on a text in a child process, and write the mean squares of its matrices' inputs.

    Args:
        base: GGUF file; llama.cpp pages in all of its weights.
        text: UTF-8 file of at least `CHUNK` tokens; only the first `MAX_CHUNKS` chunks are used.
        out: ``.npz`` to write, with (in,) float32 by tensor name.

    Raises:
        NotFound: the text does not exist.
        InvalidData: the text is too short, or not UTF-8.
        NativeError: llama.cpp fails.
    """
    if not text.is_file():
        raise NotFound(f"no text at {text}; give a UTF-8 text like the prompts that the base will get.")
    command = [sys.executable, "-P", "-m", "loramix.convert.imatrix", str(base), str(text), str(out)]
    child = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    said = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
    if child.returncode == REFUSED:
        raise InvalidData(said)
    if child.returncode or not out.is_file():
        raise NativeError(f"llama.cpp could not run {base.name} on {text}: {said}.")


class Observer:
    """Sums the squares of the inputs of all matrices while llama.cpp computes them.

    Args:
        widths: number of columns of each matrix, by tensor name.
    """

    def __init__(self, widths: dict[str, int]) -> None:
        from loramix.runtime.llama.model import C, ggml

        self.sums: dict[str, npt.NDArray[np.float64]] = {}
        self.counts: dict[str, int] = {}
        self._name = ggml("ggml_get_name", ctypes.c_char_p)
        self._size = ggml("ggml_nbytes", ctypes.c_size_t)
        arguments = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
        self._get = ggml("ggml_backend_tensor_get", None, *arguments)
        self.widths = widths
        self.callback = C.ggml_backend_sched_eval_callback(self._seen)

    def _seen(self, tensor: int, ask: bool, _user: Any) -> bool:
        kind, _, layer = self._name(tensor).decode("utf-8", "replace").rpartition("-")
        names = [f"blk.{layer}.{matrix}.weight" for matrix in INPUTS.get(kind, ())]
        if ask or not names:
            return bool(names) or not ask  # a node of interest, or continue
        values = np.empty(self._size(tensor) // 4, np.float32)
        self._get(tensor, values.ctypes.data, 0, values.nbytes)
        rows = values.reshape(-1, self.widths[names[0]])
        squares = np.square(rows, dtype=np.float64).sum(axis=0)
        for name in names:
            self.sums[name] = self.sums.get(name, 0) + squares
            self.counts[name] = self.counts.get(name, 0) + len(rows)
        return True


def main(arguments: Sequence[str]) -> int:
    """Run one job; return the exit code."""
    from loramix.hardware import default_threads
    from loramix.runtime.llama.context import Context
    from loramix.runtime.llama.model import Model

    base, text, out = map(Path, arguments)
    try:
        content = read_text(text)
    except InvalidData as error:
        print(error, file=sys.stderr)
        return REFUSED
    _, shape = read_base(base)
    observer = Observer({name: columns for name, (_, columns) in shape.tensors.items()})
    with Model(base, use_extra_bufts=False) as model:
        ids = model.tokenize(content)
        chunks = [ids[at : at + CHUNK - 1] for at in range(0, len(ids) - CHUNK + 2, CHUNK - 1)][:MAX_CHUNKS]
        if not chunks:
            print(
                f"{text} has {len(ids)} tokens; at least {CHUNK} are needed for an importance matrix.",
                file=sys.stderr,
            )
            return REFUSED
        threads = default_threads()
        context = Context(model, n_ctx=CHUNK, n_threads=threads, observe=observer.callback, all_tokens=True)
        for chunk in chunks:
            context.truncate(0)
            context.decode(model.with_bos(chunk))
    wanted = {name for name in shape.tensors if name.startswith("blk.")}
    if observer.sums.keys() != wanted:
        print(
            f"this llama.cpp names its graph nodes differently: no inputs of {min(wanted ^ observer.sums.keys())}",
            file=sys.stderr,
        )
        return 1
    means = {
        name: (total / observer.counts[name]).astype(np.float32) for name, total in observer.sums.items()
    }
    with atomic_write(out) as file:
        np.savez(file, **means)  # type: ignore[arg-type]  # the stub expects allow_pickle here
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
