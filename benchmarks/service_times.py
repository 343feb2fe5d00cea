"""What a request costs a replica of one core: the inputs of simulate_routing.py and docs/scale.md.

    python benchmarks/service_times.py [--pack PACK] [--rounds 5] [--part steps|batches]

Writes "service times" to benchmarks/results.json: times of one prefill, of one decoding step by number of answers
that share it, of a change of mix in the batch; times and tokens of the everyday requests as a batch, and of a batch of
requests to one label skill. All are seconds of CPU of one thread, which other programs on the machine hardly change.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from evaluate import RESULTS, save
from speed import TEXT

from loramix import DEFAULT, Engine
from loramix.defaults import KV_STORE_BYTES
from loramix.eval.everyday.requests import DATA, SPLITS, Request, read_requests
from loramix.models.mixing import Mix
from loramix.runtime.batch import run_batch
from loramix.runtime.llama.batch_context import BatchContext

PREFILLS = (16, 32, 64, 128, 256)
"""Prompt tokens; longer prompts are prefilled in chunks of 256."""
ROWS = (1, 2, 4, 8)
PROMPT, STEPS = 100, 16
LABEL_SKILL = "sentiment"


def ms(work: Callable[[], object]) -> float:
    """CPU milliseconds of this thread."""
    began = time.thread_time()
    work()
    return 1000 * (time.thread_time() - began)


def prefill_ms(engine: Engine, rounds: int) -> dict[str, float]:
    """Median milliseconds to prefill a prompt under a skill, by its number of tokens."""
    ids, context = engine.model.tokenize(TEXT), engine.decoder.pool.get(mix_of(engine, 0))

    def prefill(n: int) -> None:
        context.truncate(0)
        context.decode(ids[:n])

    prefill(max(PREFILLS))
    return {str(n): statistics.median(ms(partial(prefill, n)) for _ in range(rounds)) for n in PREFILLS}


def single_ms(engine: Engine, rounds: int) -> float:
    """Median milliseconds of a token of the only answer of a mix, in the engine's own context."""
    ids, context = engine.model.tokenize(TEXT), engine.decoder.pool.get(mix_of(engine, 0))
    context.truncate(0)
    context.decode(ids[:PROMPT])
    tokens = ids[PROMPT : PROMPT + STEPS * rounds]
    return statistics.median(ms(partial(context.decode, [token])) for token in tokens)


def step_ms(engine: Engine, rounds: int) -> dict[str, float]:
    """Median milliseconds of a step of the batch by number of answers."""
    found = {}
    for rows in ROWS:
        batch = engine.decoder.batch_context(rows, 4096)
        sequences = fill(engine, batch, mix_of(engine, 0), rows)
        batch.set_mix(mix_of(engine, 0), engine.decoder.adapters.get(mix_of(engine, 0)))
        step = partial(batch.decode, dict.fromkeys(sequences, 1))
        found[str(rows)] = statistics.median(ms(step) for _ in range(STEPS * rounds))
        batch.close()
    return found


def change_ms(engine: Engine, rounds: int) -> float:
    """Median of what a step of two answers takes longer after a change of mix than without one."""
    batch = engine.decoder.batch_context(4, 4096)
    groups = [(mix, fill(engine, batch, mix, 2)) for mix in (mix_of(engine, 0), mix_of(engine, 1))]
    longer = []
    for mix, sequences in groups * (3 * rounds):
        step = partial(batch.decode, dict.fromkeys(sequences, 1))
        change = ms(partial(batch.set_mix, mix, engine.decoder.adapters.get(mix)))
        longer.append(change + ms(step) - ms(step))
    batch.close()
    return statistics.median(longer)


def mix_of(engine: Engine, index: int) -> Mix:
    """The mix of one of the pack's skills alone."""
    return Mix.of({engine.pack.skills[index].name: 1.0})


def fill(engine: Engine, batch: BatchContext, mix: Mix, rows: int) -> list[int]:
    """Put answers of one mix, each after a prompt of `PROMPT` tokens, into a batch."""
    context = engine.decoder.pool.get(mix)
    context.truncate(0)
    context.decode(engine.model.tokenize(TEXT)[:PROMPT])
    return [batch.add(context, mix) for _ in range(rows)]


def answers(engine: Engine, prompts: Sequence[str], **options: Any) -> tuple[float, list[tuple[int, int]]]:
    """Answer prompts with `run_batch`; return CPU seconds, and prompt and answer tokens of each."""
    with tempfile.TemporaryDirectory() as directory:
        source, out = Path(directory) / "in.jsonl", Path(directory) / "out.jsonl"
        source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        seconds = ms(partial(run_batch, engine, source, out, **options)) / 1000
        usage = [json.loads(line)["usage"] for line in out.read_text().splitlines()]
    return seconds, [(row["prompt_tokens"], row["completion_tokens"]) for row in usage]


def batch(
    engine: Engine, prompts: Sequence[str], **options: Any
) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """Figures of a batch, and the tokens of each of its prompts."""
    seconds, tokens = answers(engine, prompts, **options)
    prompt, answer = map(sum, zip(*tokens, strict=True))
    figures = {"prompts": len(prompts), "s": seconds, "prompt_tokens": prompt, "answer_tokens": answer}
    return figures, tokens


def everyday() -> list[tuple[str, Request]]:
    """The everyday requests, each with its split."""
    return [(split, request) for split in SPLITS for request in read_requests(DATA / f"{split}.jsonl")]


def steps(engine: Engine, rounds: int) -> dict[str, Any]:
    """Times of the parts of a request."""
    prompts = [request.prompt for _, request in everyday()]
    found: dict[str, Any] = {
        "routing_ms": statistics.median(ms(partial(engine.route, text)) for text in prompts[:60]),
        "prefill_ms": prefill_ms(engine, rounds),
    }
    context = engine.decoder.pool.get(mix_of(engine, 0))
    found["kv_store_tokens"] = KV_STORE_BYTES * len(context.tokens) // context.get_kv().nbytes
    found["single_ms"] = single_ms(engine, rounds)
    found["step_ms"], found["change_of_mix_ms"] = step_ms(engine, rounds), change_ms(engine, rounds)
    return found


def batches(engine: Engine, rounds: int) -> dict[str, Any]:
    """Times and tokens of batches: the everyday requests, routed, and requests to one label skill."""
    requests = everyday()
    mixed, counts = batch(engine, [request.prompt for _, request in requests], policy="top1")
    tokens: dict[str, dict[str, list[tuple[int, int]]]] = {split: defaultdict(list) for split in SPLITS}
    for (split, request), pair in zip(requests, counts, strict=True):
        tokens[split][request.skill].append(pair)
    labels = [request.prompt for _, request in requests if request.skill == LABEL_SKILL]
    reviews = [f"{i}. {text}" for i in range(rounds) for text in labels]  # new prompts: nothing is cached
    one, _ = batch(engine, reviews, mix=LABEL_SKILL)
    return {"batch": mixed, "tokens": tokens, "batch of one label skill": one}


PARTS = {"steps": steps, "batches": batches}


@click.command()
@click.option("--pack", default=DEFAULT, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--part", "parts", type=click.Choice(list(PARTS)), multiple=True, default=list(PARTS))
def main(pack: str, rounds: int, parts: tuple[str, ...]) -> None:
    """Measure, and write the results to results.json; those of other parts are kept."""
    for part in parts:
        began = time.process_time()
        with Engine.open(pack, n_threads=1) as engine:
            engine.generate("Is this review positive or negative? I liked it.")
            start_s = time.process_time() - began
            found = PARTS[part](engine, rounds)
        if part == "steps":
            found["start_s"] = start_s
        known = json.loads(RESULTS.read_text()).get("service times", {})
        save("service times", {**known, **found})


if __name__ == "__main__":
    main()
