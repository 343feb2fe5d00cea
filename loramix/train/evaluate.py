"""Metrics of a skill's answers, the same in training and on the finished runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Metric = Callable[[str, Sequence[str]], float]


def accuracy(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is the label, letter case and a closing full stop aside, else 0."""
    return float(answer.strip().rstrip(".").casefold() in {text.strip().casefold() for text in references})


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 with stemming, the best over the references (Lin 2004; package rouge-score)."""
    scorer = _rouge()
    return max(float(scorer.score(reference, answer)["rougeL"].fmeasure) for reference in references)


def _rouge() -> Any:
    global _scorer
    if _scorer is None:
        from rouge_score.rouge_scorer import RougeScorer

        _scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return _scorer


_scorer: Any = None
METRICS: dict[str, Metric] = {"accuracy": accuracy, "rouge_l": rouge_l}


def bootstrap(scores: Sequence[float], rounds: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of scores with its 95 % bootstrap interval.

    Args:
        scores: one number a row.
        rounds: resamples.
        seed: of the resampling.

    Returns:
        (mean, low, high).
    """
    values = np.asarray(scores, np.float64)
    picks = np.random.default_rng(seed).integers(0, len(values), (rounds, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)
