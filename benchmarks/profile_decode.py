"""Where the microseconds of one decoded token go, by kind of operation; and what memory could deliver.

    python benchmarks/profile_decode.py --out profile.json [--base FILE] [--tokens 24] [--threads 1]

llama.cpp calls back before and after each node of its graph, which stops the threads at every node: with more
than one thread the sum is more than a token takes.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from speed import random_adapter

from loramix.convert.fuse import fuse
from loramix.convert.validate import read_base
from loramix.models import bases
from loramix.pack import Pack
from loramix.paths import write_text
from loramix.runtime.cpu import machine
from loramix.runtime.llama import Adapter, C, Model
from loramix.runtime.probe import verdict_for

SRC = 152  # offset of a node's first operand in struct ggml_tensor, 64 bit, llama-cpp-python 0.3.36


def symbols() -> tuple[Any, Any]:
    """``ggml_op_desc`` and ``ggml_get_name`` of the copy of ggml that llama.cpp has loaded."""
    found = []
    for name in ("ggml_op_desc", "ggml_get_name"):
        function = getattr(C._lib, name)  # the dynamic linker looks through what it links to
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_char_p
        found.append(function)
    return found[0], found[1]


def kind(op: str, weight: str) -> str:
    """A node's place in the table.

    Args:
        op: as ggml describes it.
        weight: name of the first operand.
    """
    if op == "MUL_MAT":
        if weight.endswith((".lora_a", ".lora_b")):
            return "adapter: A and B"
        if weight.startswith("blk."):
            return "base: attention matrices" if ".attn_" in weight else "base: feed-forward matrices"
        return "base: output head"
    return op


def profile(model: Model, mix: Sequence[tuple[Adapter, float]], tokens: int, threads: int) -> dict[str, Any]:
    """Microseconds a token by kind of node, and nodes a token.

    Args:
        model: the base.
        mix: adapters with their scales.
        tokens: decoded, one at a time, behind 32 others.
        threads: for llama.cpp.
    """
    describe, title = symbols()
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    began = 0.0

    @C.ggml_backend_sched_eval_callback  # type: ignore[untyped-decorator]
    def watch(node: int, ask: bool, _user: Any) -> bool:
        nonlocal began
        if not ask:
            seconds = time.perf_counter() - began
            operand = ctypes.c_void_p.from_address(node + SRC).value
            what = kind(describe(node).decode(), title(operand).decode() if operand else "")
            spent[what] += seconds
            count[what] += 1
        began = time.perf_counter()
        return True

    parameters = C.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = 512, 64, 64
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.cb_eval = watch
    context = C.llama_init_from_model(model.pointer, parameters)
    if mix:
        handles = (C.llama_adapter_lora_p_ctypes * len(mix))(*(adapter.pointer for adapter, _ in mix))
        scales = (ctypes.c_float * len(mix))(*(scale for _, scale in mix))
        C.llama_set_adapters_lora(context, handles, len(mix), scales)
    ids = model.tokenize("The quick brown fox jumps over the lazy dog. " * 40)
    for place in range(-1, tokens):
        part = ids[:32] if place < 0 else ids[32 + place : 33 + place]
        array = (C.llama_token * len(part))(*part)
        if C.llama_decode(context, C.llama_batch_get_one(array, len(part))) != 0:
            raise SystemExit("llama.cpp could not decode.")
        if place < 0:
            spent.clear()
            count.clear()
    C.llama_free(context)
    return {
        "us": {what: round(1e6 * seconds / tokens, 1) for what, seconds in spent.most_common()},
        "nodes": {what: round(number / tokens) for what, number in count.most_common()},
    }


def bandwidth() -> float:
    """GB/s that NumPy's dot product reads from memory, both operands the same 256 MB; the best of several."""
    numbers = np.ones(2**26, np.float32)
    times = []
    for _ in range(7):
        began = time.perf_counter()
        np.dot(numbers, numbers)
        times.append(time.perf_counter() - began)
    return numbers.nbytes / min(times) / 1e9


@click.command()
@click.option("--base", type=click.Path(exists=True, path_type=Path), help="By default the default base.")
@click.option("--tokens", default=24, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(base: Path | None, tokens: int, threads: int, out: Path) -> None:
    """Measure, and write JSON."""
    path = base or bases.resolve(bases.DEFAULT)
    found: dict[str, Any] = {
        "machine": machine(),
        "read_gb_s": bandwidth(),
        "base_mb": path.stat().st_size / 1e6,
    }
    with Model(path, use_extra_bufts=verdict_for(path).use_extra_bufts) as model:
        if base is None:
            content = fuse([(Pack.load(bases.DEFAULT).adapter_bytes("sentiment"), 1.0)])
        else:
            content = fuse([(random_adapter(read_base(path)[1], 8), 1.0)])
        found["adapter_mb"] = len(content) / 1e6
        adapter = model.load_adapter(content, "adapter")
        runs = {"bare base": [], "one adapter": [(adapter, 1.0)]}
        found["profile"] = {name: profile(model, mix, tokens, threads) for name, mix in runs.items()}
    write_text(out, json.dumps(found, indent=1) + "\n")
    click.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
