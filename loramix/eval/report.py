"""Render ``report.json`` as ``report.html``, a self-contained page without scripts, and as ``report.md``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from loramix.errors import InvalidData, NotFound
from loramix.eval import figures
from loramix.paths import write_text

METHODS = {
    "base": "bare base",
    "top1": "top-1",
    "uniform": "uniform blend",
    "gate": "gate's blend",
    "token": "token by token",
    "oracle": "best blend found on dev",
    "gate_each": "gate's skills in turn",  # of reports before plans
    "plan": "the plan (default)",
    "each": "both skills in turn",
    "sequence": "two requests",
}
"""Display names of `loramix.eval.composed.METHODS`."""
_PAGE, _TABLES = "report.html.jinja", "report.md.jinja"


def read_report(path: Path) -> dict[str, Any]:
    """Read a ``report.json``.

    Raises:
        NotFound: the file does not exist.
        InvalidData: it is not a report of this format.
    """
    if not path.is_file():
        raise NotFound(f"no report at {path}; create one with 'loramix eval'.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidData(f"{path} is not JSON ({error}); create it again with 'loramix eval'.") from None
    if not isinstance(found, dict) or found.get("format") != 1:
        raise InvalidData(f"{path} is not a report of format 1; create it again with 'loramix eval'.")
    return found


def write_html(path: Path) -> Path:
    """Write ``report.html`` next to a ``report.json``.

    Args:
        path: of the JSON.

    Returns:
        The page's path.
    """
    page = path.with_suffix(".html")
    write_text(page, to_html(read_report(path)))
    return page


def write_markdown(path: Path) -> Path:
    """Write ``report.md``, the tables of the page, next to a ``report.json``.

    Args:
        path: of the JSON.

    Returns:
        The file's path.
    """
    tables = path.with_suffix(".md")
    write_text(tables, to_markdown(read_report(path)))
    return tables


def to_markdown(found: dict[str, Any]) -> str:
    """Render the tables of a report as Markdown."""
    return _render(_TABLES, found, autoescape=False)


def to_html(found: dict[str, Any]) -> str:
    """Render a report as HTML; all data is escaped."""
    skills, routing, composed = found.get("skills"), found.get("routing"), found.get("composed")
    drawn = {}
    if skills:
        drawn["skills"] = figures.skills(skills)
        drawn["sizes"] = figures.sizes(skills, found["pack"]["skill_bytes"])
    if routing:
        drawn["confusion"] = figures.confusion(routing["confusion"])
        drawn["calibration"] = figures.calibration(routing["calibration"])
    if composed and composed["kinds"]:
        drawn["surfaces"] = figures.surfaces(composed)
    return _render(_PAGE, found, drawn={name: Markup(svg) for name, svg in drawn.items()})


def _render(template: str, found: dict[str, Any], *, autoescape: bool = True, **more: Any) -> str:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(autoescape=autoescape, trim_blocks=not autoescape, loader=loader)
    environment.filters["figure"] = figure
    skills = found.get("skills") or {}
    converted = any("torch" in part for parts in skills.values() for part in parts.values())
    calibrated = any("calibration" in part for parts in skills.values() for part in parts.values())
    means = (found.get("composed") or {}).get("mean", {})
    methods = {name: shown for name, shown in METHODS.items() if name in means}
    known = {"skills": None, "routing": None, "composed": None, "date": "", "methods": methods, **found}
    return environment.get_template(template).render(
        **known, converted=converted, calibrated=calibrated, **more
    )


def figure(estimate: dict[str, float]) -> str:
    """Format an estimate: ``0.866 (0.836–0.895)``."""
    digits = 1 if estimate["high"] > 1.5 else 3  # chrF ranges from 0 to 100
    value, low, high = (f"{estimate[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low}–{high})"
