"""Figures on everyday requests and on test rows by source, and their tables in docs/everyday.md.

    python benchmarks/everyday.py requests NAME EVERYDAY.json  what `loramix eval --everyday` wrote, as column NAME
    python benchmarks/everyday.py rows NAME ROWS.json          what rows_by_source.py wrote, as column NAME
    python benchmarks/everyday.py page                         the tables, from benchmarks/results.json

A run of `loramix eval` on one split keeps the figures of the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from loramix.paths import write_text

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PAGE = HERE.parent / "docs" / "everyday.md"
BEGIN, END = "<!-- tables: benchmarks/everyday.py -->\n", "<!-- end of tables -->\n"
COLUMNS = (
    "SmolLM2 pack",
    "bare SmolLM2",
    "bare SmolLM2, 5 shots",
    "Qwen pack",
    "bare Qwen",
    "bare Qwen, 5 shots",
)
REQUESTS, ROWS = "everyday requests", "test rows by source"
PATH = click.Path(path_type=Path, exists=True)


def record(section: str, name: str, figures: Mapping[str, Any]) -> None:
    """Put a column's figures into results.json."""
    known = json.loads(RESULTS.read_text(encoding="utf-8"))
    known.setdefault(section, {}).setdefault(name, {}).update(figures)
    write_text(RESULTS, json.dumps(known, indent=1, sort_keys=True) + "\n")


@click.group()
def main() -> None:
    """Record figures, and write their tables."""


@main.command()
@click.argument("name", type=click.Choice(COLUMNS))
@click.argument("source", type=PATH)
def requests(name: str, source: Path) -> None:
    """Record a report of `loramix eval --everyday` as column NAME."""
    splits = json.loads(source.read_text(encoding="utf-8"))["splits"]
    for split, kinds in splits.items():
        kept = {
            kind: {"mean": found["mean"], "skills": found["skills"]} for kind, found in kinds.items()
        }  # the answers quote the requests
        record(REQUESTS, name, {split: kept})


@main.command()
@click.argument("name", type=click.Choice(COLUMNS))
@click.argument("source", type=PATH)
def rows(name: str, source: Path) -> None:
    """Record what rows_by_source.py wrote as column NAME."""
    record(ROWS, name, json.loads(source.read_text(encoding="utf-8")))


@main.command()
def page() -> None:
    """Write the tables of docs/everyday.md."""
    known = json.loads(RESULTS.read_text(encoding="utf-8"))
    requests, rows = (
        {name: known[section][name] for name in COLUMNS if name in known.get(section, {})}
        for section in (REQUESTS, ROWS)
    )
    tables = "\n".join([*_requests(requests), *_rows(rows), ""])
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    write_text(PAGE, head + BEGIN + tables + END + rest.partition(END)[2])


def _requests(columns: Mapping[str, Any]) -> list[str]:
    """A table for each split: a column for each pack and kind of answer."""
    lines = []
    for split in ("test", "dev"):
        shown = {
            f"{name}, {kind}" if kind != "base" else name: figures
            for name, splits in columns.items()
            for kind, figures in splits.get(split, {}).items()
        }
        skills = sorted({skill for figures in shown.values() for skill in figures["skills"]})
        lines += ["", f"## {split.capitalize()} requests", "", _row("skill (requests)", *shown)]
        lines += ["|---" * (len(shown) + 1) + "|"]
        for skill in skills:
            found = [figures["skills"].get(skill) for figures in shown.values()]
            count = next(figure["rows"] for figure in found if figure)
            cells = [f"{figure['value']:.2f}" if figure else "" for figure in found]
            lines.append(_row(f"{skill} ({count})", *cells))
        means = [found.get("mean") for found in shown.values()]  # none where some skills are not measured
        cells = [_figure([m[key] for key in ("value", "low", "high")]) if m else "" for m in means]
        lines.append(_row("**mean**", *cells))
    return lines


def _rows(columns: Mapping[str, Any]) -> list[str]:
    """One table: a line for each skill, group of sources and measure."""
    lines = ["", "## Test rows by source", "", _row("skill", "sources", "measure", *columns)]
    lines.append("|---" * (len(columns) + 3) + "|")
    keys = {
        (skill, group, measure): None
        for skills in columns.values()
        for skill, groups in sorted(skills.items())
        for group, measures in groups.items()
        for measure in measures
        if measure != "rows"
    }
    for skill, group, measure in sorted(keys):
        cells = []
        for skills in columns.values():
            found = skills.get(skill, {}).get(group, {})
            cells.append(f"{_figure(found[measure])}, {found['rows']}" if measure in found else "")
        lines.append(_row(skill, group, measure, *cells))
    return lines


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _figure(values: Any) -> str:
    value, low, high = values
    digits = 1 if value > 1 else 3
    return f"{value:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


if __name__ == "__main__":
    main()
