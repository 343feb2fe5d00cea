"""Prompts that request two skills at once, on real texts, with the gold of each part if there is one."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from loramix.prompts import fill
from loramix.train.data import Row
from loramix.train.recipe import Recipe

VALENCE = {
    "joy": "positive",
    "sadness": "negative",
    "anger": "negative",
    "fear": "negative",
    "disgust": "negative",
}
JOINED = 4  # number of review sentences joined into a text to summarize
LONGEST = 900  # maximum length of a text in characters


@dataclass(frozen=True, slots=True)
class Case:
    """One composed prompt, with the gold of each part."""

    text: str
    prompt: str
    wanted: dict[str, Row | None]
    """Row with the gold by skill; None if the pinned skill's answer is used instead."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Two skills in one prompt; ``chain``: the second works on the output of the first."""

    first: str
    second: str
    chain: bool = False

    @property
    def name(self) -> str:
        """Name in the report."""
        return f"{self.first} → {self.second}" if self.chain else f"{self.first} + {self.second}"


def kinds_of(composed: Mapping[str, Sequence[str]], skills: Sequence[str]) -> dict[Kind, Sequence[str]]:
    """Return the kinds whose skills are available, with their phrasings.

    Args:
        composed: phrasings by the skills' names joined with ``+``.
        skills: skills of the pack.
    """
    found = {}
    for names, templates in composed.items():
        first, _, second = names.partition("+")
        if first in skills and second in skills:
            chain = {first, second} == {"summarize", "translate_fr"}
            if chain:
                first, second = "summarize", "translate_fr"
            found[Kind(first, second, chain)] = templates
    return found


def cases(
    kind: Kind,
    templates: Sequence[str],
    recipes: Mapping[str, Recipe],
    rows: Mapping[str, Sequence[Row]],
    split: str,
    limit: int,
) -> list[Case]:
    """Build composed prompts on real texts.

    Args:
        kind: kind of the prompts.
        templates: phrasings, used in turn.
        recipes: recipes of both skills.
        rows: rows of both skills.
        split: split of the texts, ``dev`` or ``test``.
        limit: maximum number of prompts.
    """
    pool = list(_texts(kind, recipes, rows, split))
    random.Random(f"{kind.name}-{split}").shuffle(pool)
    return [
        Case(text, fill(templates[i % len(templates)], text), wanted)
        for i, (text, wanted) in enumerate(pool[:limit])
    ]


def _texts(
    kind: Kind, recipes: Mapping[str, Recipe], rows: Mapping[str, Sequence[Row]], split: str
) -> Iterator[tuple[str, dict[str, Row | None]]]:
    """Return texts with their available golds."""
    if kind.chain:
        yield from _chained(rows, split)
        return
    # prefer texts of the skill scored by labels or names: their gold is not written by a model
    names = sorted((kind.first, kind.second), key=lambda name: _rank(name, recipes[name]))
    own, other = names
    chosen = [row for row in rows[own] if row.split == split and len(row.input) <= LONGEST]
    if own == "sentiment" and other == "summarize":
        chosen = list(_joined(chosen))
    for row in chosen:
        gold: Row | None = None
        if (own, other) == ("emotion", "sentiment"):
            if row.target not in VALENCE:
                continue
            valence = VALENCE[row.target]
            gold = replace(row, target=valence, references=(valence,))
        if recipes[own].metrics[0] == "entity_f1" and ":" not in row.target:
            continue  # a post without names has nothing to extract
        yield row.input, {own: row, other: gold}


def _rank(name: str, recipe: Recipe) -> tuple[int, int]:
    """Rank emotion before sentiment: an emotion implies its valence, but not the reverse."""
    kind = 0 if recipe.labels else 1 if recipe.metrics[0] == "entity_f1" else 2
    return kind, -len(recipe.labels)


def _joined(rows: Sequence[Row]) -> Iterator[Row]:
    for label in sorted({row.target for row in rows}):
        same = [row for row in rows if row.target == label]
        for i in range(0, len(same) - JOINED + 1, JOINED):
            yield replace(same[i], input=" ".join(row.input for row in same[i : i + JOINED]))


def _chained(rows: Mapping[str, Sequence[Row]], split: str) -> Iterator[tuple[str, dict[str, Row | None]]]:
    """Yield long descriptions whose synopsis has a human French translation."""

    def key(text: str) -> str:
        return re.sub(r"\W+", " ", text.casefold()).strip()

    french = {key(row.input): row for row in rows["translate_fr"]}
    for row in rows["summarize"]:
        known = french.get(key(row.target))
        # each half of a pair may be in an adapter's training data, but no complete pair is
        unseen = known and split in (row.split, known.split) and {row.split, known.split} <= {split, "train"}
        if known and unseen and len(row.input) <= LONGEST:
            yield row.input, {"translate_fr": known}
