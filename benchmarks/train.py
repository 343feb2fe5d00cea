"""Cost of a training step in float32 and bfloat16, plain and compiled, on the same batches in turn.

    python benchmarks/train.py --base smollm2-135m --base qwen.gguf --data DATA [--skill sentiment] [--steps 6]

Each variant runs the real training in a separate process and pauses after each step, so that all variants run the
same step in turn and load from other programs affects all of them. CPU time is measured too: with one thread it
shows on a busy machine what the elapsed time would be on an idle one.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from loramix.train.data import data_file, read_rows
from loramix.train.recipe import recipe_for

PLAIN = "float32"
WAYS = (PLAIN, "bfloat16", "float32 compiled", "bfloat16 compiled")


def work(way: str, base: str, skill: str, data: Path, rows: int, threads: int) -> None:
    """Train in this process: write a line of JSON per step to stdout, and wait for a line on stdin before the next."""
    import torch

    from loramix.models import bases
    from loramix.train import lora
    from loramix.train.peft_model import attach

    torch.set_num_threads(threads)
    kind, _, compiled = way.partition(" ")
    # replace functions that the training loop calls, in its module
    vars(lora)["autocast_dtype"] = lambda: getattr(torch, kind)

    def attached(model: Any, shape: Any) -> Any:
        found = attach(model, shape)
        for layer in found.get_base_model().model.layers if compiled else ():
            layer.compile(dynamic=True)
        print(json.dumps({"loaded": time.monotonic() - began}), flush=True)
        sys.stdin.readline()
        spent[0] = time.process_time()
        return found

    vars(lora)["attach"] = attached
    recipe = recipe_for(skill, base)
    changed = {"evaluate_every": 10**6, "save_every": 10**6, "dev_rows": 1}
    recipe = msgspec.structs.replace(recipe, training=msgspec.structs.replace(recipe.training, **changed))
    read, spent = [0.0], [0.0]

    def report(progress: Any) -> None:
        total = progress.tokens_per_second * progress.seconds_per_step * progress.step
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        step = {"tokens": round(total - read[0]), "loss": progress.loss, "bytes": most}
        step["cpu"] = time.process_time() - spent[0]
        read[0] = total
        print(json.dumps(step), flush=True)
        if not sys.stdin.readline():
            sys.exit(0)
        spent[0] = time.process_time()

    began = time.monotonic()
    path = bases.resolve(base)
    with tempfile.TemporaryDirectory() as out:
        lora.train_skill(
            recipe, read_rows(data_file(data, skill)), path, Path(out), max_rows=rows, report=report
        )


class Worker:
    """A variant of training, paused between steps."""

    def __init__(self, way: str, *words: object) -> None:
        command = [sys.executable, __file__, "--way", way, *map(str, words)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.loaded = self._read()["loaded"]

    def step(self) -> dict[str, Any]:
        """Run one step; return its tokens, loss, seconds and the peak memory so far."""
        began = time.monotonic()
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found = self._read()
        return {**found, "seconds": time.monotonic() - began}

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise click.ClickException(f"a worker ended with exit code {self.process.wait()}")
        return dict(json.loads(line))

    def close(self) -> None:
        """Stop it."""
        self.process.kill()
        self.process.wait()


def measure(
    base: str, skill: str, data: Path, ways: tuple[str, ...], steps: int, threads: int
) -> Iterator[str]:
    """Return the rows of the table, one per variant."""
    words = ["--base", base, "--skill", skill, "--data", data, "--steps", steps, "--threads", threads]
    workers = {way: Worker(way, *words) for way in ways}
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(steps + 1):  # the first one warms up or compiles
        turn = number % len(ways)
        for way in (*ways[turn:], *ways[:turn]):
            found[way].append(workers[way].step())
            click.echo(f"{base} {skill} {way} {number}: {found[way][-1]}", err=True)
    for worker in workers.values():
        worker.close()
    for way, (first, *later) in found.items():
        plain = found[PLAIN][1:] if PLAIN in found else later

        def both(key: str, later: list[dict[str, Any]] = later, plain: list[dict[str, Any]] = plain) -> str:
            speed = statistics.median(step["tokens"] / step[key] for step in later)
            ratio = statistics.median(a[key] / b[key] for a, b in zip(plain, later, strict=True))
            return f"{speed:.0f} ({ratio:.2f})"

        yield (
            f"| {Path(base).stem} | {skill} | {way} | {both('seconds')} | {both('cpu')} | {first['cpu']:.0f} s "
            f"| {workers[way].loaded:.0f} s | {later[-1]['bytes'] / 1e9:.2f} GB | {later[-1]['loss']:.4f} |"
        )


@click.command()
@click.option("--base", "bases", multiple=True, required=True, help="Name or GGUF; can be repeated.")
@click.option("--skill", "skills", multiple=True, default=["sentiment"], show_default=True)
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--ways", default=",".join(WAYS), show_default=True)
@click.option("--steps", default=6, show_default=True, help="Number of measured steps, after one to warm up.")
@click.option("--threads", default=len(os.sched_getaffinity(0)), show_default="available cores")
@click.option("--way", hidden=True)
def main(
    bases: tuple[str, ...],
    skills: tuple[str, ...],
    data: Path,
    ways: str,
    steps: int,
    threads: int,
    way: str | None,
) -> None:
    """Print a Markdown table."""
    if way:
        work(way, bases[0], skills[0], data, 16 * (steps + 2), threads)
        return
    print(
        "| base | skill | way | tokens/s (against float32) | a CPU second (the same) | first step, CPU | load "
        "| most memory | loss |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for base, skill in itertools.product(bases, skills):
        for row in measure(base, skill, data, tuple(ways.split(",")), steps, threads):
            print(row, flush=True)


if __name__ == "__main__":
    main()
