"""All steps from fonts to the table; each is skipped where its result is there already, and a stopped step resumes.

The processes of the pool import this module, so it must not be ``__main__``.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loramix.paths import write_bytes, write_text

from . import diffusion, fonts, grids, measure, mixes, model, table, words
from . import judge as judging
from .fonts import STYLES, UPPER_BOUNDS

HERE = Path(__file__).parent
PUBLISHED, WORK = HERE / "results", HERE.parent.parent / "build" / "styles"
"""What is committed, and where `make` works and resumes."""
RESULTS, FONTS, CACHE = WORK / "results", WORK / "fonts", WORK / "answers"
GRID_LETTER, SHEET_TEXT, SEED = "R", "LORAMIX2026", 11

_studio: measure.Studio | None = None


def say(line: str) -> None:
    """Progress, with the time."""
    print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)


def one_thread() -> None:
    """Start of each process of the pool: two of them share two cores."""
    torch.set_num_threads(1)


def pool() -> ProcessPoolExecutor:
    """Two processes; spawned, since torch has threads that a fork would lose."""
    return ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), one_thread)


def record(name: str, values: dict[str, Any]) -> None:
    """Keep what a step says about itself next to its result, for the table."""
    write_text(RESULTS / "about" / f"{name}.json", json.dumps(values, indent=1) + "\n")


def make_base() -> None:
    """Train the base."""
    spent = diffusion.train_base(FONTS, RESULTS / "base.safetensors", WORK, lambda line: say(f"base: {line}"))
    record("base", {"cpu_s": round(spent)})


def make_judge() -> None:
    """Train the judge and check it on fonts that it has not seen."""
    spent = judging.train(FONTS, RESULTS / "judge.safetensors", WORK, lambda line: say(f"judge: {line}"))
    found = judging.check(judging.load(RESULTS / "judge.safetensors"), FONTS)
    record("judge", {"cpu_s": round(spent), "check": found})


def make_adapter(style: str) -> None:
    """Train a style's adapter."""
    out = RESULTS / "adapters" / f"{style}.safetensors"
    spent, before, after = diffusion.train_adapter(
        style, FONTS, RESULTS / "base.safetensors", out, WORK, lambda line: say(f"{style}: {line}")
    )
    about = {
        "cpu_s": round(spent),
        "base_before": before,
        "base_after": after,
        "size_bytes": out.stat().st_size,
    }
    record(style, about)


def judged(job: mixes.Job) -> mixes.Verdict:
    """A verdict, in a process of the pool."""
    global _studio
    if _studio is None:
        _studio = measure.Studio(RESULTS, FONTS, CACHE)
    return _studio.judged(job)


def train_all() -> None:
    """Base next to judge; the adapters, two at a time, as soon as the base is frozen."""
    with pool() as workers:
        jobs: list[Future[None]] = []
        if not (RESULTS / "base.safetensors").exists():
            jobs.append(workers.submit(make_base))
        if not (RESULTS / "judge.safetensors").exists():
            jobs.append(workers.submit(make_judge))
        if not (RESULTS / "base.safetensors").exists():
            jobs[0].result()
        missing = [s for s in STYLES if not (RESULTS / "adapters" / f"{s}.safetensors").exists()]
        jobs += [workers.submit(make_adapter, style) for style in missing]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException:
            workers.shutdown(cancel_futures=True)  # what runs is finished, what waits is not begun
            raise


def searched(found: Mapping[mixes.Job, mixes.Verdict], styles: tuple[str, ...]) -> mixes.Job:
    """The best job of a search so far."""
    return mixes.best({job: v for job, v in found.items() if job.kind == "search" and job.styles == styles})


def measured() -> dict[str, Any]:
    """All verdicts, the searched blends among them, as results.json has them."""
    fixed = mixes.fixed_jobs()
    groups = [*mixes.PAIRS, mixes.TRIPLE]
    searches = [job for styles in groups for job in mixes.search_jobs(styles)]
    with pool() as workers:
        found = dict(zip([*searches, *fixed], workers.map(judged, [*searches, *fixed]), strict=True))
        say(f"{len(found)} mixes measured")
        finer = [job for styles in groups for job in mixes.finer_jobs(searched(found, styles))]
        found |= dict(zip(finer, workers.map(judged, finer), strict=True))
        later = []
        for styles in groups:
            later.append(mixes.Job("searched", styles, searched(found, styles).weights))
            if styles in UPPER_BOUNDS:
                later.append(mixes.Job("font", styles))
        found |= dict(zip(later, workers.map(judged, later), strict=True))
    blends: dict[str, dict[str, Any]] = {"+".join(styles): {} for styles in groups}
    for job, verdict in found.items():
        if job.kind in table.KINDS and len(job.styles) > 1:
            blends["+".join(job.styles)][job.kind] = asdict(verdict) | {"weights": dict(job.weights)}
    verdicts = {
        job.name: asdict(v)
        for job, v in found.items()
        if job.kind in ("base", "alone", "one", "alpha", "font")
    }
    rank = {
        style: mixes.rank_correlation(
            mixes.STEPS_OF_ALPHA,
            [found[mixes.Job("alpha", (style,), ((style, a),))].mean[style] for a in mixes.STEPS_OF_ALPHA],
        )
        for style in STYLES
    }
    return {"verdicts": verdicts, "blends": blends, "rank": rank, "jobs": list(found)}


def make() -> None:
    """All steps, in turn."""
    began = time.monotonic()
    say("fonts")
    versions = fonts.fetch(FONTS)
    say("training: base and judge, then the adapters")
    train_all()
    say("measuring")
    results = measured()
    one_thread()  # small steps: two threads would wait for each other longer than they work
    studio = measure.Studio(RESULTS, FONTS, CACHE)
    about = {p.stem: json.loads(p.read_text("utf-8")) for p in sorted((RESULTS / "about").glob("*.json"))}
    results["adapters"] = {style: about[style] for style in STYLES}
    results["base_sha256"] = model.weights_sha256(studio.unet)
    results["judge"] = about["judge"]["check"]
    results["merged"] = {
        name: studio.merged_difference(ways["searched"]["weights"])
        for name, ways in results["blends"].items()
    }
    gate = words.train()
    write_bytes(RESULTS / "gate.npz", gate.to_bytes())
    results["gate"] = {"all_named": words.all_named(gate)}
    results["cpu_s"] = {name: values["cpu_s"] for name, values in about.items()}
    results["cpu_s"]["measuring"] = round(studio.spent(results.pop("jobs")))
    results["fonts"] = {p: {"version": v, "licence": fonts.LICENCES[p]} for p, v in versions.items()}
    draw_grids(studio, results)
    write_text(RESULTS / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(RESULTS / "table.md", table.table(results))
    publish()
    say(f"done after {(time.monotonic() - began) / 60:.1f} minutes: {PUBLISHED / 'table.md'}")


def publish() -> None:
    """Copy everything but the judge to where it is committed."""
    for name in ("*.png", "*.md", "*.npz", "results.json", "base.safetensors", "adapters/*.safetensors"):
        for path in RESULTS.glob(name):
            write_bytes(PUBLISHED / path.relative_to(RESULTS), path.read_bytes())


def draw_grids(studio: measure.Studio, results: dict[str, Any]) -> None:
    """Write grid.png, grids.png and sheet.png."""

    def draw(mix: Any, text: str) -> np.ndarray:
        return studio.pictures(mixes.Job("draw", (), tuple(mix.items())), SEED, text)[:, 0].numpy()

    all_pairs = [grids.alpha_grid(draw, pair, GRID_LETTER) for pair in mixes.PAIRS]
    grids.save(grids.beside(all_pairs[:1] + all_pairs[3:5]), RESULTS / "grid.png")
    grids.save(grids.beside(all_pairs), RESULTS / "grids.png")
    rows: dict[str, dict[str, float]] = {"base": {}} | {style: {style: 1.0} for style in STYLES}
    for name, ways in results["blends"].items():
        rows[name.replace("+", " + ")] = ways["searched"]["weights"]
    grids.save(grids.style_sheet(draw, rows, SHEET_TEXT), RESULTS / "sheet.png")
