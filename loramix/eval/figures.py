"""Figures of the report as inline SVG: the gate's confusion and calibration, skill scores, score against size.

Reads the report's plain dictionaries; draws without a display and leaves pyplot's global state alone.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from matplotlib import rcParams
from matplotlib.figure import Figure

INK, SOFT, ACCENT = "#33475b", "#a9b8c6", "#2a78b8"
KINDS = {
    "base": "bare base",
    "base_5shot": "bare base, 5 shots",
    "pinned": "adapter pinned",
    "routed": "routed",
}
COLOURS = ("#d5dde5", "#a9b8c6", "#7fb3d9", "#2a78b8")


def to_svg(figure: Figure) -> str:
    """Return the ``<svg>`` element of a figure, with text kept as text."""
    out = io.StringIO()
    rcParams["svg.fonttype"] = "none"
    rcParams["svg.hashsalt"] = "loramix"  # makes element ids reproducible
    figure.savefig(out, format="svg", metadata={"Date": None}, bbox_inches="tight")
    text = out.getvalue()
    return text[text.index("<svg") :]


def confusion(table: Mapping[str, Mapping[str, int]]) -> str:
    """Draw the confusion matrix: expected against chosen class, rows normalized to 1.

    Args:
        table: counts ``{expected: {chosen: count}}``.
    """
    names = list(table)
    size = 1.6 + 0.55 * len(names)
    figure = Figure(figsize=(size + 1, size))
    axes = figure.add_subplot()
    totals = [max(1, sum(table[name].values())) for name in names]
    shares = [[table[w][c] / n for c in names] for w, n in zip(names, totals, strict=True)]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if table[names[y]][names[x]]:
                colour = "white" if share > 0.5 else INK
                axes.text(x, y, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("chosen")
    axes.set_ylabel("asked for")
    return to_svg(figure)


def calibration(found: Mapping[str, Any]) -> str:
    """Draw the gate's accuracy against its confidence; areas are shares of the prompts.

    Args:
        found: ``error`` and ``bins`` from `loramix.eval.routing.calibration`.
    """
    figure = Figure(figsize=(4.6, 4.2))
    axes = figure.add_subplot()
    bins = found["bins"]
    total = max(1, sum(b["rows"] for b in bins))
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle="--")
    x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
    axes.plot(x, y, color=ACCENT, linewidth=1)
    axes.scatter(x, y, s=[20 + 600 * b["rows"] / total for b in bins], color=ACCENT, alpha=0.6)
    axes.set(
        xlim=(0, 1.03), ylim=(0, 1.03), xlabel="highest probability", ylabel="share of correct decisions"
    )
    axes.set_title(f"expected calibration error {found['error']:.3f}", fontsize=10, color=INK)
    return to_svg(figure)


def skills(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw the main measure of each test set: bare base, five shots, pinned, routed.

    Args:
        found: ``{skill: {set: {kind: {measure: estimate}}}}``.
    """
    sets = [(skill, name, part) for skill, parts in found.items() for name, part in parts.items()]
    figure = Figure(figsize=(7, 0.7 + 0.62 * len(sets)))
    axes = figure.add_subplot()
    for y, (_, _, part) in enumerate(sets):
        for i, kind in enumerate(KINDS):
            estimate = main_estimate(part[kind])
            spread = [
                [max(0.0, estimate["value"] - estimate["low"])],
                [max(0.0, estimate["high"] - estimate["value"])],
            ]
            axes.barh(
                y + 0.2 * (i - 1.5), estimate["value"], 0.19, color=COLOURS[i], xerr=spread,
                error_kw={"ecolor": INK, "elinewidth": 0.8}, label=KINDS[kind] if not y else None,
            )  # fmt: skip
    axes.set_yticks(range(len(sets)), [f"{s}, {n}: {main_measure(p['pinned'])}" for s, n, p in sets])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=4, fontsize=8, frameon=False)
    return to_svg(figure)


def sizes(found: Mapping[str, Mapping[str, Any]], skill_bytes: Mapping[str, int]) -> str:
    """Draw an adapter's gain over the five-shot base against its size.

    Args:
        found: see `skills`.
        skill_bytes: size of each skill's adapter file.
    """
    figure = Figure(figsize=(5.4, 4.4))
    axes = figure.add_subplot()
    points = []
    for skill, parts in found.items():
        part = next(iter(parts.values()))
        gain = main_estimate(part["pinned"])["value"] - main_estimate(part["base_5shot"])["value"]
        points.append((gain, skill_bytes[skill] / 1e6, skill))
    free: dict[int, float] = {}
    for gain, size, skill in sorted(points):
        axes.scatter(size, gain, color=ACCENT)
        height = max(gain, free.get(round(size), -1.0))  # labels of adapters of equal size are stacked
        free[round(size)] = height + 0.055
        axes.annotate(skill, (size + 0.07, height), va="center", fontsize=8, color=INK)
    axes.axhline(0, color=SOFT, linewidth=1)
    axes.set(xlabel="adapter, MB", ylabel="gain over the 5-shot base")
    axes.margins(0.25)
    return to_svg(figure)


def surfaces(found: Mapping[str, Any]) -> str:
    """Draw the mean score of composed prompts at each pair of scales, one map per kind; a ring marks the best.

    Args:
        found: ``grid`` and ``kinds`` of `loramix.eval.composed.evaluate_composed`.
    """
    grid, kinds = found["grid"], found["kinds"]
    columns = min(3, len(kinds))
    lines = -(-len(kinds) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.3 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (name, kind) in zip(axes, kinds.items(), strict=False):
        plane = kind["surface"]
        axis.imshow(plane, cmap="Blues", origin="lower", vmin=0)
        top = max(max(row) for row in plane)
        for y, row in enumerate(plane):
            for x, value in enumerate(row):
                colour = "white" if value > 0.6 * top else INK
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
        first, second = kind["oracle_mix"]
        best = (grid.index(kind["oracle_mix"][second]), grid.index(kind["oracle_mix"][first]))
        axis.scatter(*best, s=420, facecolors="none", edgecolors="#d9822b", linewidths=1.6)
        axis.set_xticks(range(len(grid)), [f"{scale:g}" for scale in grid])
        axis.set_yticks(range(len(grid)), [f"{scale:g}" for scale in grid])
        axis.set(xlabel=f"scale of {second}", ylabel=f"scale of {first}")
        axis.set_title(name, fontsize=9, color=INK)
    for axis in axes[len(kinds) :]:
        axis.set_visible(False)
    return to_svg(figure)


def main_measure(scores: Mapping[str, Any]) -> str:
    """Return the name of a recipe's first measure."""
    return next(iter(scores))


def main_estimate(scores: Mapping[str, Any]) -> Mapping[str, float]:
    """Return the estimate of the first measure; chrF is scaled from 0–100 to 0–1."""
    name = main_measure(scores)
    estimate: Mapping[str, float] = scores[name]
    factor = 0.01 if name == "chrf" else 1.0
    return {key: value * factor for key, value in estimate.items()}
