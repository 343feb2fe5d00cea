"""Time of one decoded token by kind of operation, and the memory bandwidth of this machine.

    python benchmarks/profile_decode.py --out profile.json [--base FILE] [--tokens 24] [--threads 1]

llama.cpp calls back before and after each graph node, which synchronizes the threads at every node, so with more
than one thread the sum exceeds the time of a token.
"""

from __future__ import annotations

import ctypes
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import numpy as np
from speed import TEXT, fused, random_adapter, report

from loramix import DEFAULT
from loramix.formats.validate import read_base
from loramix.hardware import machine
from loramix.models import bases
from loramix.pack.pack import Pack
from loramix.runtime.contributions import first_operand
from loramix.runtime.llama.context import Context
from loramix.runtime.llama.model import Adapter, C, Model, ggml
from loramix.runtime.probe import verdict_for


def kind(op: str, weight: str) -> str:
    """Return the row of the table for a graph node.

    Args:
        op: ggml's description of the operation.
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
    """Measure microseconds and nodes per token, by kind of node.

    Args:
        model: the base.
        mix: adapters with their scales.
        tokens: number of tokens to decode after 32 others.
        threads: number of threads.
    """
    describe, title = ggml("ggml_op_desc", ctypes.c_char_p), ggml("ggml_get_name", ctypes.c_char_p)
    spent: dict[str, float] = defaultdict(float)
    count: Counter[str] = Counter()
    began = 0.0

    @C.ggml_backend_sched_eval_callback  # type: ignore[untyped-decorator]
    def watch(node: int, ask: bool, _user: Any) -> bool:
        nonlocal began
        if not ask:
            seconds = time.perf_counter() - began
            operand = first_operand(node)
            what = kind(describe(node).decode(), title(operand).decode() if operand else "")
            spent[what] += seconds
            count[what] += 1
        began = time.perf_counter()
        return True

    with closing(Context(model, mix, n_ctx=512, n_threads=threads, observe=watch)) as context:
        ids = model.tokenize(TEXT)
        context.decode(ids[:32])
        spent.clear()
        count.clear()
        for token in ids[32 : 32 + tokens]:
            context.decode([token])
    by_time = sorted(spent.items(), key=lambda item: -item[1])
    return {
        "us": {what: round(1e6 * seconds / tokens, 1) for what, seconds in by_time},
        "nodes": {what: round(number / tokens) for what, number in count.most_common()},
    }


def bandwidth() -> float:
    """Measure the memory bandwidth in GB/s with NumPy's dot product of 256 MB with itself; the best of several runs."""
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
    """Run the benchmark and write JSON."""
    path = base or bases.resolve(DEFAULT)
    found: dict[str, Any] = {
        "machine": machine(),
        "read_gb_s": bandwidth(),
        "base_mb": path.stat().st_size / 1e6,
    }
    with Model(path, use_extra_bufts=verdict_for(path).use_extra_bufts) as model:
        if base is None:
            content = fused([(Pack.load(DEFAULT).adapter_bytes("sentiment"), 1.0)])
        else:
            content = fused([(random_adapter(read_base(path)[1], 8), 1.0)])
        found["adapter_mb"] = len(content) / 1e6
        adapter = model.load_adapter(content, "adapter")
        runs = {"bare base": [], "one adapter": [(adapter, 1.0)]}
        found["profile"] = {name: profile(model, mix, tokens, threads) for name, mix in runs.items()}
    report(out, found)


if __name__ == "__main__":
    main()
