"""Scores of a pack's skills on rows that no training saw: the adapter pinned, routed, and the bare base beside it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loramix.eval.answers import AnswerStore, Prompt
from loramix.eval.torch_answers import torch_answers
from loramix.models.mixing import Mix
from loramix.prompts import fill
from loramix.runtime.engine import Engine
from loramix.train.data import Row, take
from loramix.train.metrics import estimate, measure, normal
from loramix.train.recipe import Recipe

SHOTS = 5


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one skill that are scored together."""

    name: str
    rows: list[Row]


def parts_of(recipe: Recipe, rows: Sequence[Row], limit: int | None = None) -> list[Part]:
    """The ``test…`` splits of a skill, each source on its own.

    Args:
        recipe: its sources with instructions of their own make sets of their own.
        rows: all rows.
        limit: most rows a set, in a seeded order.
    """
    found = []
    for split in sorted({row.split for row in rows if row.split.startswith("test")}):
        chosen = take(rows, split)
        sources = sorted({row.source for row in chosen if row.source in recipe.instructions})
        for source in sources or [""]:
            part = [row for row in chosen if not source or row.source == source][:limit]
            found.append(Part(source if split == "test" and source else split, part))
    return found


def ask(recipe: Recipe, row: Row) -> str:
    """A row's input in the first phrasing of its source, else of the recipe: the one every score is measured with."""
    templates = recipe.instructions.get(row.source) or next(iter(recipe.instructions.values()))
    return fill(templates[0], row.input)


def shots(recipe: Recipe, rows: Sequence[Row], row: Row, seed: int = 0) -> Prompt:
    """A row's prompt behind five answered ones of ``train``, labels spread evenly where the recipe has any.

    Args:
        recipe: gives phrasing and labels.
        rows: to take examples from.
        row: to ask.
        seed: of the choice, the same for all rows of a source.
    """
    pool = [other for other in rows if other.split == "train" and other.source == row.source]
    random.Random(seed).shuffle(pool)
    pool = [other for other in pool[:400] if len(other.input) < 400] or pool[:400]
    if recipe.labels:
        by_label = [[other for other in pool if other.target == label] for label in recipe.labels]
        pool = [group[i] for i in range(SHOTS) for group in by_label if i < len(group)]
    messages = []
    for other in pool[:SHOTS]:
        messages.append({"role": "user", "content": ask(recipe, other)})
        messages.append({"role": "assistant", "content": other.target})
    return [*messages, {"role": "user", "content": ask(recipe, row)}]


def tidy(text: str, recipe: Recipe) -> str:
    """What of a bare base's talk can count as an answer: the one label it names, or its first line.

    Kind to the base: it is not asked to know the answer's form.
    """
    if recipe.labels:
        words = set(re.findall(r"[\w-]+", text.casefold()))
        named = [label for label in recipe.labels if normal(label) in words]
        return named[0] if len(named) == 1 else text
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def score(recipe: Recipe, texts: Sequence[str], rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """All measures of a recipe: ``{measure: {value, low, high, rows}}``."""
    return {name: asdict(estimate(measure(name, recipe.labels), texts, rows)) for name in recipe.metrics}


def n_answers(recipe: Recipe, rows: Sequence[Row], limit: int | None, base_limit: int) -> int:
    """How often `evaluate_skill` ticks: pinned and routed on all rows, the base twice on the first."""
    sizes = [len(part.rows) for part in parts_of(recipe, rows, limit)]
    return sum(2 * size + 2 * min(size, base_limit) for size in sizes)


def evaluate_skill(
    engine: Engine,
    store: AnswerStore,
    recipe: Recipe,
    rows: Sequence[Row],
    *,
    limit: int | None = None,
    base_limit: int = 200,
    peft: Path | None = None,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Score a skill on its test sets.

    Args:
        engine: on the pack.
        store: keeps the answers.
        recipe: the skill's.
        rows: its data.
        limit: most rows a set.
        base_limit: most rows a set for the bare base, which talks long.
        peft: the adapter before conversion; asked for as many rows as the base.
        tick: called after each answer.

    Returns:
        ``{set: {"pinned" | "routed" | "base" | "base_5shot": {measure: …}, "routed_right": share}}``,
        and with ``peft`` what PyTorch reaches (``torch``), the converted adapter on the same rows
        (``converted``), and how often their answers are the same text (``torch_same``).
    """
    result: dict[str, Any] = {}
    mix = str(Mix.of({recipe.name: 1.0}))
    for part in parts_of(recipe, rows, limit):
        prompts = [ask(recipe, row) for row in part.rows]
        pinned = store.answers(engine, prompts, mix=mix, tick=tick)
        texts, right = [], 0
        for prompt, given in zip(prompts, pinned, strict=True):
            found = store.route(engine, prompt).mix
            same = found == given.mix
            right += same
            # the same mix gives the same greedy answer: only a row that went elsewhere is answered again
            other = given if same else store.answer(engine, prompt, mix=str(Mix.of(found)))
            texts.append(other.text)
            tick()
        few = part.rows[:base_limit]
        plain = store.answers(
            engine, prompts[:base_limit], mix="base", max_tokens=recipe.max_tokens, tick=tick
        )
        taught = store.answers(
            engine,
            [shots(recipe, rows, row) for row in few],
            mix="base",
            max_tokens=recipe.max_tokens,
            tick=tick,
        )
        result[part.name] = {
            "pinned": score(recipe, [given.text for given in pinned], part.rows),
            "routed": score(recipe, texts, part.rows),
            "routed_right": right / len(part.rows),
            "base": score(recipe, [tidy(given.text, recipe) for given in plain], few),
            "base_5shot": score(recipe, [tidy(given.text, recipe) for given in taught], few),
        }
        if peft:
            longest = engine.pack.skill(recipe.name).max_tokens
            before = torch_answers(engine, peft, prompts[:base_limit], longest, store.path.parent)
            after = [given.text for given in pinned[:base_limit]]
            result[part.name] |= {
                "torch": score(recipe, before, few),
                "converted": score(recipe, after, few),
                "torch_same": sum(a == b for a, b in zip(before, after, strict=True)) / len(few),
            }
    return result
