"""One LoRA for many skills, with as many parameters as their adapters together and all their training rows.

    python benchmarks/multitask.py train --data DATA/skills --out RUN [--skill NAME]… [--share 1.0] [--max-steps N]
    python benchmarks/multitask.py score --data DATA/skills --out RUN [--rows 400]
    python benchmarks/multitask.py alone --data DATA/skills --out RUN [--skill NAME]… [--rows 400]

A baseline without a gate. It is trained on the rows of every skill's own adapter, or a share of them, in the same
phrasings; ``score`` writes its scores on each test set to benchmarks/results.json. For a share of the rows, ``alone``
trains the skills' own adapters on the same share. All commands resume after an interruption.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import msgspec
from adapters import pack_of, pinned_scores
from evaluate import save

from loramix import DEFAULT
from loramix.commands.train import Display
from loramix.eval.answers import AnswerStore
from loramix.formats.validate import check_adapter, read_base
from loramix.models import bases
from loramix.pack.pack import Pack
from loramix.paths import write_text
from loramix.runtime.engine import Engine
from loramix.train.data import Row, data_file, read_rows, take
from loramix.train.lora import train_skill
from loramix.train.metrics import kept
from loramix.train.recipe import Lora, Recipe, Source, Training, load_recipe, shipped

NAME = "multitask"
WHAT = "multitask.json"
LORA = Lora(
    r=1,
    lora_alpha=2,
    target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    skip_lowest=0.34,
)
"""The shape of most of the pack's adapters, at rank 1."""


def rank_for(pack: Pack, base: Path, skills: Sequence[str]) -> int:
    """Return the rank at which one adapter of shape `LORA` has as many parameters as the adapters of some skills."""
    shape = read_base(base)[1]
    contents = ((name, pack.adapter_bytes(name)) for name in skills)
    total = sum(check_adapter(content, shape, name).n_params for name, content in contents)
    layers = {f"blk.{layer}" for layer in LORA.layers(shape.n_layer)}
    sizes = [sum(size) for name, size in shape.tensors.items() if ".".join(name.split(".")[:2]) in layers]
    return round(total / sum(sizes))


def merged(recipes: Sequence[Recipe], rank: int) -> Recipe:
    """Build a recipe whose ``instructions`` have one key per skill and per source of a skill."""
    instructions = {
        f"{recipe.name}/{source}": [*group, *(recipe.instructions.get("any", []) if source != "any" else [])]
        for recipe in recipes
        for source, group in recipe.instructions.items()
    }
    return Recipe(
        name=NAME,
        description="All skills in one adapter.",
        metrics=["exact"],
        data=Source(license="see the skills", how="all skills' rows"),
        instructions=instructions,
        lora=msgspec.structs.replace(LORA, r=rank, lora_alpha=2.0 * rank),
        # half of the highest stable rate in a search over ranks of single skills, because of the larger rank
        training=Training(learning_rate=5e-4, evaluate_every=400, save_every=50, dev_rows=600),
    )


def rows_of(recipe: Recipe, rows: Sequence[Row], share: float, dev: int = 50) -> list[Row]:
    """Return a share of the skill's training rows, repeated by its number of epochs, and some dev rows."""

    def named(row: Row) -> Row:
        source = row.source if row.source in recipe.instructions else "any"
        return replace(row, source=f"{recipe.name}/{source}")

    train = take(kept(rows, recipe), "train")
    count = round(share * recipe.training.epochs * len(train))
    return [named(row) for row in [*itertools.islice(itertools.cycle(train), count), *take(rows, "dev", dev)]]


@click.group()
def main() -> None:
    """The multi-task baseline."""


DATA = click.option("--data", type=click.Path(exists=True, path_type=Path), required=True)
OUT = click.option("--out", type=click.Path(path_type=Path), required=True)
ROWS = click.option("--rows", type=int, help="Maximum number of rows per test set, as for loramix eval.")


@main.command()
@DATA
@OUT
@click.option("--skill", "skills", multiple=True, help="Use only this skill; can be repeated.")
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option(
    "--max-steps",
    type=click.IntRange(1),
    help="Stop after this step; the learning rate decays over the last quarter.",
)
def train(data: Path, out: Path, skills: tuple[str, ...], share: float, max_steps: int | None) -> None:
    """Train the baseline; resumes after an interruption."""
    recipes = [load_recipe(name) for name in skills or shipped()]
    rows = [row for r in recipes for row in rows_of(r, read_rows(data_file(data, r.name)), share)]
    random.Random(0).shuffle(rows)

    base = bases.resolve(DEFAULT)
    names = [recipe.name for recipe in recipes]
    recipe = merged(recipes, rank_for(Pack.load(DEFAULT), base, names))
    n_train = sum(row.split == "train" for row in rows)
    seen = min(n_train, max_steps * recipe.training.batch_size if max_steps else n_train)
    share *= seen / n_train
    what = (
        f"Rank {recipe.lora.r}, as many parameters as the {len(names)} adapters together, trained on {seen} rows: "
        f"{share:.0%} of the adapters' rows."
    )
    write_text(out / WHAT, json.dumps({"what": what, "names": names, "share": share}))
    with Display() as display:
        result = train_skill(recipe, rows, base, out, resume=True, max_steps=max_steps, report=display.update)
    click.echo(f"{result.directory}: dev loss {result.dev_loss:.4f}")


@main.command(name="score")
@DATA
@OUT
@ROWS
def score_command(data: Path, out: Path, rows: int | None) -> None:
    """Score the baseline on all test sets."""
    run = json.loads((out / WHAT).read_text())
    recipe = merged([load_recipe(name) for name in run["names"]], LORA.r)
    asked = dict.fromkeys(run["names"], NAME)
    found = measure({NAME: (out / "adapter", recipe)}, asked, data, out, rows)
    save(f"multitask of {len(run['names'])}", {"skills": found, "what": run["what"]})


@main.command()
@DATA
@OUT
@ROWS
@click.option("--skill", "skills", multiple=True, help="Use only this skill; can be repeated.")
def alone(data: Path, out: Path, rows: int | None, skills: tuple[str, ...]) -> None:
    """Train the skills' own adapters on as many rows as the baseline, and score them on their test sets."""
    run = json.loads((out / WHAT).read_text())
    adapters, base = {}, bases.resolve(DEFAULT)
    for name in skills or run["names"]:
        own, own_rows = load_recipe(name), read_rows(data_file(data, name))
        count = round(run["share"] * own.training.epochs * len(take(kept(own_rows, own), "train")))
        third = math.ceil(count / own.training.batch_size / 3)
        short = msgspec.structs.replace(
            own.training, epochs=1, rounds=1, evaluate_every=third, save_every=third, dev_rows=100
        )
        recipe, where = msgspec.structs.replace(own, training=short), out / "alone" / name
        with Display() as display:
            result = train_skill(
                recipe, own_rows, base, where, resume=True, max_rows=count, report=display.update
            )
        click.echo(f"{name}: {count} rows, dev loss {result.dev_loss:.4f}")
        adapters[name] = (result.directory, recipe)
    found = measure(adapters, {name: name for name in adapters}, data, out, rows)
    save(f"alone beside multitask of {len(run['names'])}", {"skills": found})


def measure(
    adapters: Mapping[str, tuple[Path, Recipe]],
    asked: Mapping[str, str],
    data: Path,
    out: Path,
    rows: int | None,
) -> dict[str, dict[str, Any]]:
    """Score adapters on the test sets of skills.

    Args:
        adapters: PEFT directories and their recipes, by name.
        asked: name of the adapter that answers, by skill.
        data: directory of the skills' data.
        out: directory for the answers.
        rows: maximum number of rows per test set.
    """
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        pack = pack_of(Path(directory) / NAME, DEFAULT, adapters)
        with AnswerStore(out / "answers.jsonl") as store, Engine(pack) as engine:
            for skill, name in asked.items():
                found[skill] = pinned_scores(engine, store, load_recipe(skill), data, rows, name)
                click.echo(f"{skill}: {found[skill]}")
    return found


if __name__ == "__main__":
    main()
