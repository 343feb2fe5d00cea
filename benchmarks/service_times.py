"""What a request costs one engine: the inputs of simulate_routing.py and docs/scale.md.

    python benchmarks/service_times.py [--pack PACK] [--rounds 9]

Writes "service times" to benchmarks/results.json: times of one prefill, of one decoding step by number of answers
that share it, of a change of mix in the batch; prompt and answer tokens of the everyday requests by skill; seconds
for all of them as a batch, and for a batch of requests to one label skill. Of repeated times the shortest counts, as
other programs on the machine only lengthen them; seconds of whole batches need an idle machine.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from evaluate import save
from speed import TEXT, prefill

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


def prefill_ms(engine: Engine, rounds: int) -> dict[str, float]:
    """Milliseconds to prefill a prompt under each skill in turn, by its number of tokens."""
    ids = engine.model.tokenize(TEXT)
    contexts = [engine.decoder.pool.get(Mix.of({skill.name: 1.0})) for skill in engine.pack.skills[:3]]
    for context in contexts:
        prefill(context, ids[:64])
    return {
        str(n): 1000 * min(prefill(context, ids[:n]) for _ in range(rounds) for context in contexts)
        for n in PREFILLS
    }


def fill(engine: Engine, batch: BatchContext, mix: Mix, rows: int) -> list[int]:
    """Put answers of one mix, each after a prompt of `PROMPT` tokens, into a batch."""
    context = engine.decoder.pool.get(mix)
    context.truncate(0)
    context.decode(engine.model.tokenize(TEXT)[:PROMPT])
    return [batch.add(context, mix) for _ in range(rows)]


def step_ms(engine: Engine, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step by number of answers, and what a step after a change of mix takes beyond it."""
    first, second = (Mix.of({skill.name: 1.0}) for skill in engine.pack.skills[:2])
    token = engine.model.tokenize(" and")[-1]

    def step(sequences: Sequence[int]) -> float:
        began = time.perf_counter()
        batch.decode(dict.fromkeys(sequences, token))
        return 1000 * (time.perf_counter() - began)

    def turn(mix: Mix, sequences: Sequence[int]) -> Iterator[float]:
        began = time.perf_counter()
        batch.set_mix(mix, engine.decoder.adapters.get(mix))
        yield 1000 * (time.perf_counter() - began) + step(sequences)
        yield step(sequences)

    found: dict[str, float] = {}
    for rows in ROWS:
        batch = engine.decoder.batch_context(rows, 4096)
        sequences = fill(engine, batch, first, rows)
        batch.set_mix(first, engine.decoder.adapters.get(first))
        found[str(rows)] = min(step(sequences) for _ in range(STEPS * rounds))
        batch.close()
    batch = engine.decoder.batch_context(2, 4096)
    groups = [(mix, fill(engine, batch, mix, 1)) for mix in (first, second)]
    changes = []
    for _ in range(3 * rounds):
        for mix, sequences in groups:
            after, same = turn(mix, sequences)
            changes.append(after - same)
    batch.close()
    return {"step_ms": found, "change_of_mix_ms": statistics.median(changes)}


def single_ms(engine: Engine, rounds: int) -> float:
    """Milliseconds of a token of the only answer of a mix, in the engine's own context."""
    context = engine.decoder.pool.get(Mix.of({engine.pack.skills[0].name: 1.0}))
    ids = engine.model.tokenize(TEXT)
    times = []
    for _ in range(rounds):
        context.truncate(0)
        context.decode(ids[:PROMPT])
        for token in ids[PROMPT : PROMPT + STEPS]:
            began = time.perf_counter()
            context.decode([token])
            times.append(1000 * (time.perf_counter() - began))
    return min(times)


def one_by_one(engine: Engine, requests: Sequence[Request]) -> dict[str, Any]:
    """Answer requests routed, one after another: tokens by skill, and medians of what routing takes."""
    tokens: dict[str, list[tuple[int, int]]] = defaultdict(list)
    routing, seconds = [], 0.0
    for request in requests:
        answer = engine.generate(request.prompt, policy="top1")
        tokens[request.skill].append((answer.usage["prompt_tokens"], answer.usage["completion_tokens"]))
        routing.append(1000 * (answer.timings["features"] + answer.timings["gate"]))
        seconds += answer.timings["total"]
    return {
        "tokens": {skill: tokens[skill] for skill in sorted(tokens)},
        "routing_ms": statistics.median(routing),
        "one_by_one_s": seconds,
    }


def batch_s(engine: Engine, prompts: Sequence[str], **options: Any) -> dict[str, float]:
    """Answer prompts with `run_batch`; return seconds and tokens."""
    with tempfile.TemporaryDirectory() as directory:
        source, out = Path(directory) / "in.jsonl", Path(directory) / "out.jsonl"
        source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        began = time.perf_counter()
        assert run_batch(engine, source, out, **options)["errors"] == 0
        seconds = time.perf_counter() - began
        usage = [json.loads(line)["usage"] for line in out.read_text().splitlines()]
    return {
        "prompts": len(prompts),
        "seconds": seconds,
        "prompt_tokens": sum(row["prompt_tokens"] for row in usage),
        "answer_tokens": sum(row["completion_tokens"] for row in usage),
    }


@click.command()
@click.option("--pack", default=DEFAULT, show_default=True)
@click.option("--rounds", default=9, show_default=True)
def main(pack: str, rounds: int) -> None:
    """Measure, and write the results to results.json."""
    requests = [request for split in SPLITS for request in read_requests(DATA / f"{split}.jsonl")]
    prompts = [request.prompt for request in requests]
    labels = [request.prompt for request in requests if request.skill == LABEL_SKILL]
    reviews = [f"{i}. {text}" for i in range(10) for text in labels]
    began = time.perf_counter()
    with Engine.open(pack) as engine:
        engine.generate(prompts[0])
        found: dict[str, Any] = {"start_s": time.perf_counter() - began}
    with Engine.open(pack) as engine:
        found |= {"prefill_ms": prefill_ms(engine, rounds), "single_ms": single_ms(engine, rounds)}
        context = engine.decoder.pool.get(Mix.of({engine.pack.skills[0].name: 1.0}))
        found["kv_store_tokens"] = KV_STORE_BYTES * len(context.tokens) // context.get_kv().nbytes
        found |= step_ms(engine, rounds)
    with Engine.open(pack) as engine:
        found |= one_by_one(engine, requests)
    for name, rows, options in (
        ("batch", prompts, {"policy": "top1"}),
        ("batch of one label skill", reviews, {"mix": LABEL_SKILL}),
    ):
        with Engine.open(pack) as engine:
            found[name] = batch_s(engine, rows, **options)
    save("service times", found)


if __name__ == "__main__":
    main()
