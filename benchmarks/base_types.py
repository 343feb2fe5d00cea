"""Perplexity and speed of the default base in several tensor types, in one run.

    python benchmarks/base_types.py --source BASE.gguf --data DATA/skills/summarize.jsonl.gz

Converts the source file to each type, scores the first 100 tokens of dev inputs one by one, which also times
decoding, and prefills 500 tokens. Prints medians, and ratios to the source's type.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from loramix.formats.requantize import requantize
from loramix.runtime.llama.context import Context
from loramix.runtime.llama.model import Model
from loramix.train.data import read_rows, take

TYPES = {
    "Q4_1": {},
    "Q4_0 blocks, Q8_0 embedding": {"blk.": "Q4_0"},
    "Q4_0 everywhere": {"blk.": "Q4_0", "token_embd": "Q4_0"},
    "Q8_0": {"blk.": "Q8_0"},
}


def measure(path: Path, texts: list[str], threads: int) -> tuple[float, float, float]:
    """Return (perplexity, prefill tokens/s, decode tokens/s) of a base."""
    losses: list[float] = []
    decode: list[float] = []
    with Model(path) as model:
        context = Context(model, n_ctx=1024, n_threads=threads)
        for text in texts:
            ids = model.tokenize(text)[:100]
            context.truncate(0)
            began = time.perf_counter()
            for token, following in itertools.pairwise(ids):
                logits = context.decode([token])
                top = logits.max()
                losses.append(float(np.log(np.exp(logits - top).sum()) + top - logits[following]))
            decode.append((len(ids) - 1) / (time.perf_counter() - began))
        long = (model.tokenize(" ".join(texts)) * 2)[:500]
        prefill = []
        for _ in range(7):
            context.truncate(0)
            began = time.perf_counter()
            context.decode(long)
            prefill.append(len(long) / (time.perf_counter() - began))
    return float(np.exp(np.mean(losses))), statistics.median(prefill), statistics.median(decode)


@click.command()
@click.option("--source", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--rows", default=60, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(source: Path, data: Path, rows: int, threads: int) -> None:
    """Print a Markdown table."""
    texts = [row.input for row in take(read_rows(data), "dev", rows)]
    print("| type | MB | perplexity | prefill tok/s (ratio) | decode tok/s (ratio) |\n|---|---|---|---|---|")
    first: tuple[float, float] | None = None
    with tempfile.TemporaryDirectory() as directory:
        for name, types in TYPES.items():
            path = source
            if types:
                path = Path(directory) / "base.gguf"
                requantize(source, path, types)
            perplexity, prefill, decode = measure(path, texts, threads)
            first = first or (prefill, decode)
            size = path.stat().st_size / 1e6
            print(
                f"| {name} | {size:.0f} | {perplexity:.2f} | {prefill:.0f} ({prefill / first[0]:.2f}) "
                f"| {decode:.0f} ({decode / first[1]:.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
