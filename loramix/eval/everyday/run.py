"""Evaluation of a pack, or of its base alone, on the everyday requests; writes ``everyday.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from loramix.eval.answers import AnswerStore
from loramix.eval.everyday.checks import is_label, score
from loramix.eval.everyday.requests import DATA, SPLITS, Request, read_requests
from loramix.pack.pack import Pack
from loramix.paths import write_text
from loramix.runtime.engine import Engine
from loramix.train.metrics import bootstrap, share
from loramix.train.recipe import RECIPES, load_recipe

REPORT = "everyday.json"
BARE_TOKENS = 64
"""Longest answer of a bare base in tokens: it may write a sentence where a skill writes a word."""


def evaluate_everyday(
    pack: Pack,
    out: Path,
    *,
    splits: Sequence[str] = SPLITS,
    skills: Sequence[str] = (),
    bare: bool = False,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
    **engine_options: Any,
) -> Path:
    """Evaluate a pack on the everyday requests for its skills.

    Args:
        pack: pack to evaluate.
        out: directory for answers and report.
        splits: splits of the requests.
        skills: skills to evaluate; by default all with requests that the pack has (with `bare`, all with requests).
        bare: evaluate the base alone, without adapters.
        report: progress callback.
        **engine_options: options of `Engine`.

    Returns:
        The report's path: by split and kind (``pinned``: the skill named; ``routed``: chosen by the gate, where
        there is one; ``base``) each skill's mean score with its interval, and the mean over the skills.

    Raises:
        UnknownSkill: ``skills`` names one that the pack lacks.
    """
    wanted = set(skills) if bare and skills else {pack.skill(name).name for name in skills}
    has = {skill.name for skill in pack.skills}
    found: dict[str, Any] = {"format": 1, "pack": pack.name, "base": pack.manifest.base.name, "splits": {}}
    kinds = ["base"] if bare else ["pinned", *(["routed"] if pack.gate() is not None else [])]
    with AnswerStore(out / "answers.jsonl") as store, Engine(pack, **engine_options) as engine:
        for split in splits:
            requests = [
                request
                for request in read_requests(DATA / f"{split}.jsonl")
                if (request.skill in wanted or not wanted) and (bare or request.skill in has)
            ]
            found["splits"][split] = {
                kind: _kind(engine, store, requests, kind, split, report) for kind in kinds
            }
    path = out / REPORT
    write_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return path


def _kind(
    engine: Engine,
    store: AnswerStore,
    requests: Sequence[Request],
    kind: str,
    split: str,
    report: Callable[[str, int, int], None],
) -> dict[str, Any]:
    recipes = {name: load_recipe(str(_recipe(name))) for name in {request.skill for request in requests}}
    scores: dict[str, list[float]] = {}
    labels: dict[str, list[bool]] = {}
    answers = []
    for number, request in enumerate(requests, 1):
        options: dict[str, dict[str, Any]] = {
            "base": {"mix": "base", "max_tokens": BARE_TOKENS},
            "pinned": {"mix": request.skill},
            "routed": {},
        }
        given = store.answer(engine, request.prompt, **options[kind])
        value = score(request, given.text, recipes[request.skill])
        scores.setdefault(request.skill, []).append(value)
        if recipes[request.skill].labels:
            labels.setdefault(request.skill, []).append(is_label(given.text, recipes[request.skill]))
        answers.append(
            {"skill": request.skill, "prompt": request.prompt, "answer": given.text, "score": value}
        )
        report(f"{split}, {kind}", number, len(requests))
    by_skill = {
        name: asdict(bootstrap(np.asarray([[value, 1.0] for value in values]), share))
        for name, values in sorted(scores.items())
    }
    for name, ok in labels.items():
        by_skill[name]["is_label"] = sum(ok) / len(ok)
    return {"mean": _mean(list(scores.values())), "skills": by_skill, "answers": answers}


def _mean(scores: Sequence[Sequence[float]], rounds: int = 2000) -> dict[str, float]:
    """Return the mean of the skills' means; each skill's requests are resampled separately."""
    rng = np.random.default_rng(0)
    draws = [rng.choice(np.asarray(values), (rounds, len(values))).mean(1) for values in scores]
    low, high = np.quantile(np.mean(draws, 0), [0.025, 0.975])
    return {"value": float(np.mean([np.mean(v) for v in scores])), "low": float(low), "high": float(high)}


def _recipe(name: str) -> Path:
    """Return the recipe on broad rows if there is one: its labels are those of the answers."""
    return RECIPES / "broad" / f"{name}.toml"
