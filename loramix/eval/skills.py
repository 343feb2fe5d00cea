"""Scores of a pack's skills on test rows: adapter pinned, adapter routed, and the bare base for comparison."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loramix.eval.answers import AnswerStore, Prompt
from loramix.eval.bare import tidy
from loramix.eval.calibration import label_calibration
from loramix.eval.torch_answers import torch_answers
from loramix.models.mixing import Mix
from loramix.prompts import fill
from loramix.runtime.engine import Engine
from loramix.train.data import Row, take
from loramix.train.metrics import estimate, measure
from loramix.train.recipe import Recipe

SHOTS = 5


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one skill that are scored together."""

    name: str
    rows: list[Row]


def parts_of(recipe: Recipe, rows: Sequence[Row], limit: int | None = None) -> list[Part]:
    """Split a skill's ``test…`` rows into test sets, one per source.

    Args:
        recipe: the skill's recipe; sources with their own instructions become separate sets.
        rows: all rows.
        limit: most rows per set, in a seeded order.
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
    """Return a row's prompt in the first phrasing of its source, or of the recipe; all scores use this phrasing."""
    templates = recipe.instructions.get(row.source) or next(iter(recipe.instructions.values()))
    return fill(templates[0], row.input)


def shots(recipe: Recipe, rows: Sequence[Row], row: Row, seed: int = 0) -> Prompt:
    """Build a five-shot prompt: five answered ``train`` rows, balanced over the labels if any, then the row.

    Args:
        recipe: recipe with phrasing and labels.
        rows: rows to take the examples from.
        row: row to answer.
        seed: seed of the choice, the same for all rows of a source.
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


def score(recipe: Recipe, texts: Sequence[str], rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Compute all measures of a recipe: ``{measure: {value, low, high, rows}}``."""
    return {name: asdict(estimate(measure(name, recipe.labels), texts, rows)) for name in recipe.metrics}


def end_task(skills: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """Compute the ratio of routed to pinned score of the first measure, averaged over the test sets.

    Args:
        skills: results of `evaluate_skill` by skill.

    Returns:
        The ratio for the ``fixed`` phrasing, and for the ``unseen`` ones if there are any.
    """
    ratios: dict[str, list[float]] = {}
    for parts in skills.values():
        for part in parts.values():
            for name, wording in (("fixed", ""), ("unseen", "_unseen")):
                if "pinned" + wording in part:
                    pinned, routed = (_main(part[kind + wording]) for kind in ("pinned", "routed"))
                    ratios.setdefault(name, []).append(routed / pinned if pinned else 1.0)
    return {name: sum(values) / len(values) for name, values in ratios.items()}


def _main(measures: Mapping[str, Mapping[str, float]]) -> float:
    return next(iter(measures.values()))["value"]


def n_answers(recipe: Recipe, rows: Sequence[Row], limit: int | None, few: int, unseen: bool) -> int:
    """Return the number of progress callbacks of `evaluate_skill`."""
    sizes = [len(part.rows) for part in parts_of(recipe, rows, limit)]
    return sum(2 * size + (4 if unseen else 2) * min(size, few) for size in sizes)


def evaluate_skill(
    engine: Engine,
    store: AnswerStore,
    recipe: Recipe,
    rows: Sequence[Row],
    *,
    limit: int | None = None,
    few: int = 200,
    unseen: Sequence[str] = (),
    peft: Path | None = None,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Score a skill on its test sets.

    Args:
        engine: engine of the pack.
        store: cache of the answers.
        recipe: recipe of the skill.
        rows: data of the skill.
        limit: most rows per set.
        few: most rows per set for the bare base (whose answers are long), for unseen phrasings, and for PyTorch.
        unseen: held-out phrasings, used in turn.
        peft: the PEFT adapter before conversion.
        tick: called after each answer of the engine.

    Returns:
        ``{set: {kind: {measure: …}, "routed_right": share}}``, for a label skill also ``calibration`` (see
        `label_calibration`). The kinds are ``pinned``, ``routed``, ``base``,
        ``base_5shot``; with phrasings ``pinned_unseen`` and ``routed_unseen``; with ``peft`` the score in PyTorch
        (``torch``), of the converted adapter on the same rows (``converted``), and ``torch_same``, the share of
        identical answers.
    """
    return {
        part.name: _part(engine, store, recipe, rows, part, few, unseen, peft, tick)
        for part in parts_of(recipe, rows, limit)
    }


def _part(
    engine: Engine,
    store: AnswerStore,
    recipe: Recipe,
    rows: Sequence[Row],
    part: Part,
    few: int,
    unseen: Sequence[str],
    peft: Path | None,
    tick: Callable[[], None],
) -> dict[str, Any]:
    prompts, some = [ask(recipe, row) for row in part.rows], part.rows[:few]
    pinned, routed, right = _both(engine, store, recipe, prompts, tick)
    bare: dict[str, Any] = {"mix": "base", "max_tokens": recipe.max_tokens, "tick": tick}
    plain = store.answers(engine, prompts[:few], **bare)
    taught = store.answers(engine, [shots(recipe, rows, row) for row in some], **bare)
    found: dict[str, Any] = {
        "pinned": score(recipe, pinned, part.rows),
        "routed": score(recipe, routed, part.rows),
        "routed_right": right,
        "base": score(recipe, [tidy(given.text, recipe) for given in plain], some),
        "base_5shot": score(recipe, [tidy(given.text, recipe) for given in taught], some),
    }
    given = store.answers(engine, prompts, mix=str(Mix.of({recipe.name: 1.0})))
    if (calibration := label_calibration(given, part.rows)) is not None:
        found["calibration"] = calibration
    if unseen:
        asked = [fill(unseen[i % len(unseen)], row.input) for i, row in enumerate(some)]
        named, chosen, share = _both(engine, store, recipe, asked, tick)
        found["pinned_unseen"], found["routed_unseen"] = (
            score(recipe, named, some),
            score(recipe, chosen, some),
        )
        found["routed_right_unseen"] = share
    if peft:
        longest = engine.pack.skill(recipe.name).max_tokens
        before = torch_answers(engine, peft, prompts[:few], longest, store.path.parent)
        found["torch"] = score(recipe, before, some)
        found["converted"] = score(recipe, pinned[:few], some)
        found["torch_same"] = sum(a == b for a, b in zip(before, pinned, strict=False)) / len(some)
    return found


def _both(
    engine: Engine, store: AnswerStore, recipe: Recipe, prompts: Sequence[str], tick: Callable[[], None]
) -> tuple[list[str], list[str], float]:
    """Return the pinned answers, the routed answers, and how often the gate chose exactly the pinned mix."""
    pinned = store.answers(engine, prompts, mix=str(Mix.of({recipe.name: 1.0})), tick=tick)
    routed, right = [], 0
    for prompt, given in zip(prompts, pinned, strict=True):
        found = store.route(engine, prompt)
        same = found.mix == given.mix and not found.then
        right += same
        # the same mix gives the same greedy answer, so only differently routed rows are answered again
        other = given if same else store.answer(engine, prompt)
        routed.append(other.text)
        tick()
    return [given.text for given in pinned], routed, right / len(prompts)
