"""Evaluation of a pack: skills on their test rows, the gate, composed prompts; writes ``report.json``.

Answers are cached in ``answers.jsonl``, so that an interrupted evaluation resumes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from loramix.errors import UsageError
from loramix.eval import routing
from loramix.eval.answers import AnswerStore
from loramix.eval.composed import evaluate_composed, n_composed
from loramix.eval.skills import end_task, evaluate_skill, n_answers
from loramix.eval.tfidf_baseline import baseline_accuracy
from loramix.hardware import machine
from loramix.pack.manifest import MANIFEST
from loramix.pack.pack import Pack
from loramix.paths import sha256_file, write_text
from loramix.runtime.engine import Engine
from loramix.train.data import Row, data_file, read_rows
from loramix.train.gate_data import collect
from loramix.train.recipe import Recipe, recipe_beside

REPORT = "report.json"
PARTS = ("skills", "routing", "composed")

Say = Callable[[str, int, int], None]
"""Progress callback: (name of the part, steps done, total steps)."""


def evaluate_pack(
    pack: Pack,
    data_dir: Path,
    out: Path,
    *,
    skills: Sequence[str] = (),
    parts: Sequence[str] = PARTS,
    held_out: Path | None = None,
    none_files: Sequence[Path] = (),
    limit: int | None = None,
    few: int = 200,
    composed_limit: int = 60,
    grid_limit: int = 12,
    peft: Path | None = None,
    report: Say = lambda what, done, total: None,
    **engine_options: Any,
) -> Path:
    """Evaluate a pack and write ``report.json``.

    Args:
        pack: pack to evaluate.
        data_dir: directory with ``NAME.jsonl.gz`` per skill, and ``NAME.toml`` if no recipe of that name ships.
        out: directory for answers and report.
        skills: skills to evaluate; by default all of the pack. The gate is always evaluated on all skills.
        parts: subset of `PARTS`.
        held_out: held-out phrasings for the gate.
        none_files: files of prompts that no skill fits.
        limit: maximum number of rows per test set.
        few: maximum number of rows per test set for the bare base, for unseen phrasings, and for PyTorch.
        peft: directory of training runs with ``NAME/adapter``, the adapters before conversion. Skills without
            such a directory are not compared.
        composed_limit: maximum number of prompts per kind of composed prompt.
        grid_limit: maximum number of ``dev`` prompts per kind at each point of the grid of blends.
        report: progress callback.
        **engine_options: options of `Engine`.

    Returns:
        The report's path.

    Raises:
        UnknownSkill: the pack lacks one of ``skills``.
        UsageError: the gate is to be evaluated and the pack has none, or there are no held-out phrasings.
        NotFound: a data file or recipe is missing; nothing has been evaluated.
    """
    chosen = [pack.skill(name).name for name in skills] or [skill.name for skill in pack.skills]
    asks_gate = bool({"routing", "composed"} & set(parts))
    if asks_gate:
        _check_gate(pack, held_out)
    needed = [skill.name for skill in pack.skills] if asks_gate else chosen
    recipes = {name: recipe_beside(data_dir, name) for name in needed}
    rows = {name: read_rows(data_file(data_dir, name)) for name in needed}
    unseen = routing.read_held_out(held_out) if held_out is not None else {}
    sets = None
    if "routing" in parts:
        test = {name: [row for row in rows[name] if row.split == "test"] for name in needed}
        sets = routing.questions(recipes, test, unseen, none_files)
    limits = {"rows": limit, "few": few, "composed-rows": composed_limit, "grid-rows": grid_limit}
    found: dict[str, Any] = {**_head(pack), "limits": limits}
    with AnswerStore(out / "answers.jsonl") as store, Engine(pack, **engine_options) as engine:
        if "skills" in parts:
            found["skills"] = {
                name: _skill(
                    engine,
                    store,
                    recipes[name],
                    rows[name],
                    report,
                    limit=limit,
                    few=few,
                    unseen=unseen.get(name, {}).get("templates", []),
                    peft=peft / name / "adapter" if peft and (peft / name).is_dir() else None,
                )
                for name in chosen
            }
            found["end_task"] = end_task(found["skills"])
        if sets is not None:
            tick = _counter("gate", sum(map(len, sets.values())), report)
            found["routing"] = routing.summarize(routing.decide_all(engine, store, sets, tick))
            found["routing"]["rival"] = baseline_accuracy(collect(needed, data_dir, none_files), sets)
            found["routing"]["rival_groups"] = routing.by_group(found["routing"]["rival"])
        if "composed" in parts and (together := unseen.get("composed")):
            bounds = {"limit": composed_limit, "grid_limit": grid_limit}
            tick = _counter("composed", n_composed(recipes, rows, together, **bounds), report)
            found["composed"] = evaluate_composed(engine, store, recipes, rows, together, **bounds, tick=tick)
    path = out / REPORT
    write_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return path


def _check_gate(pack: Pack, held_out: Path | None) -> None:
    """Check that there are a gate and phrasings if the gate is to be evaluated."""
    if pack.gate() is None:
        raise UsageError(f"pack {pack.name} has no gate: run 'loramix train gate', or use --only skills.")
    if held_out is None:
        raise UsageError("the gate needs held-out phrasings; give --held-out FILE, or use --only skills.")


def _head(pack: Pack) -> dict[str, Any]:
    """Describe what was evaluated, when, and on which machine."""
    known = {
        "name": pack.name,
        "base": pack.manifest.base.name,
        "manifest_sha256": sha256_file(pack.directory / MANIFEST),
        "skill_bytes": {skill.name: len(pack.adapter_bytes(skill.name)) for skill in pack.skills},
    }
    return {"format": 1, "pack": known, "machine": machine(), "date": date.today().isoformat()}


def _skill(
    engine: Engine, store: AnswerStore, recipe: Recipe, rows: Sequence[Row], report: Say, **options: Any
) -> dict[str, Any]:
    total = n_answers(recipe, rows, options["limit"], options["few"], bool(options["unseen"]))
    return evaluate_skill(engine, store, recipe, rows, tick=_counter(recipe.name, total, report), **options)


def _counter(what: str, total: int, report: Say) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        report(what, done, total)

    return tick
