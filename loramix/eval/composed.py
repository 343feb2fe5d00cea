"""Comparison of mixing with one skill, the bare base, and two calls, on prompts that request two skills.

The mixes compared are those that Loramix can serve; the oracle's scales come from a grid search on ``dev``.
If a part of an answer has no gold, the answer of the pinned skill on the same text is used instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loramix.defaults import DEFAULT_POLICY
from loramix.eval.answers import AnswerStore
from loramix.eval.bare import tidy
from loramix.eval.composed_cases import Case, Kind, cases, kinds_of
from loramix.eval.skills import ask
from loramix.models.mixing import Mix
from loramix.runtime.engine import Engine
from loramix.train.data import Row
from loramix.train.metrics import Estimate, bootstrap, measure, normal, share
from loramix.train.recipe import Recipe

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
METHODS = ("base", "top1", "uniform", "gate", "token", "oracle", "plan", "each", "sequence")
ANSWER_TOKENS = 96  # maximum length of an answer; degenerate blends would not end


def part_score(recipe: Recipe, answer: str, row: Row) -> float:
    """Score one part of a composed answer, from 0 to 1.

    Args:
        recipe: recipe of the part's skill.
        answer: the complete answer; its line with the best score counts.
        row: row with the references.
    """
    if recipe.labels:
        return float(normal(tidy(answer, recipe)) == normal(row.target))
    found = measure(recipe.metrics[0], recipe.labels)
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    counts = [np.asarray(found.counts(text, row), np.float64) for text in [answer, *lines]]
    return max(float(found.value(one)) for one in counts) / (100 if recipe.metrics[0] == "chrf" else 1)


@dataclass(slots=True)
class Bench:
    """Answers composed prompts with each method."""

    engine: Engine
    store: AnswerStore
    recipes: Mapping[str, Recipe]
    tick: Callable[[], None]

    def pinned(self, skill: str, text: str) -> str:
        """Return a skill's answer to a text in its first phrasing."""
        row = Row("test", text, "-")
        return self.store.answer(
            self.engine, ask(self.recipes[skill], row), mix=str(Mix.of({skill: 1.0}))
        ).text

    def mixed(self, prompt: str, scales: Mapping[str, float], limit: int) -> str:
        """Return the answer of a mix, limited to the length of both parts."""
        return self.store.answer(self.engine, prompt, mix=str(Mix.of(scales)), max_tokens=limit).text

    def routed(self, prompt: str, policy: str, limit: int | None) -> str:
        """Return the answer of the gate's mix, or of its plan; without a limit those of the skills hold."""
        return self.store.answer(self.engine, prompt, policy=policy, max_tokens=limit).text

    def is_planned(self, kind: Kind, case: Case) -> bool:
        """Return whether the plan has exactly the skills, and of a chain the second one on the first one's answer."""
        steps = self.store.route(self.engine, case.prompt).steps
        found = [step["skill"] for step in steps]
        if kind.chain:
            return found == [kind.first, kind.second] and steps[1]["on"] == "answer"
        return sorted(found) == sorted((kind.first, kind.second)) and all(s["on"] == "text" for s in steps)

    def blend(self, kind: Kind, case: Case) -> set[str]:
        """Return the skills that the gate would blend."""
        return set(
            self.store.answer(self.engine, case.prompt, policy="blend", max_tokens=self.limit(kind)).mix
        )

    def limit(self, kind: Kind) -> int:
        """Return the maximum length of an answer with both parts, in tokens."""
        both = self.recipes[kind.first].max_tokens + self.recipes[kind.second].max_tokens
        return min(ANSWER_TOKENS, both)

    def gold(self, kind: Kind, case: Case) -> dict[str, Row]:
        """Return the references of each part; the pinned skill's answer if there is no gold."""
        wanted = {}
        for skill, row in case.wanted.items():
            if row is None:
                text = self.pinned(skill, case.text)
                row = Row("test", case.text, text, "", (text,))
            wanted[skill] = row
        return wanted


def scores(
    bench: Bench, kind: Kind, chosen: Sequence[Case], answer: Callable[[Case], str]
) -> dict[str, list[float]]:
    """Return the part scores by skill, one per case."""
    found: dict[str, list[float]] = {}
    for case in chosen:
        text = answer(case)
        for skill, row in bench.gold(kind, case).items():
            found.setdefault(skill, []).append(part_score(bench.recipes[skill], text, row))
        bench.tick()
    return found


def answers_of(bench: Bench, kind: Kind, best: Mapping[str, float]) -> dict[str, Callable[[Case], str]]:
    """Return a function for each of `METHODS` that answers a case.

    Args:
        bench: engine, store and recipes.
        kind: kind of the prompts.
        best: the oracle's scales.
    """
    a, b = kind.first, kind.second
    limit = bench.limit(kind)

    def sequence(case: Case) -> str:
        first = bench.pinned(a, case.text)
        second = bench.pinned(b, first if kind.chain else case.text)
        return second if kind.chain else f"{first}\n{second}"

    def each(case: Case) -> str:
        return "\n".join(bench.mixed(case.prompt, {skill: 1.0}, limit) for skill in (a, b))

    return {
        "base": lambda case: bench.mixed(case.prompt, {}, limit),
        "top1": lambda case: bench.routed(case.prompt, "top1", limit),
        "uniform": lambda case: bench.mixed(case.prompt, {a: 0.5, b: 0.5}, limit),
        "gate": lambda case: bench.routed(case.prompt, "blend", limit),
        "token": lambda case: bench.routed(case.prompt, "token", limit),
        "oracle": lambda case: bench.mixed(case.prompt, best, limit),
        "plan": lambda case: bench.routed(case.prompt, DEFAULT_POLICY, None),
        "each": each,
        "sequence": sequence,
    }


def surface(bench: Bench, kind: Kind, chosen: Sequence[Case]) -> list[list[float]]:
    """Return the mean score at each pair of scales of `GRID`; rows are the first skill's, (0, 0) is the bare base."""
    limit = bench.limit(kind)

    def at(x: float, y: float) -> float:
        scales = {kind.first: x, kind.second: y}
        parts = scores(bench, kind, chosen, lambda case: bench.mixed(case.prompt, scales, limit))
        return float(np.mean(list(parts.values())))

    return [[at(x, y) for y in GRID] for x in GRID]


def evaluate_composed(
    engine: Engine,
    store: AnswerStore,
    recipes: Mapping[str, Recipe],
    rows: Mapping[str, Sequence[Row]],
    composed: Mapping[str, Sequence[str]],
    *,
    limit: int = 60,
    grid_limit: int = 12,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Compare `METHODS` on composed prompts.

    Args:
        engine: engine of the pack.
        store: cache of the answers.
        recipes: recipes of the pack's skills.
        rows: data by skill.
        composed: phrasings that are not in the training data, by the skills' names joined with ``+``.
        limit: maximum number of prompts per kind.
        grid_limit: maximum number of ``dev`` prompts per kind at each point of the grid.
        tick: progress callback, called after each scored answer; see `n_composed`.

    Returns:
        ``kinds`` ({name: {method: {value, low, high, rows, parts}, "surface", "oracle_mix", "both",
        "planned"}}), and ``mean`` by method over the kinds. ``both`` is the share of prompts for which the gate's blend
        has exactly both skills, ``planned`` that of a right plan.
    """
    bench = Bench(engine, store, recipes, tick)
    kinds: dict[str, Any] = {}
    for kind, templates in kinds_of(composed, list(recipes)).items():
        dev = cases(kind, templates, recipes, rows, "dev", grid_limit)
        test = cases(kind, templates, recipes, rows, "test", limit)
        if not dev or not test:
            continue
        plane = surface(bench, kind, dev)
        x, y = np.unravel_index(int(np.argmax(plane)), (len(GRID), len(GRID)))
        best = {kind.first: GRID[x], kind.second: GRID[y]}
        found: dict[str, Any] = {}
        for name, answer in answers_of(bench, kind, best).items():
            parts = scores(bench, kind, test, answer)
            value = _estimate(np.mean(list(parts.values()), axis=0))
            found[name] = {
                "value": value.value,
                "low": value.low,
                "high": value.high,
                "rows": value.rows,
                "parts": {skill: float(np.mean(part)) for skill, part in parts.items()},
            }
        found["both"] = float(
            np.mean([bench.blend(kind, case) == {kind.first, kind.second} for case in test])
        )
        found["planned"] = float(np.mean([bench.is_planned(kind, case) for case in test]))
        kinds[kind.name] = {**found, "surface": plane, "oracle_mix": best}
    means = {m: float(np.mean([found[m]["value"] for found in kinds.values()])) for m in METHODS if kinds}
    return {"grid": list(GRID), "kinds": kinds, "mean": means}


def n_composed(
    recipes: Mapping[str, Recipe],
    rows: Mapping[str, Sequence[Row]],
    composed: Mapping[str, Sequence[str]],
    *,
    limit: int = 60,
    grid_limit: int = 12,
) -> int:
    """Return the number of progress callbacks of `evaluate_composed`."""
    total = 0
    for kind, templates in kinds_of(composed, list(recipes)).items():
        total += len(cases(kind, templates, recipes, rows, "dev", grid_limit)) * len(GRID) ** 2
        total += len(cases(kind, templates, recipes, rows, "test", limit)) * len(METHODS)
    return total


def _estimate(values: Any) -> Estimate:
    return bootstrap(np.stack([values, np.ones(len(values))], 1), share)
