"""Which mixes are compared, and the arithmetic of the comparison. Pure Python and NumPy: no torch, no pictures."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .fonts import STYLES

PAIRS = (
    ("bold", "italic"),
    ("bold", "serif"),
    ("italic", "serif"),
    ("italic", "outline"),
    ("serif", "outline"),
    ("bold", "typewriter"),
    ("bold", "hand"),
)
TRIPLE = ("bold", "italic", "serif")
SEARCHED = (0.8, 0.9, 1.0, 1.1, 1.2)
"""Scales that the search tries for each adapter."""
FINE = 0.05
"""Around the best of these, the search tries once more in steps of this."""
LEGIBLE = 0.95
"""Share of right letters that the search asks for first."""
STEPS_OF_ALPHA = (0.0, 0.25, 0.5, 0.75, 1.0)
SEARCH_SEEDS, TEST_SEEDS = (1, 2, 3, 4), (201, 202, 203, 204, 205, 206)


@dataclass(frozen=True, slots=True)
class Job:
    """Pictures to make and to judge.

    Args:
        kind: how: base, alone, alpha, one, half, sum, search, searched, switch or font.
        styles: styles that are asked for.
        weights: adapter to scale; empty for switch and font.
        seeds: of the noise; each gives one picture of each character.
    """

    kind: str
    styles: tuple[str, ...] = ()
    weights: tuple[tuple[str, float], ...] = ()
    seeds: tuple[int, ...] = TEST_SEEDS

    @property
    def name(self) -> str:
        """Such as ``sum bold=1,italic=1``, and ``one bold=1 of bold+italic``."""
        mix = ",".join(f"{name}={scale:g}" for name, scale in self.weights) or "+".join(self.styles)
        asked = f" of {'+'.join(self.styles)}" if self.kind == "one" else ""
        return f"{self.kind} {mix}{asked}".strip()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge saw in N pictures.

    Args:
        letter: share with the right letter.
        seen: style to the share in which it is seen.
        mean: style to its mean probability.
        all_seen: share in which every asked style is seen.
        score: share with the right letter in which every asked style is seen.
    """

    letter: float
    seen: dict[str, float]
    mean: dict[str, float]
    all_seen: float
    score: float


def verdict_of(
    right: np.ndarray, styles: np.ndarray, asked: Sequence[str], thresholds: Mapping[str, float]
) -> Verdict:
    """Summarize a judge's answers.

    Args:
        right: (N,) bool, whether the letter is right.
        styles: (N, K) probabilities, in the order of `STYLES`.
        asked: styles that should be there.
        thresholds: a style is seen where its probability is higher.
    """
    columns = [STYLES.index(style) for style in asked]
    seen = styles > [thresholds[style] for style in STYLES]  # (N, K)
    together = seen[:, columns].all(1)
    return Verdict(
        letter=round(float(right.mean()), 4),
        seen={s: round(float(seen[:, i].mean()), 4) for i, s in enumerate(STYLES)},
        mean={s: round(float(styles[:, i].mean()), 4) for i, s in enumerate(STYLES)},
        all_seen=round(float(together.mean()), 4),
        score=round(float((right & together).mean()), 4),
    )


def weighted(styles: Sequence[str], scales: Sequence[float]) -> tuple[tuple[str, float], ...]:
    """A mix from two lists."""
    return tuple(zip(styles, scales, strict=True))


def search_jobs(styles: tuple[str, ...]) -> list[Job]:
    """All scales of two adapters, or equal scales of more."""
    return [
        Job("search", styles, weighted(styles, scales), SEARCH_SEEDS) for scales in _choices(styles, SEARCHED)
    ]


def finer_jobs(chosen: Job) -> list[Job]:
    """The scales around the best ones; of more than two adapters, which share their scale, a little less and more."""
    moved = [
        [round(scale + by, 3) for (_, scale), by in zip(chosen.weights, steps, strict=True)]
        for steps in _choices(chosen.styles, (-FINE, 0.0, FINE))
        if any(steps)
    ]
    return [Job("search", chosen.styles, weighted(chosen.styles, scales), SEARCH_SEEDS) for scales in moved]


def _choices(styles: Sequence[str], values: Sequence[float]) -> Iterable[tuple[float, ...]]:
    """All values of two adapters, or equal values of more."""
    if len(styles) == 2:
        return itertools.product(values, repeat=2)
    return ((value,) * len(styles) for value in values)


def best(found: Mapping[Job, Verdict]) -> Job:
    """The job of the highest score among those with legible letters; if none has them, the most legible one.

    On ties the one nearest to scales of 1.
    """

    def order(job: Job) -> tuple[float, float, float]:
        distance = sum(abs(scale - 1) for _, scale in job.weights)
        return min(found[job].letter, LEGIBLE), found[job].score, -distance

    return max(found, key=order)


def fixed_jobs() -> list[Job]:
    """All jobs that need no search: base, each style alone and by scale, blends at 1/2 and at 1, switch, fonts."""
    jobs = [Job("base")]
    for style in STYLES:
        jobs += [Job("alone", (style,), ((style, 1.0),)), Job("font", (style,))]
        jobs += [Job("alpha", (style,), ((style, a),)) for a in STEPS_OF_ALPHA]
    for styles in (*PAIRS, TRIPLE):
        for one in styles:  # what an adapter alone reaches of both
            jobs.append(Job("one", styles, ((one, 1.0),)))
        jobs.append(Job("half", styles, weighted(styles, [1 / len(styles)] * len(styles))))
        jobs.append(Job("sum", styles, weighted(styles, [1.0] * len(styles))))
        jobs.append(Job("switch", styles))
    return jobs


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, equal values sharing their mean rank; 0 where all are equal."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        v = np.asarray(values, float)
        return ((v[:, None] > v).sum(1) + (v[:, None] >= v).sum(1) - 1) / 2

    a, b = ranks(x) - np.mean(ranks(x)), ranks(y) - np.mean(ranks(y))
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return round(float(a @ b) / scale, 9) if scale else 0.0
