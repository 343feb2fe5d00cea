"""Evaluation of the gate on phrasings, texts and requests that are not in its training data."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.defaults import BASE
from loramix.errors import InvalidRecipe, NotFound
from loramix.eval.answers import AnswerStore
from loramix.formats.textfile import read_text
from loramix.prompts import fill
from loramix.runtime.engine import Engine
from loramix.train.calibration import GATE_BINS, binned
from loramix.train.data import Row
from loramix.train.gate_data import read_none
from loramix.train.metrics import bootstrap, share
from loramix.train.recipe import Recipe

PLAIN, CROSSED, NONE = ", no telling words", ", on other skills' texts", "none: "


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt with its expected class."""

    text: str
    wanted: str
    instruction: str
    """The template without the text."""


def read_held_out(path: Path) -> dict[str, dict[str, list[str]]]:
    """Read held-out phrasings: one table per skill (``templates``, ``plain``), ``none`` and ``composed``.

    Raises:
        NotFound: the file does not exist.
        InvalidRecipe: the file has another form.
    """
    if not path.is_file():
        raise NotFound(f"no file of held-out phrasings at {path}; give one with --held-out FILE.")
    try:
        found = tomllib.loads(read_text(path, InvalidRecipe))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvalidRecipe(f"{path}: {error}; fix that line and run the command again.") from None
    for table, groups in found.items():
        good = isinstance(groups, dict) and all(
            isinstance(group, list) and all(isinstance(text, str) for text in group)
            for group in groups.values()
        )
        if not good:
            raise InvalidRecipe(f"{path}: [{table}] must have lists of texts; fix it.")
    return found


def questions(
    recipes: Mapping[str, Recipe],
    rows: Mapping[str, Sequence[Row]],
    held_out: Mapping[str, Mapping[str, list[str]]],
    none_files: Sequence[Path],
    *,
    per_template: int = 3,
    seed: int = 0,
) -> dict[str, list[Question]]:
    """Build the sets of questions by name.

    Args:
        recipes: recipes of the pack's skills.
        rows: rows of ``test`` by skill.
        held_out: see `read_held_out`.
        none_files: files of prompts that no skill fits; only prompts that `collect` did not use are taken.
        per_template: number of texts per phrasing.
        seed: seed of the choice of texts.
    """
    rng = random.Random(seed)
    general = [name for name in recipes if recipes[name].any_text]

    def fitting(template: str, among: Sequence[str], wanted: str) -> list[Question]:
        pool = [row for name in among for row in rows[name]]
        return [
            Question(fill(template, rng.choice(pool).input), wanted, template.replace("{input}", " "))
            for _ in range(per_template)
        ]

    sets: dict[str, list[Question]] = {}
    for kind, wording in (("templates", ""), ("plain", PLAIN)):
        for name in recipes:
            templates = held_out.get(name, {}).get(kind, [])
            sets[name + wording] = [q for t in templates for q in fitting(t, [name], name)]
            others = [other for other in general if other != name]
            if name in general and others:
                crossed = [q for t in templates for q in fitting(t, others, name)]
                sets[name + wording + CROSSED] = crossed
    none = held_out.get("none", {})
    for path in none_files:
        unseen = [t for i, (split, t) in enumerate(read_none(path)) if (split == "test" if split else i % 2)]
        sets[f"{NONE}{path.stem.replace('_', ' ')}"] = [Question(text, BASE, text) for text in unseen]
    sets[NONE + "everyday prompts and near misses"] = [Question(t, BASE, t) for t in none.get("prompts", [])]
    sets[NONE + "other requests about texts"] = [
        q for t in none.get("templates", []) for q in fitting(t, list(recipes), BASE)
    ]
    return {name: found for name, found in sets.items() if found}


@dataclass(frozen=True, slots=True)
class Decisions:
    """The gate's decisions on sets of questions."""

    classes: list[str]
    """The skills, and ``base``."""
    sets: dict[str, list[Question]]
    chosen: dict[str, list[str]]
    doubled: dict[str, list[bool]]
    """Whether a second skill would answer too."""
    probabilities: dict[str, npt.NDArray[np.float64]]
    """(questions, K+1) by set."""


def decide_all(
    engine: Engine,
    store: AnswerStore,
    sets: Mapping[str, Sequence[Question]],
    tick: Callable[[], None] = lambda: None,
) -> Decisions:
    """Run the gate on all questions.

    Args:
        engine: engine of a pack with a gate.
        store: cache of the decisions.
        sets: sets from `questions`.
        tick: progress callback, called after each question.
    """
    classes = [*engine.router.skills, BASE]
    chosen: dict[str, list[str]] = {}
    doubled: dict[str, list[bool]] = {}
    probabilities = {}
    for name, group in sets.items():
        chosen[name], doubled[name], table = [], [], []
        for question in group:
            found = store.route(engine, question.text)
            chosen[name].append(next(iter(found.mix), BASE))
            doubled[name].append(bool(found.then))
            table.append([found.probabilities[c] for c in classes])
            tick()
        probabilities[name] = np.asarray(table, np.float64)
    return Decisions(classes, {n: list(g) for n, g in sets.items()}, chosen, doubled, probabilities)


def summarize(found: Decisions) -> dict[str, Any]:
    """Compute the accuracy of each set, and the confusion matrix and calibration over all sets.

    Returns:
        ``sets`` ({name: value, low, high, rows}), ``groups`` (the same for groups of sets, see `by_group`),
        ``lost`` (share of skill prompts sent to the base), ``doubled`` (share of all prompts that two skills would
        answer, although none requests two), ``confusion`` (rows: expected, columns: chosen), ``calibration``
        (expected calibration error of the most probable class, and its bins), ``errors``.
    """
    sets = {}
    confusion = {wanted: dict.fromkeys(found.classes, 0) for wanted in found.classes}
    errors = []
    for name, group in found.sets.items():
        hits = [choice == q.wanted for choice, q in zip(found.chosen[name], group, strict=True)]
        value = bootstrap(np.asarray([[hit, 1] for hit in hits], np.float64), share)
        sets[name] = {"value": value.value, "low": value.low, "high": value.high, "rows": value.rows}
        for question, choice in zip(group, found.chosen[name], strict=True):
            confusion[question.wanted][choice] += 1
            if choice != question.wanted:
                errors.append([name, choice, question.text[:160]])
    asked = [sum(row.values()) for wanted, row in confusion.items() if wanted != BASE]
    sent = [row[BASE] for wanted, row in confusion.items() if wanted != BASE]
    return {
        "sets": sets,
        "groups": by_group(sets),
        "lost": sum(sent) / max(1, sum(asked)),
        "doubled": float(np.mean(np.concatenate(list(found.doubled.values())))),
        "confusion": confusion,
        "calibration": calibration(found),
        "errors": errors,
    }


def by_group(sets: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Compute the accuracy over groups of sets: own texts, other skills' texts, no telling words, none.

    Args:
        sets: ``{name: {value, rows}}`` with the names from `questions`.
    """
    hits: dict[str, list[float]] = {}
    for name, found in sets.items():
        group = (
            "no skill fits"
            if name.startswith(NONE)
            else "other skills' texts"
            if CROSSED in name
            else "own texts"
        )
        right = round(found["value"] * found["rows"])
        hits.setdefault(group + (PLAIN if PLAIN in name else ""), []).extend(
            [1.0] * right + [0.0] * (int(found["rows"]) - right)
        )
    values = {group: bootstrap(np.stack([h, np.ones(len(h))], 1), share) for group, h in hits.items()}
    return {
        group: {"value": v.value, "low": v.low, "high": v.high, "rows": v.rows} for group, v in values.items()
    }


def calibration(found: Decisions) -> dict[str, Any]:
    """Compute the expected calibration error of the most probable class (Guo et al. 2017), 15 bins of equal width."""
    table = np.concatenate(list(found.probabilities.values()))
    wanted = np.asarray([found.classes.index(q.wanted) for group in found.sets.values() for q in group])
    top, hit = table.max(1), table.argmax(1) == wanted
    return binned(top, hit, GATE_BINS)
