"""The labels of a skill that classifies, and the calibration of their probabilities on ``dev`` rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loramix.pack.manifest import MAX_LABELS, Labels
from loramix.runtime.children import label_temperature
from loramix.train.data import Row, prompts, read_rows, take
from loramix.train.recipe import Recipe
from loramix.train.sources import data_files, dev_rows, read_sources

MIN_ROWS = 20
"""Fewest ``dev`` rows that a temperature is fitted on."""
MAX_ROWS = 300
ROWS_PER_LABEL = 5
"""Fewest training rows per answer, on average, for answers to be taken as labels."""


def labels_of(recipe: Recipe, rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the labels of a recipe: its own or, if accuracy is its main measure, the answers of its rows.

    Args:
        recipe: the skill's recipe.
        rows: its rows of splits ``train`` and ``dev``; answers are labels if there are few, and none in ``dev`` is new.

    Returns:
        The labels; empty for a skill that answers in free text.
    """
    if recipe.labels or recipe.metrics[0] != "accuracy":
        return tuple(recipe.labels)
    answers = [row.target for row in rows if row.split == "train"]
    found = sorted(set(answers))
    new = {row.target for row in rows if row.split == "dev"} - set(found)
    few = 2 <= len(found) <= min(MAX_LABELS, len(answers) // ROWS_PER_LABEL)
    return tuple(found) if few and not new else ()


def label_rows(recipe: Recipe, data_dir: Path) -> list[Row]:
    """Return the rows that `calibrated` needs, from a recipe's one file or its sources.

    Raises:
        NotFound, InvalidData: see `read_rows` and `read_sources`.
    """
    if not recipe.data.sources:
        return read_rows(data_files(recipe, data_dir)[0])
    found = read_sources(recipe, data_dir)
    train = [row for rows in found for row in rows if row.split == "train"]
    return [*train, *dev_rows(recipe, found, MAX_ROWS)]


def calibrated(recipe: Recipe, rows: Sequence[Row], base: Path, adapter: Path) -> Labels:
    """Return a skill's labels with the temperature that calibrates their probabilities.

    Args:
        recipe: the skill's recipe.
        rows: its rows; the temperature is fitted on at most `MAX_ROWS` of ``dev``, each in one phrasing.
        base: the GGUF base.
        adapter: the GGUF LoRA, validated.

    Returns:
        The labels; without a temperature if ``dev`` has fewer than `MIN_ROWS` rows with a label.

    Raises:
        InvalidData: a prompt cannot be used.
        NativeError: the child process failed.
    """
    labels = labels_of(recipe, rows)
    usable = [row for row in rows if row.split == "dev" and row.target in labels]
    if len(usable) < MIN_ROWS:
        return Labels(labels)
    chosen = take(usable, "dev", MAX_ROWS)
    pairs = list(zip(prompts(chosen, recipe, "labels"), (row.target for row in chosen), strict=True))
    return Labels(labels, label_temperature(base, adapter, labels, pairs))
