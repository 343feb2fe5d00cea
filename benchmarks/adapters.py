"""Helpers for benchmarks: a pack of trained PEFT adapters, and its scores on test sets."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loramix import Engine
from loramix.convert.adapter import convert_adapter
from loramix.eval.answers import AnswerStore
from loramix.eval.skills import ask, parts_of, score
from loramix.models import bases
from loramix.pack.edit import add_skill, new_pack
from loramix.pack.pack import Pack
from loramix.train.data import data_file, read_rows
from loramix.train.recipe import Recipe


def pack_of(directory: Path, base: str, adapters: Mapping[str, tuple[Path, Recipe]]) -> Pack:
    """Create a pack of converted PEFT adapters, described by their recipes, on a base given by name or path."""
    path = bases.resolve(base)
    digest = bases.digest(path)
    shutil.rmtree(directory, ignore_errors=True)
    new_pack(directory, base, digest)
    for name, (adapter, recipe) in adapters.items():
        file = directory.parent / f"{directory.name}-{name}.gguf"
        convert_adapter(adapter, path, file, base_name=path.name, base_sha256=digest)
        add_skill(directory, name, file, description=recipe.description, max_tokens=recipe.max_tokens)
    return Pack.load(directory)


def pinned_scores(
    engine: Engine, store: AnswerStore, recipe: Recipe, data: Path, rows: int | None, adapter: str
) -> dict[str, dict[str, Any]]:
    """Score an adapter of the engine's pack on a skill's test sets: ``{set: {measure: …}}``.

    Args:
        engine: engine of the pack.
        store: cache of the answers.
        recipe: recipe of the skill.
        data: directory with all skills' rows.
        rows: maximum number of rows per test set.
        adapter: name of the adapter in the pack.
    """
    found = {}
    for part in parts_of(recipe, read_rows(data_file(data, recipe.name)), rows):
        prompts = [ask(recipe, row) for row in part.rows]
        given = store.answers(engine, prompts, mix=f"{adapter}=1", max_tokens=recipe.max_tokens)
        found[part.name] = score(recipe, [answer.text for answer in given], part.rows)
    return found
