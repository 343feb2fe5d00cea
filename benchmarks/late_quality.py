"""Activated adapters compared with the default pack's: the same recipes, rows, steps and sizes.

    for SKILL in spam facts …: sed '/^\\[data\\]/i activation = "answer"' loramix/train/recipes/SKILL.toml > SKILL.toml
        loramix train skill SKILL.toml --data DATA/SKILL.jsonl.gz --out RUNS/SKILL
    python benchmarks/late_quality.py --runs RUNS --data DATA --out OUT

Both answer the same test rows with the adapter given, in llama.cpp. The command resumes after an interruption.
"""

from __future__ import annotations

from pathlib import Path

import click
from adapters import pack_of, pinned_scores
from evaluate import save

from loramix import DEFAULT, Engine
from loramix.eval.answers import AnswerStore
from loramix.pack.pack import Pack
from loramix.train.recipe import load_recipe

PATH = click.Path(exists=True, path_type=Path)


@click.command()
@click.option("--runs", type=PATH, required=True, help="Run directories of training, NAME/adapter.")
@click.option("--data", type=PATH, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Answers, kept.")
@click.option("--rows", default=300, show_default=True)
@click.option("--threads", type=int)
@click.option("--record/--no-record", default=True, show_default=True, help="In benchmarks/results.json.")
def main(runs: Path, data: Path, out: Path, rows: int, threads: int | None, record: bool) -> None:
    """Print a Markdown table."""
    out.mkdir(parents=True, exist_ok=True)
    adapters = {
        path.parent.name: (path, load_recipe(path.parent.name)) for path in sorted(runs.glob("*/adapter"))
    }
    late = pack_of(out.absolute() / "late", DEFAULT, adapters)
    names = [skill.name for skill in late.skills]
    packs = {"plain": Pack.load(DEFAULT).directory, "late": late.directory}
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for kind, directory in packs.items():
        store = AnswerStore(out / f"{kind}.jsonl")
        with Engine.open(directory, n_threads=threads) as engine:
            for name in names:
                for part, scores in pinned_scores(engine, store, load_recipe(name), data, rows, name).items():
                    found.setdefault(f"{name}, {part}", {})[kind] = scores
    print("| skill, test set | measure | plain | late |\n|---|---|---|---|")
    for name, both in found.items():
        for measure in both["plain"]:
            cells = (
                f"{e['value']:.3f} ({e['low']:.3f}–{e['high']:.3f})"
                for e in (both[kind][measure] for kind in packs)
            )
            print(f"| {name} | {measure} | " + " | ".join(cells) + " |")
    if record:
        save("late_quality", {"rows": rows, "sets": found})


if __name__ == "__main__":
    main()
