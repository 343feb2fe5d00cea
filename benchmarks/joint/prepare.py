"""Tokenizes the rows of broad recipes with the runtime's tokenizer, for ``train``; needs Loramix, no GPU.

    python -m benchmarks.joint.prepare --base smollm2-135m --data DATA --out PREPARED --skill spam --passes 2

Writes a file SKILL.npz: token ids of some passes over the training rows, each pass with other rows and phrasings, of
dev rows, and for skills with labels of test rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from msgspec import structs

from loramix.models import bases
from loramix.paths import atomic_write
from loramix.train.data import Row, frames, prompts
from loramix.train.examples import PromptedRow, token_ids, tokenize
from loramix.train.label_skill import labels_of
from loramix.train.recipe import Recipe, load_recipe
from loramix.train.sources import dev_rows, read_sources, sample

from . import JointError

PATH = click.Path(path_type=Path)


def shifted(recipe: Recipe, rows: int | None, made: float | None) -> Recipe:
    """Return a recipe with another number of rows a pass, or another share of rows made by rule.

    Args:
        recipe: recipe with sources.
        rows: rows of a pass; None: the recipe's.
        made: share between 0 and 1; None: the recipe's.

    Raises:
        JointError: the recipe has no rows made by rule, or no others.
    """
    sources, data = recipe.data.sources, recipe.data
    if made is not None:
        by_rule = sum(source.weight for source in sources if source.made)
        others = sum(source.weight for source in sources) - by_rule
        if not (by_rule and others):
            raise JointError(f"recipe {recipe.name!r} needs rows made by rule and others; leave --made out.")
        factor = made / (1 - made) * others / by_rule
        sources = tuple(
            structs.replace(one, weight=one.weight * factor) if one.made else one for one in sources
        )
    return structs.replace(recipe, data=structs.replace(data, sources=sources, rows=rows or data.rows))


def test_rows(recipe: Recipe, found: Sequence[Sequence[Row]], most: int) -> list[Row]:
    """Return test rows, at most ``most`` of each source, each input once.

    Args:
        recipe: the recipe.
        found: rows of its sources. Other splits that begin with ``test`` count as sources of their own.
        most: rows of a source.
    """
    groups: dict[str, dict[str, Row]] = {}
    for source, rows in zip(recipe.data.sources, found, strict=True):
        if source.made or source.target is not None:  # rows made by rule, and rows of another task
            continue
        for row in rows:
            if row.split.startswith("test"):
                name = row.source + row.split.removeprefix("test")
                groups.setdefault(name, {}).setdefault(row.input, replace(row, source=name))
    chosen = []
    for name, by_input in groups.items():
        own = list(by_input.values())
        random.Random(f"test-{recipe.name}-{name}").shuffle(own)
        chosen += own[:most]
    return chosen


def tokenized(
    base: Path, recipe: Recipe, rows: Sequence[Row], seed: str, length: int, labels: Sequence[str] | None
) -> dict[str, Any]:
    """Tokenize rows; those too long are cut or dropped as in training on a CPU.

    Args:
        base: GGUF of the base.
        recipe: the recipe, for the phrasings.
        rows: the rows.
        seed: seed of the phrasings.
        length: most tokens of a row.
        labels: for rows to evaluate: labels of the skill, which may be none. For training rows: None.

    Returns:
        Arrays by name, see `rows.Rows`.

    Raises:
        InvalidData: too many rows are too long.
    """
    asked = [
        PromptedRow(prompt, frame, row.target, row.line)
        for row, prompt, frame in zip(
            rows, prompts(rows, recipe, seed), frames(rows, recipe, seed), strict=True
        )
    ]
    examples = tokenize(base, asked, length, lambda line: click.echo(f"{recipe.name}: {line}", err=True))
    kept = [(row, example) for row, example in zip(rows, examples, strict=True) if example is not None]
    found: dict[str, Any] = {
        "ids": np.concatenate([example.ids for _, example in kept]).astype(np.int32),
        "lengths": np.array([len(example.ids) for _, example in kept], np.int32),
        "answers": np.array([example.n_answer for _, example in kept], np.int32),
    }
    if labels is not None:
        names = sorted({row.source for row, _ in kept})
        found["source_names"] = np.array(names)
        found["sources"] = np.array([names.index(row.source) for row, _ in kept], np.int32)
    if labels:
        numbers = {label: number for number, label in enumerate(labels)}
        found["labels"] = np.array([numbers.get(row.target, -1) for row, _ in kept], np.int32)
    return found


def first_tokens(base: Path, labels: Sequence[str]) -> Any:
    """Return the first token of each label, (N,) int32; empty if two labels share theirs."""
    if not labels:
        return np.zeros(0, np.int32)
    examples = token_ids(base, [("x", label) for label in labels])
    first = np.array([example.ids[-example.n_answer] for example in examples], np.int32)
    return first if len(set(first.tolist())) == len(labels) else first[:0]


def prepare(
    base: Path, recipe: Recipe, data: Path, passes: int, length: int, dev: int, test: int
) -> dict[str, Any]:
    """Return the arrays of a skill's file, see `rows.read_skill`.

    Args:
        base: GGUF of the base.
        recipe: recipe with sources.
        data: directory of their files.
        passes: number of passes over the training rows.
        length: most tokens of a row.
        dev: most dev rows.
        test: most test rows of each source.

    Raises:
        JointError: the recipe has no sources.
        NotFound, InvalidData: see `read_sources` and `tokenize`.
    """
    if not recipe.data.sources:
        raise JointError(f"recipe {recipe.name!r} has no data.sources; name a broad one, e.g. broad/spam.")
    found = read_sources(recipe, data)
    labels = labels_of(recipe, [row for rows in found for row in rows])
    tokens = first_tokens(base, labels)
    arrays = {
        "labels": np.array(labels, np.str_),
        "label_tokens": tokens,
        "base_sha256": np.array(bases.digest(base)),
    }
    parts: list[tuple[str, list[Row], str, Sequence[str] | None]] = [
        (f"pass{number}", sample(recipe, found, number), f"joint-{recipe.training.seed}-{number}", None)
        for number in range(passes)
    ]
    parts.append(("dev", dev_rows(recipe, found, dev), "dev", labels))
    if labels and (rows := test_rows(recipe, found, test)):
        parts.append(("test", rows, "test", labels))
    for name, rows, seed, known in parts:
        part = tokenized(base, recipe, rows, seed, length, known)
        arrays |= {f"{name}.{key}": array for key, array in part.items()}
        click.echo(f"{recipe.name} {name}: {len(part['lengths'])} rows, {len(part['ids'])} tokens")
    return arrays


@click.command()
@click.option("--base", required=True, help="Name or GGUF of the base.")
@click.option("--data", type=PATH, required=True, help="Directory of the recipes' files.")
@click.option("--out", type=PATH, required=True, help="Directory to write.")
@click.option(
    "--skill",
    "skills",
    multiple=True,
    required=True,
    help="Shipped broad recipe, or a TOML file; repeatable.",
)
@click.option("--passes", default=2, show_default=True, help="Passes over the training rows.")
@click.option("--rows", type=click.IntRange(min=1), help="Rows of a pass; by default the recipe's.")
@click.option(
    "--made",
    type=click.FloatRange(0, 1, True, True),
    help="Share of rows made by rule; by default the recipe's.",
)
@click.option("--length", default=512, show_default=True, help="Most tokens of a row.")
@click.option("--dev-rows", default=480, show_default=True)
@click.option("--test-rows", default=1000, show_default=True, help="Most test rows of each source.")
def main(
    base: str,
    data: Path,
    out: Path,
    skills: tuple[str, ...],
    passes: int,
    rows: int | None,
    made: float | None,
    length: int,
    dev_rows: int,
    test_rows: int,
) -> None:
    """Tokenize the rows of skills."""
    path = bases.resolve(base)
    for skill in skills:
        recipe = load_recipe(skill if Path(skill).is_file() else f"broad/{skill}")
        arrays = prepare(path, shifted(recipe, rows, made), data, passes, length, dev_rows, test_rows)
        with atomic_write(out / f"{recipe.name}.npz") as file:
            np.savez_compressed(file, **arrays)


if __name__ == "__main__":
    main()
