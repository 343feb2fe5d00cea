"""Cost of mixing: prefill, decoding, switches, the gate, activated LoRA, memory; ratios within one run.

    python benchmarks/speed.py --out speed.json [--pack PACK] [--base FILE] [--rounds 9]

Variants take turns in each round, and a ratio is the median over rounds of two times of the same round, so that load
from other programs affects both. The values of weights do not affect their cost, so random adapters are used for
shapes that no pack has.
"""

from __future__ import annotations

import json
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from loramix import DEFAULT, Engine
from loramix.formats.validate import BaseShape, read_base
from loramix.hardware import cpu_count, default_threads, machine
from loramix.models import bases
from loramix.models.fuse import fuse, write_lora
from loramix.models.mixing import Mix
from loramix.pack.pack import Pack
from loramix.paths import write_text
from loramix.runtime.decoder import DecodeRequest
from loramix.runtime.llama.context import Context
from loramix.runtime.llama.model import Model, quantize_rows
from loramix.runtime.probe import verdict_for
from loramix.runtime.token_mixer import TokenMixer
from loramix.train.examples import header

PREFILL, DECODE = 256, 32
TEXT = "The quick brown fox jumps over the lazy dog. " * 40
"""More than `PREFILL` tokens."""
fused = partial(fuse, quantize=quantize_rows)  # as in an engine on a quantized base


def random_adapter(shape: BaseShape, r: int, *, seed: int = 0) -> bytes:
    """Create a GGUF LoRA of random numbers on all linear layers of a base."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (out, width) in shape.tensors.items():
        if name.startswith("blk."):
            tensors[f"{name}.lora_a"] = rng.normal(0, 0.02, (r, width)).astype(np.float16)
            tensors[f"{name}.lora_b"] = rng.normal(0, 0.02, (out, r)).astype(np.float16)
    return write_lora(shape.architecture.name, float(r), tensors)


def decisions(engine: Engine, prompt: str, rounds: int) -> list[float]:
    """Milliseconds of each of some decisions: the gate's own time for a prompt, without the base's pass."""
    return [1000 * engine.route(prompt, policy="top1").timings["gate"] for _ in range(rounds)]


def report(out: Path, found: Mapping[str, Any]) -> None:
    """Write the results as JSON, and print them."""
    content = json.dumps(found, indent=1)
    write_text(out, content + "\n")
    click.echo(content)


def paired(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, float]]:
    """Time variants in turn.

    Args:
        variants: functions that return seconds; the others are compared with the first.
        rounds: number of measured rounds, after one to warm up.

    Returns:
        By variant the median ``ms`` and the median ``ratio`` to the first.
    """
    for variant in variants.values():
        variant()
    times = [{name: variant() for name, variant in variants.items()} for _ in range(rounds)]
    first = next(iter(variants))
    return {
        name: {
            "ms": 1000 * statistics.median(row[name] for row in times),
            "ratio": statistics.median(row[name] / row[first] for row in times),
        }
        for name in variants
    }


def prefill(context: Context, tokens: Sequence[int]) -> float:
    """Time the prefill of tokens without a cache, in seconds."""
    context.truncate(0)
    began = time.perf_counter()
    context.decode(tokens)
    return time.perf_counter() - began


def decode(context: Context, tokens: Sequence[int]) -> float:
    """Time decoding after a short prompt, in seconds per token."""
    context.truncate(0)
    context.decode(tokens[:64])
    began = time.perf_counter()
    for token in tokens[64 : 64 + DECODE]:
        context.decode([token])
    return (time.perf_counter() - began) / DECODE


def prefill_and_decode(contexts: Mapping[str, Context], rounds: int) -> dict[str, Any]:
    """Time prefill and decoding in contexts of one model, compared as in `paired`."""
    model = next(iter(contexts.values())).model
    ids = model.tokenize(TEXT)[:PREFILL]
    return {
        work.__name__: paired({n: partial(work, c, ids) for n, c in contexts.items()}, rounds)
        for work in (prefill, decode)
    }


def mixes(base: Path, contents: Mapping[str, bytes], threads: int, rounds: int) -> dict[str, Any]:
    """Time prefill and decoding with adapters, compared with the bare base.

    Args:
        base: the GGUF.
        contents: GGUF LoRA by variant name.
        threads: number of threads.
        rounds: see `paired`.
    """
    with Model(base, use_extra_bufts=verdict_for(base).use_extra_bufts) as model:
        contexts = {"bare base": Context(model, n_ctx=512, n_threads=threads)}
        for name, content in contents.items():
            mix = [(model.load_adapter(content, name), 1.0)]
            contexts[name] = Context(model, mix, n_ctx=512, n_threads=threads)
        return prefill_and_decode(contexts, rounds)


def threads_of(base: Path, rounds: int) -> dict[str, Any]:
    """Time the bare base by number of threads: one, the default, one per logical processor."""
    counts = sorted({1, default_threads(), cpu_count()})
    with Model(base, use_extra_bufts=verdict_for(base).use_extra_bufts) as model:
        contexts = {str(n): Context(model, n_ctx=512, n_threads=n) for n in counts}
        return {"default": default_threads(), **prefill_and_decode(contexts, rounds)}


def pack_mixes(pack: Pack) -> dict[str, bytes]:
    """Return each skill of a pack as in an engine, and fused blends of two and of four."""
    contents = {skill.name: pack.adapter_bytes(skill.name) for skill in pack.skills}
    names = list(contents)
    found = {name: fused([(content, 1.0)]) for name, content in contents.items()}
    for count in (2, 4):
        if len(names) >= count:
            found[f"blend of {count}"] = fused([(contents[name], 1 / count) for name in names[-count:]])
    return found


def switches(engine: Engine, rounds: int) -> dict[str, Any]:
    """Measure milliseconds to switch to a mix used before, and to a new blend."""
    names = [skill.name for skill in engine.pack.skills]
    prompt = engine.model.chat([{"role": "user", "content": "One, two, three, four."}])

    def to(mix: Mix) -> float:
        began = time.perf_counter()
        context = engine.decoder.pool.get(mix)
        took = time.perf_counter() - began
        context.decode(prompt)
        context.truncate(0)
        return 1000 * took

    known = [Mix.of({name: 1.0}) for name in names[:2]]
    for mix in known:
        to(mix)
    seen = [to(known[i % 2]) for i in range(40 * rounds)]
    steps = np.linspace(0.1, 0.9, 3 * rounds)
    fresh = [to(Mix.of({names[0]: float(x), names[1]: float(1 - x)})) for x in steps]
    return {
        "seen_p50_ms": statistics.median(seen),
        "seen_p99_ms": float(np.quantile(seen, 0.99)),
        "new_blend_p50_ms": statistics.median(fresh),
        "new_blend_p99_ms": float(np.quantile(fresh, 0.99)),
    }


def requests(plain: Engine, late: Engine, rounds: int) -> dict[str, Any]:
    """Measure the time to first token of a 100-token prompt with the gate, and after a switch in a 1,000-token chat."""
    names = [skill.name for skill in plain.pack.skills]
    count = 0

    def text(words: int) -> str:
        nonlocal count
        count += 1  # each prompt is new, so that no cache helps
        return f"{count} is the number. " + "All good things come to an end. " * (words // 8)

    def first(engine: Engine, gate: bool) -> float:
        prompt = text(85)
        began = time.perf_counter()
        if gate:
            engine.route(prompt)
        engine.generate(prompt, mix=names[0], max_tokens=1)
        return time.perf_counter() - began

    def switch(engine: Engine) -> float:
        chat = [{"role": "user", "content": text(950)}]
        answer = engine.generate(chat, mix=names[0], max_tokens=4)
        chat += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "And so?"}]
        began = time.perf_counter()
        engine.generate(chat, mix=names[1], max_tokens=1)
        return time.perf_counter() - began

    return {
        "first token, 100-token prompt": paired(
            {
                "no gate, bare skill": lambda: first(plain, False),
                "gate, plain adapter": lambda: first(plain, True),
                "gate, late adapter": lambda: first(late, True),
            },
            rounds,
        ),
        "first token after a switch, 1,000-token chat": paired(
            {"plain adapter": lambda: switch(plain), "late adapter": lambda: switch(late)}, rounds
        ),
    }


TWO_THINGS = (
    "Summarize the emotional tone of this review: The actors try hard, but the story drags on and the ending "
    "makes no sense.",
    "Summarize the emotional tone of this review: A warm, funny film that my whole family loved.",
    "Give a one-line summary and the sentiment: The tent leaks, and the shop never answered my letters.",
)


ANSWER = (
    "The film tells of a family and its summer by the sea, the actors are charming, and the writer was so happy "
    "with all of it that nobody could call this review anything but positive."
)


def tokenwise(engine: Engine, rounds: int) -> dict[str, Any]:
    """Measure milliseconds per token if the mix may change at each, compared with the same tokens under top-1.

    The last variant has a gate that is certain of one skill for eight tokens and then of the other, so that the mix
    changes.
    """
    asked = [text for text in TWO_THINGS if len(engine.route(text, policy="token").mix) > 1]
    said = engine.model.tokenize(ANSWER)[:DECODE]
    moves = 0

    def follow(policy: str, moved: bool, text: str) -> float:
        nonlocal moves
        prepared = engine.prepare(text)
        prompt = prepared.tokens
        route = engine.route(text, policy=policy)
        moving = TokenMixer(route.key) if policy == "token" else None
        mix = moving.mix if moving else route.key
        engine.decode(DecodeRequest(mix, prompt, len(prompt)))
        began = time.perf_counter()
        for i in range(len(said)):
            engine.decode(DecodeRequest(mix, prompt + said[: i + 1], len(prompt)))
            if moving:
                reading, count = engine.reread(prepared, said[: i + 1], mix)
                if moved:
                    reading, count = {(moving.first, moving.second)[i // 8 % 2]: 1.0}, 1
                before, mix = mix, moving.follow(reading, count)
                moves += not moved and mix != before
        return (time.perf_counter() - began) / len(said)

    def all_of(policy: str, moved: bool = False) -> float:
        return statistics.mean(follow(policy, moved, text) for text in asked)

    variants = {policy: partial(all_of, policy) for policy in ("top1", "blend", "token")}
    found = paired({**variants, "token, moved": partial(all_of, "token", moved=True)}, rounds)
    return {"per token": found, "changes of mix": moves / (rounds + 1), "prompts": len(asked)}


@click.command()
@click.option("--pack", default=DEFAULT, show_default=True)
@click.option(
    "--base", type=click.Path(exists=True, path_type=Path), help="Another base, with random adapters."
)
@click.option("--rounds", default=9, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(pack: str, base: Path | None, rounds: int, out: Path) -> None:
    """Run the benchmark and write JSON."""
    threads = default_threads()
    found: dict[str, Any] = {"machine": machine()}
    if base is not None:
        shape = read_base(base)[1]
        contents = {
            "r8 on all linear layers": fused([(random_adapter(shape, 8), 1.0)]),
            "blend of 2": fused([(random_adapter(shape, 8, seed=i), 0.5) for i in (1, 2)]),
            "blend of 4": fused([(random_adapter(shape, 8, seed=i), 0.25) for i in range(4)]),
        }
        found[base.name] = mixes(base, contents, threads, rounds)
    else:
        source = Pack.load(pack)
        path = bases.resolve(source.manifest.base.name)
        found["pack"] = mixes(path, pack_mixes(source), threads, rounds)
        found["threads"] = threads_of(path, rounds)
        with Engine(source) as plain, Engine(source) as late:
            found["switches"] = switches(plain, rounds)
            found["token-wise"] = tokenwise(plain, rounds)
            first, second = (plain.model.chat([{"role": "user", "content": text}]) for text in "ab")
            for (
                file
            ) in late.decoder.adapters._files.values():  # gives the cost of a pack of activated adapters
                file.invocation = tuple(header(first, second))
            found |= requests(plain, late, rounds)
        found["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    report(out, found)


if __name__ == "__main__":
    main()
