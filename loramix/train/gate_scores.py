"""Scores of a gate's logits, and the values chosen by them: the temperature, and the threshold for "none of these"."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loramix.models.mixing import decide
from loramix.train.calibration import GATE_BINS, binned

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
FOLDS = 5


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of a gate on wordings held out of its training."""

    accuracy: float
    """Accuracy at the threshold, on prompts for one skill or none."""
    skill_to_base: float
    """Share of skill prompts sent to the base."""
    none_to_base: float
    """Share of "none" prompts sent to the base."""
    calibration_error: float
    """Expected calibration error of the top class, 15 bins (Guo et al. 2017)."""

    def __str__(self) -> str:
        return (
            f"{self.accuracy:.1%} right on unseen wordings, {self.none_to_base:.1%} of none to the base, "
            f"{self.skill_to_base:.1%} of skill prompts lost, calibration error {self.calibration_error:.3f}"
        )


def folds(groups: npt.NDArray[np.int32], count: int = FOLDS, seed: int = 0) -> npt.NDArray[np.int64]:
    """Fold of each prompt, (B,) int64; prompts of one group fall into the same one."""
    names, place = np.unique(groups, return_inverse=True)
    found: npt.NDArray[np.int64] = (np.random.default_rng(seed).permutation(len(names)) % count)[place]
    return found


def probabilities_of(logits: Floats, temperature: float) -> Doubles:
    """Probabilities (B, K+1) of logits (B, K+1)."""
    wide = logits.astype(np.float64) / temperature
    odds = np.exp(wide - wide.max(-1, keepdims=True))
    found: Doubles = odds / odds.sum(-1, keepdims=True)
    return found


def temperature_of(logits: Floats, targets: Floats) -> float:
    """The temperature with the lowest loss on held-out prompts (Guo et al. 2017), from a grid."""
    grid = np.geomspace(0.3, 4.0, 60)
    losses = [-(targets * np.log(probabilities_of(logits, t) + 1e-9)).sum(1).mean() for t in grid]
    return float(grid[int(np.argmin(losses))])


def threshold_of(probabilities: Doubles, targets: Floats) -> float:
    """The threshold for "none of these" with the fewest wrong decisions, with equal weight for skills and none."""
    grid = np.round(np.arange(0.2, 0.96, 0.01), 2)
    single = targets.max(1) > 0.999
    costs = []
    for value in grid:
        found = score(probabilities[single], targets[single], float(value))
        costs.append(found.skill_to_base + (1 - found.none_to_base))
    best = np.flatnonzero(np.asarray(costs) <= min(costs) + 1e-9)
    return float(grid[best[len(best) // 2]])


def score(probabilities: Doubles, targets: Floats, threshold: float) -> Scores:
    """Score decisions on prompts for one skill or none.

    Args:
        probabilities: (B, K+1).
        targets: (B, K+1), one-hot.
        threshold: least probability that the skills need together.
    """
    right = targets.argmax(1)
    chosen = decide(probabilities, threshold=threshold)
    base = targets.shape[1] - 1
    none = right == base
    top, hit = probabilities.max(1), probabilities.argmax(1) == right
    return Scores(
        accuracy=float((chosen == right).mean()),
        skill_to_base=float((chosen[~none] == base).mean()) if (~none).any() else 0.0,
        none_to_base=float((chosen[none] == base).mean()) if none.any() else 1.0,
        calibration_error=binned(top, hit, GATE_BINS)["error"],
    )
