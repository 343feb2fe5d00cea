"""What choosing the skill costs: time to the first token routed and named, and a batch of short routed prompts.

    python benchmarks/routing_cost.py --pack PACK --pack OTHER --out RUN.json

Several packs are compared in turns, e.g. one with a gate of the old format. No prompt begins like another, so that
nothing is found in the KV cache.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
from speed import report

from loramix import DEFAULT, Engine
from loramix.hardware import machine
from loramix.runtime.batch import run_batch

TEXT = "the harbour was quiet when a small boat came in with two people and a box of letters for us"
INSTRUCTION = "Summarize the text in one sentence:"


def text_of(engine: Engine, rng: np.random.Generator, n_tokens: int) -> str:
    """A summarizing request of about so many tokens, chat template included, with a beginning of its own."""
    words = [str(rng.integers(10**6))]
    while engine.count_tokens(f"{' '.join(words)}\n\n{INSTRUCTION}") < n_tokens:
        words += map(str, rng.choice(TEXT.split(), max(1, (n_tokens - 20) // 12)))
    return f"{' '.join(words)}\n\n{INSTRUCTION}"


def first_tokens(engine: Engine, n_tokens: int, rounds: int, seed: int) -> dict[str, float]:
    """Median milliseconds to the first token routed and named, under the same mix, and the median of their ratio."""
    rng, rows = np.random.default_rng(seed), []
    for number in range(rounds + 1):
        routed = engine.generate(text_of(engine, rng, n_tokens), policy="top1", max_tokens=1)
        mix = str(routed.route.key) if routed.route.mix else "base"
        named = engine.generate(text_of(engine, rng, n_tokens), mix=mix, max_tokens=1)
        times = [answer.timings["first_token"] for answer in (routed, named)]
        if number:  # an uncounted round goes first
            rows.append((*times, routed.timings["features"], routed.timings["gate"]))
    routed_s, named_s, features, gate = (1000 * np.array(column) for column in zip(*rows, strict=True))
    return {
        "routed_ms": statistics.median(routed_s),
        "named_ms": statistics.median(named_s),
        "ratio": statistics.median(routed_s / named_s),
        "pass_ms": statistics.median(features),
        "gate_ms": statistics.median(gate),
    }


def head_ms(engine: Engine, rounds: int) -> dict[str, float]:
    """The gate's own milliseconds, p50 and p99, for a prompt of which it reads all that it can."""
    text = text_of(engine, np.random.default_rng(0), 400)
    times = [1000 * engine.route(text).timings["gate"] for _ in range(rounds)]
    return {"p50": float(np.percentile(times, 50)), "p99": float(np.percentile(times, 99))}


def batch_seconds(engine: Engine, prompts: Sequence[str], max_tokens: int) -> float:
    """Seconds that a batch takes."""
    with tempfile.TemporaryDirectory() as directory:
        source, out = Path(directory) / "in.jsonl", Path(directory) / "out.jsonl"
        source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        began = time.perf_counter()
        counts = run_batch(engine, source, out, max_tokens=max_tokens)
        assert counts["errors"] == 0
        return time.perf_counter() - began


def measure(
    packs: Sequence[str], lengths: Sequence[int], rounds: int, batch: int, max_tokens: int
) -> dict[str, Any]:
    """Measure all packs in turns."""
    with ExitStack() as stack:
        engines = [(pack, stack.enter_context(Engine.open(pack))) for pack in packs]
        found: dict[str, Any] = {"machine": machine(), "packs": {pack: {} for pack in packs}}
        for n_tokens, (pack, engine) in itertools.product(lengths, engines):
            found["packs"][pack][f"{n_tokens} tokens"] = first_tokens(engine, n_tokens, rounds, n_tokens)
        for pack, engine in engines:
            found["packs"][pack]["head_ms"] = head_ms(engine, 10 * rounds)
            skills = [skill.example or skill.description for skill in engine.pack.skills]
            prompts = [f"{i}. {text}" for i, text in zip(range(batch), itertools.cycle(skills), strict=False)]
            if prompts:
                found["packs"][pack][f"batch_of_{batch}_s"] = batch_seconds(engine, prompts, max_tokens)
        return found


@click.command()
@click.option("--pack", "packs", multiple=True, default=[DEFAULT], show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--tokens", multiple=True, type=int, default=[30, 130, 1000], show_default=True)
@click.option("--rounds", default=15, show_default=True)
@click.option("--batch", default=1000, show_default=True, help="Prompts of the batch; 0 for none.")
@click.option("--max-tokens", default=8, show_default=True, help="Longest answer in the batch.")
def main(
    packs: tuple[str, ...], out: Path, tokens: tuple[int, ...], rounds: int, batch: int, max_tokens: int
) -> None:
    """Run the benchmark and write JSON."""
    report(out, measure(packs, tokens, rounds, batch, max_tokens))


if __name__ == "__main__":
    main()
