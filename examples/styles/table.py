"""The measured table as Markdown, from results.json. Pure Python: no torch, no pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .fonts import STYLES
from .mixes import PAIRS, TRIPLE

BARS = {
    "base": 0.97,
    "alone": 0.95,
    "blend": 0.92,
    "seen": 0.90,
    "both": 0.75,
    "gain": 0.40,
    "rank": 0.9,
    "pixel": 1e-4,
}
"""What was asked before anything was measured."""
KINDS = {
    "half": "blend, scales 1/k",
    "sum": "blend, scales 1",
    "searched": "blend, searched scales",
    "switch": "LoRA Switch, an adapter a step",
    "font": "the real font",
}

Verdicts = Mapping[str, Mapping[str, Any]]


def percent(share: float) -> str:
    """Such as ``97.2 %``."""
    return f"{100 * share:.1f} %"


def rows_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def singles(results: Mapping[str, Any]) -> str:
    """Base and each style alone, beside the real font of the style."""
    found = results["verdicts"]
    base = found["base"]
    rows = [["base", percent(base["letter"]), *[""] * 6]]
    for style in STYLES:
        one, real = found[f"alone {style}=1"], found[f"font {style}"]
        rows.append(
            [
                style,
                percent(one["letter"]),
                percent(one["seen"][style]),
                percent(base["seen"][style]),
                percent(real["letter"]),
                percent(real["seen"][style]),
                f"{results['rank'][style]:.2f}",
                f"{results['adapters'][style]['size_bytes'] / 1000:.0f} kB",
            ]
        )
    header = ["adapter at 1", "letter right", "style seen", "in the base's pictures"]
    header += ["real font: letter right", "real font: style seen", "rank correlation with α", "size"]
    return rows_of(header, rows)


def judge(results: Mapping[str, Any]) -> str:
    """How far the judge can be believed."""
    found = results["judge"]
    rows = [["letter", "", percent(found["letter"]), ""]]
    for style in STYLES:
        one = found[style]
        rows.append([style, f"{one['threshold']:g}", percent(one["recall"]), percent(one["specificity"])])
    return rows_of(["what", "threshold", "recall", "specificity"], rows)


def blends(results: Mapping[str, Any]) -> str:
    """Each pair, and the triple, by each way to combine."""
    found = results["verdicts"]
    rows = []
    for styles in (*PAIRS, TRIPLE):
        name = " × ".join(styles)
        one = max(
            (found[f"one {style}=1 of {'+'.join(styles)}"] for style in styles), key=lambda v: v["all_seen"]
        )
        rows.append(
            [f"**{name}**", "the better adapter alone", percent(one["letter"]), percent(one["all_seen"])]
        )
        for kind, title in KINDS.items():
            verdict = results["blends"]["+".join(styles)].get(kind)
            if verdict is None:
                continue
            mix = verdict.get("weights")
            scales = f" ({', '.join(f'{value:g}' for value in mix.values())})" if kind == "searched" else ""
            rows.append(["", title + scales, percent(verdict["letter"]), percent(verdict["all_seen"])])
    return rows_of(["styles", "how", "letter right", "all styles seen"], rows)


def bars(results: Mapping[str, Any]) -> list[tuple[str, str, float, float, bool]]:
    """Each bar: measure, what was asked, worst and mean of what was measured, and whether the worst meets it."""
    found = results["verdicts"]
    alone = {style: found[f"alone {style}=1"] for style in STYLES}
    best = {styles: results["blends"]["+".join(styles)]["searched"] for styles in PAIRS}
    gains = [
        best[styles]["all_seen"] - max(found[f"one {s}=1 of {'+'.join(styles)}"]["all_seen"] for s in styles)
        for styles in PAIRS
    ]
    measured: list[tuple[str, str, list[float]]] = [
        ("letter right, base", "base", [found["base"]["letter"]]),
        ("letter right, one style", "alone", [v["letter"] for v in alone.values()]),
        ("letter right, searched blend of two", "blend", [v["letter"] for v in best.values()]),
        ("style seen, one adapter at 1", "seen", [v["seen"][s] for s, v in alone.items()]),
        ("both styles seen, searched blend", "both", [v["all_seen"] for v in best.values()]),
        ("… above the better adapter alone", "gain", gains),
        ("rank correlation of style with α", "rank", [*results["rank"].values()]),
    ]
    rows = [
        (name, f"≥ {BARS[key]:g}", min(values), sum(values) / len(values), min(values) >= BARS[key])
        for name, key, values in measured
    ]
    pixels = [*results["merged"].values()]
    worst, mean = max(pixels), sum(pixels) / len(pixels)
    return [*rows, ("merged against `set_adapters`, a pixel", "≤ 1e-4", worst, mean, worst <= BARS["pixel"])]


def table(results: Mapping[str, Any]) -> str:
    """The whole page of results."""
    met = []
    for name, asked, worst, mean, ok in bars(results):
        form = ".1e" if "pixel" in name else ".3f"
        met.append([name, asked, f"{worst:{form}}", f"{mean:{form}}", "met" if ok else "missed"])
    spent = [[name, f"{value:.0f}"] for name, value in results["cpu_s"].items()]
    return "\n".join(
        [
            "## Bars\n\nThe worst of all adapters or pairs counts.\n",
            rows_of(["measure", "asked", "worst", "mean", ""], met),
            "## One adapter\n",
            singles(results),
            "## Blends\n\nScales were searched with other noise than is tested.\n",
            blends(results),
            "## The judge on fonts that it has not seen\n\nIts thresholds were chosen on these.\n",
            judge(results),
            "## Words to styles\n",
            rows_of(
                ["made-up requests in wordings that the gate has not seen", "share"],
                [["exactly the right styles are named", percent(results["gate"]["all_named"])]],
            ),
            "## CPU seconds\n\nOne thread each, on a machine with other work.\n",
            rows_of(["step", "CPU s"], spent),
        ]
    )
