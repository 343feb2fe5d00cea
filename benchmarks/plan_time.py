"""Time of a request for two things against two requests of its own words, one after the other.

    python benchmarks/plan_time.py --out RUN.json

Three engines answer the same texts in turns, so that none finds another's prompts in its KV cache: one gets the whole
request, one the two requests, and one the two requests with their skills named, which saves the gate's work.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
from routing_cost import TEXT
from speed import report

from loramix import DEFAULT, Engine
from loramix.hardware import machine

REQUESTS = (
    "Summarize this in one sentence and tell me whether it is positive or negative.\n\n{input}",
    "Give me a one-line summary and list the named entities: {input}",
    "{input}\n\nSummarize this, then translate the summary into French.",
)


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 20 to 120 words with beginnings of their own."""
    rng = np.random.default_rng(seed)
    return [
        " ".join([f"Letter {rng.integers(10**6)}:", *rng.choice(TEXT.split(), int(rng.integers(20, 120)))])
        + "."
        for _ in range(count)
    ]


def by_hand(engine: Engine, whole: Any, *, named: bool) -> float:
    """Seconds of the two requests that a plan's steps are, and check that their answers are the same."""
    began, answers = time.perf_counter(), list[str]()
    for step in whole.route.plan:
        instruction = engine.pack.skill(step.skill).instruction or "{input}"
        text = answers[-1] if step.on_answer else step.text
        mix = {"mix": step.skill} if named else {"policy": "top1"}
        answers.append(engine.generate(instruction.replace("{input}", text), **mix).text)
    seconds = time.perf_counter() - began
    assert not named or answers == whole.parts
    return seconds


def measure(pack: str, count: int) -> dict[str, Any]:
    """Measure the requests on ``count`` texts each."""
    rows = []
    with ExitStack() as stack:
        ours, routed, named = (stack.enter_context(Engine.open(pack)) for _ in range(3))
        for number, text in enumerate(texts(count * len(REQUESTS) + 1)):
            prompt = REQUESTS[number % len(REQUESTS)].replace("{input}", text)
            began = time.perf_counter()
            whole = ours.generate(prompt)
            seconds = time.perf_counter() - began
            if number and len(whole.route.plan) == 2:  # an uncounted request goes first
                rows.append((seconds, by_hand(routed, whole, named=False), by_hand(named, whole, named=True)))
    plan, hand, pinned = np.array(rows).T
    return {
        "machine": machine(),
        "requests": len(rows),
        "plan_s": statistics.median(plan),
        "two_requests_s": statistics.median(hand),
        "two_named_requests_s": statistics.median(pinned),
        "ratio": statistics.median(plan / hand),
        "ratio_named": statistics.median(plan / pinned),
    }


@click.command()
@click.option("--pack", default=DEFAULT, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--count", default=8, show_default=True, help="Texts of each request.")
def main(pack: str, out: Path, count: int) -> None:
    """Run the benchmark and write JSON."""
    report(out, measure(pack, count))


if __name__ == "__main__":
    main()
