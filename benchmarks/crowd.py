"""Sixty-four skills in one pack: the gate's decision, what idle adapters cost, memory; ratios inside one run.

    python benchmarks/crowd.py --out crowd.json [--skills 64] [--rounds 9]

The skills are the default pack's adapters under other names, the gate has random weights: neither changes
what they cost.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
from speed import PREFILL, TEXT, decisions, decode, fused, paired, report

from loramix import DEFAULT, Engine
from loramix.hardware import default_threads, machine
from loramix.models.early_head import EarlyHead
from loramix.models.head_info import expected
from loramix.models.mixing import Mix
from loramix.pack.edit import add_skill, new_pack, set_gate
from loramix.pack.pack import Pack
from loramix.runtime.llama.context import Context
from loramix.runtime.llama.model import Model
from loramix.runtime.probe import verdict_for


def crowded(source: Pack, names: Sequence[str], directory: Path) -> Pack:
    """A pack of as many skills as there are names, with a gate between them."""
    given, gate = [skill.name for skill in source.skills], source.gate()
    assert gate is not None
    new_pack(directory, source.manifest.base.name, source.manifest.base.sha256)
    for i, name in enumerate(names):
        add_skill(
            directory, name, source.adapter_path(given[i % len(given)]), description=name, max_tokens=16
        )
    assert isinstance(gate, EarlyHead), "the pack has a gate of the old format: run 'loramix train gate'"
    info = msgspec.structs.replace(gate.info, skills=list(names), base_classes=1, metrics={})
    shapes, rng = expected(info), np.random.default_rng(0)
    last = {name: rng.normal(0, 0.02, shapes[name]).astype(np.float32) for name in ("out.weight", "out.bias")}
    return set_gate(directory, EarlyHead(info, {**gate.arrays, **last}).to_bytes())


def memory_mb() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def idle(few: Engine, many: Engine, name: str, rounds: int) -> dict[str, Any]:
    """Decoding under one skill: alone in its pack, among many, and with all of them in native memory."""
    ids = few.model.tokenize(TEXT)[:PREFILL]
    mix = Mix.of({name: 1.0})
    base = few.base_path
    with Model(base, use_extra_bufts=verdict_for(base).use_extra_bufts) as model:
        contents = [fused([(many.pack.adapter_bytes(skill.name), 1.0)]) for skill in many.pack.skills]
        loaded = [model.load_adapter(content, str(i)) for i, content in enumerate(contents)]
        resident = Context(model, [(loaded[0], 1.0)], n_ctx=2048, n_threads=default_threads())
        return paired(
            {
                "the only skill": partial(decode, few.decoder.pool.get(mix), ids),
                "among many, loaded when asked for": partial(decode, many.decoder.pool.get(mix), ids),
                "among many, all in native memory": partial(decode, resident, ids),
            },
            rounds,
        )


@click.command()
@click.option("--pack", default=DEFAULT, show_default=True)
@click.option("--skills", default=64, show_default=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(pack: str, skills: int, rounds: int, out: Path) -> None:
    """Measure, and write JSON."""
    source = Pack.load(pack)
    names = [f"skill{i:02}" for i in range(skills)]
    found: dict[str, Any] = {"machine": machine(), "skills": skills}
    with tempfile.TemporaryDirectory() as directory:
        one, crowd = (crowded(source, part, Path(directory) / str(len(part))) for part in (names[:1], names))
        began = time.perf_counter()
        with Engine(crowd) as many, Engine(one) as few:
            found["open_ms"] = 1000 * (time.perf_counter() - began)
            found["decision_ms"] = statistics.median(decisions(many, "One, two, three. " * 60, 300))
            grown = {}
            for count, name in enumerate(names, 1):
                many.generate("One, two, three.", mix=name, max_tokens=1)
                if count in (8, skills // 2, skills):
                    grown[str(count)] = memory_mb()
            found["peak_memory_mb, after so many skills"] = grown
            found["decode"] = idle(few, many, names[0], rounds)
    report(out, found)


if __name__ == "__main__":
    main()
