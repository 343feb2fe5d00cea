"""How a pack's gate decides and splits, by kind of prompt.

    python benchmarks/gate_check.py PACK --data DATA --part test --none DATA/routing/clinc_out_of_scope.jsonl \
        --none DATA/routing/self_instruct_seed_tasks.jsonl --out test.json

DATA is the directory of skills/, skills_more/ and routing/. ``--part dev`` has the wordings that no training sees and
may be chosen on; it takes all files of requests as --none. See `gate_sets`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from gate_sets import Case, dev_cases, test_cases

from loramix import Engine
from loramix.defaults import BASE
from loramix.paths import write_text
from loramix.runtime.router import Route
from loramix.train.calibration import GATE_BINS, binned

NEAR = 2  # words that a text may be off at its ends


def is_near(found: str, text: str) -> bool:
    """Whether a text was found exactly, or within two words."""
    a, b = sorted((found.split(), text.split()), key=len)
    return len(b) - len(a) <= NEAR and any(b[i : i + len(a)] == a for i in range(len(b) - len(a) + 1))


def found_steps(route: Route) -> tuple[tuple[str, str], ...]:
    """The steps of a route in the form of `gate_sets.Steps`."""
    return tuple((step.skill, "answer" if step.on_answer else "text") for step in route.plan)


def table(cases: Sequence[Case], routes: Sequence[Route]) -> dict[str, dict[str, float]]:
    """All figures by kind, each with the number of prompts."""
    pairs = list(zip(cases, routes, strict=True))
    found: dict[str, dict[str, float]] = {}

    def add(name: str, values: Sequence[bool | float]) -> None:
        if values:
            found[name] = {"value": float(np.mean(values)), "n": len(values)}

    single = [(c, r) for c, r in pairs if not c.steps and c.wanted]
    for kind in dict.fromkeys(c.kind for c, _ in single):
        add(kind, [next(iter(r.mix), BASE) == c.wanted for c, r in single if c.kind == kind])
    add("skills", [next(iter(r.mix), BASE) == c.wanted for c, r in single if c.wanted != BASE])
    add("none", [not r.mix for c, r in single if c.wanted == BASE])
    add("skill prompts left to the base", [not r.mix for c, r in single if c.wanted != BASE])
    add("second answers to one thing or none", [len(r.steps) > 1 for _, r in single])
    inside = [(c, r) for c, r in single if c.kind in ("embedded", "instructions inside texts")]
    add("... with an instruction inside the text", [len(r.steps) > 1 for _, r in inside])
    tops = np.asarray([max(r.probabilities.values()) for _, r in single])
    hits = np.asarray([max(r.probabilities, key=r.probabilities.__getitem__) == c.wanted for c, r in single])
    found["calibration error"] = {"value": float(binned(tops, hits, GATE_BINS)["error"]), "n": len(single)}
    for kind in ("composed", "hostile, several"):
        several = [(c, r) for c, r in pairs if c.steps and c.kind == kind]
        names = [([n for n, _ in c.steps], [s.skill for s in r.plan]) for c, r in several]
        add(f"{kind}: skills in order", [a == b for a, b in names])
        add(f"{kind}: steps exact", [c.steps == found_steps(r) for c, r in several])
        add(f"{kind}: as one", [not r.plan for _, r in several])
        add(f"{kind}: text within two words", [is_near(r.plan[0].text, c.text) for c, r in several if r.plan])
        chains = [(c, r) for c, r in several if any(on == "answer" for _, on in c.steps)]
        add(f"{kind}: on the answer, where asked", [c.steps == found_steps(r) for c, r in chains])
    alone = [r for c, r in pairs if c.kind == "hostile, one or none"]
    add("hostile, one or none: answered as one", [len(r.steps) == 1 for r in alone])
    return found


@click.command()
@click.argument("pack")
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="Directory of skills/ and routing/."
)
@click.option("--part", type=click.Choice(["dev", "test"]), default="dev", show_default=True)
@click.option(
    "--none", "files", type=click.Path(path_type=Path), multiple=True, help="Requests in people's words."
)
@click.option("--per-skill", default=25, show_default=True, help="Of dev: requests made for each skill.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Figures and misses, JSON.")
def main(pack: str, data: Path, part: str, files: tuple[Path, ...], per_skill: int, out: Path) -> None:
    """Print a line for each kind of prompt."""
    with Engine.open(pack) as engine:
        skills = [skill.name for skill in engine.pack.skills]
        cases = (
            dev_cases(skills, data, files, per_skill) if part == "dev" else test_cases(skills, data, files)
        )
        routes = [engine.route(case.messages) for case in cases]
    figures = table(cases, routes)
    for name, one in figures.items():
        click.echo(f"{one['value']:.3f}  {one['n']:5.0f}  {name}")
    misses = [
        [c.kind, c.wanted, c.steps, dict(r.mix), found_steps(r), c.messages[-1]["content"]]
        for c, r in zip(cases, routes, strict=True)
        if (c.steps != found_steps(r) if c.steps else next(iter(r.mix), BASE) != c.wanted or len(r.steps) > 1)
    ]
    write_text(out, json.dumps({"figures": figures, "misses": misses}, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
