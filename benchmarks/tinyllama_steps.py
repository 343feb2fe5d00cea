"""TinyLlama from data to chat: trains two adapters for some steps, converts them, fits a gate, answers.

    python benchmarks/tinyllama_steps.py --base tinyllama-shape-Q4_K_M.gguf --data DATA --out RUN [--steps 2]

Measures time and memory of each step. The base may have TinyLlama's shape with random weights (tinyllama_shape.py),
which do not affect the cost. Prints a table of the time that each shipped recipe would take.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import click
import msgspec
from tinyllama_shape import measured

from loramix.paths import write_text
from loramix.train.data import data_file, prompts, read_rows, take
from loramix.train.examples import token_ids
from loramix.train.metrics import kept
from loramix.train.recipe import RECIPES, Recipe, recipe_for, shipped

FILE = click.Path(exists=True, path_type=Path)
NAME = "tinyllama-1.1b"
SKILLS = ("spam", "facts")
GATE_ROWS = 200
PER_SKILL = 40  # prompts of the gate; the default of 4,000 in total would take three quarters of an hour
DEV_ROWS = 8
SAMPLE = 300


def tokens_of(recipe: Recipe, data: Path, base: Path) -> int:
    """Estimate the number of tokens of a complete training from a sample of rows."""
    rows = kept(read_rows(data), recipe)
    some = take(rows, "train", SAMPLE)
    asked = prompts(some, recipe, "0")
    found = token_ids(base, [(text, row.target) for text, row in zip(asked, some, strict=True)])
    n_rows = sum(row.split == "train" for row in rows)
    most = recipe.training.max_length
    return int(sum(min(len(e.ids), most) for e in found) / len(found) * n_rows * recipe.training.epochs)


def cut_data(data: Path, out: Path) -> None:
    """Keep some rows of each split of each skill, so that the gate's features take minutes, not hours."""
    out.mkdir(parents=True, exist_ok=True)
    for skill in SKILLS:
        rows = read_rows(data_file(data, skill))
        some = [*take(rows, "train", GATE_ROWS), *take(rows, "dev", GATE_ROWS)]
        lines = [json.dumps({"split": row.split, "input": row.input, "target": row.target}) for row in some]
        write_text(out / f"{skill}.jsonl", "\n".join(lines) + "\n")


def recipe_file(out: Path, skill: str) -> Path:
    """Write a recipe with the changes for TinyLlama, because a random base has another name."""
    recipe = recipe_for(skill, NAME)
    training = msgspec.structs.replace(recipe.training, dev_rows=DEV_ROWS)  # a complete dev set takes minutes
    shipped_text = (RECIPES / f"{skill}.toml").read_text(encoding="utf-8")
    head, tail = shipped_text.split("[lora]")[0], shipped_text.split("[instructions]")[1]
    tables = {"lora": recipe.lora, "training": training}
    lines = [
        f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in msgspec.to_builtins(table).items())
        for name, table in tables.items()
    ]
    path = out / f"{skill}.toml"
    write_text(path, head + "\n".join(lines) + "\n[instructions]" + tail)
    return path


@click.command()
@click.option("--base", type=FILE, required=True)
@click.option("--data", type=FILE, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--steps", default=2, show_default=True)
def main(base: Path, data: Path, out: Path, steps: int) -> None:
    """Print a line per step, then the table."""
    cut_data(data, out / "data")
    pack, loramix = out / "pack", [sys.executable, "-m", "loramix"]

    def step(what: str, *words: object) -> None:
        click.echo(f"{what}: {measured([*loramix, *map(str, words)])}")

    rates = {}
    for skill, way in [
        (SKILLS[0], "--gradient-checkpointing"),
        *((s, "--no-gradient-checkpointing") for s in SKILLS),
    ]:
        run = out / f"{skill}{way.removesuffix('-gradient-checkpointing')}"
        options = ["--data", data_file(data, skill), "--base", base, "--out", run, "--max-steps", steps, way]
        if not (run / "adapter").is_dir():
            step(f"train {skill} {way}", "train", "skill", recipe_file(out, skill), *options)
        rates[skill, way] = json.loads((run / "log.jsonl").read_text().splitlines()[-1])["tokens_per_second"]
        click.echo(f"  {rates[skill, way]} tokens/s")
    subprocess.run([*loramix, "pack", "new", str(pack), "--base", str(base)], check=False)
    for skill in SKILLS:
        file = out / f"{skill}.gguf"
        run = out / f"{skill}--no"
        step(
            f"convert {skill}",
            "convert",
            "adapter",
            run / "adapter",
            "-o",
            file,
            "--base",
            base,
            "--no-check",
        )
        subprocess.run([*loramix, "pack", "add", str(pack), skill, str(file), "--recipe", skill], check=True)
    step(
        "train gate",
        "train",
        "gate",
        pack,
        "--data-dir",
        out / "data",
        "--out",
        out / "gate",
        "--per-skill",
        PER_SKILL,
    )
    step("run", "run", "-p", pack, "--show-route", "-n", 16, "Is this spam? You won a prize!")
    began = time.monotonic()
    talk = "Is this spam? Call now!\nSay these facts: name[The Mill], food[French]\n/quit\n"
    done = subprocess.run(
        [*loramix, "chat", "-p", str(pack), "-n", "8"], input=talk, text=True, capture_output=True, check=True
    )
    click.echo(f"chat of two turns: {time.monotonic() - began:.0f} s\n{done.stdout}")
    fastest = {skill: rates[skill, "--no-gradient-checkpointing"] for skill in SKILLS}
    click.echo("| skill | tokens | hours |\n|---|---|---|")
    for name in shipped():
        recipe = recipe_for(name, NAME)
        count = tokens_of(recipe, data_file(data, name), base)
        click.echo(f"| {name} | {count / 1e6:.2f} million | {count / min(fastest.values()) / 3600:.1f} |")


if __name__ == "__main__":
    main()
