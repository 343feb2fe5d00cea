"""Training of a pack on a Ray cluster: a trial a skill."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loramix.cluster.session import need_ray, pool_size, session
from loramix.cluster.trials import Report, Trials
from loramix.train.lora import Progress
from loramix.train.pack import SkillRun, Trainer

REPORT_S = 5.0
"""Seconds between two lines of a trial in the table."""


def on_cluster(
    out: Path,
    *,
    address: str | None = None,
    workers: int | None = None,
    cpus_per_worker: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> Trainer:
    """Return a trainer that trains several skills at a time on a cluster.

    Args:
        out: directory of the run directories, visible to all machines.
        address: see `loramix.cluster.session.session`; no cluster is used if all skills are done.
        workers: largest number of skills at a time; as many as there are free CPUs if None.
        cpus_per_worker: CPUs, and threads, of one training.
        say: callback for messages.

    Raises:
        MissingExtra: Ray is not installed.
    """
    need_ray()

    def trainer(runs: Sequence[SkillRun]) -> Iterable[SkillRun]:
        open_ = [run for run in runs if not run.is_done]
        for run in runs:
            if run not in open_:
                say(f"{run.recipe.name}: trained before")
        if open_:
            key = [part for run in runs for part in (run.recipe.name, run.key)]
            columns = ["step", "of", "loss", "dev_loss", "tokens_per_second"]
            trials = Trials(key, out / ".ray", columns, workers, cpus_per_worker)
            with session(address) as started_here:
                from ray import tune

                pool_size(None, cpus_per_worker, 0, started_here)
                shared = {run.recipe.name: _absolute(run) for run in runs}
                trials.run(_train, shared, {"skill": tune.grid_search(list(shared))})
        return runs

    return trainer


def _absolute(run: SkillRun) -> SkillRun:
    return replace(
        run, data_dir=run.data_dir.absolute(), directory=run.directory.absolute(), base=run.base.absolute()
    )


def _train(config: Mapping[str, Any], runs: Mapping[str, SkillRun], report: Report) -> None:
    """Train one skill, unless an earlier driver's trial has."""
    run, last = runs[config["skill"]], 0.0

    def forward(progress: Progress) -> None:
        nonlocal last
        if progress.note or time.monotonic() - last > REPORT_S:
            last = time.monotonic()
            report(row(progress))

    if not run.is_done:
        run.train(forward)


def row(progress: Progress) -> dict[str, Any]:
    """Return the metrics of a step for the table."""
    best = progress.best or {}
    return {
        "step": progress.step,
        "of": progress.steps,
        "loss": progress.loss,
        "tokens_per_second": round(progress.tokens_per_second),
        "dev_loss": best.get("loss"),
        "dev_exact": best.get("exact"),
    }
