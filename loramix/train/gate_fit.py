"""Fit the gate's MLPs, calibrate them, and find the threshold for "none of these".

Knows numbers alone: features, targets, groups of prompts that share a phrasing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from loramix.models.gate import Gate
from loramix.models.gate_numpy import GateInfo
from loramix.models.mixing import decide

Floats = npt.NDArray[np.float32]
FOLDS = 5
PASSES = 40
SMOOTHING = 0.05


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of a gate on phrasings held out of its fit."""

    accuracy: float
    """Accuracy at the threshold, on prompts for one skill or none."""
    skill_to_base: float
    """Share of skill prompts sent to the base."""
    none_to_base: float
    """Share of "none" prompts sent to the base."""
    calibration_error: float
    """Expected calibration error of the top class, 15 bins (Guo et al. 2017)."""


def smoothed(targets: Floats) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets (B, K+1) with label smoothing, and weights (B,) that let classes of any size count alike."""
    y = torch.from_numpy(targets)
    y = y * (1 - SMOOTHING) + SMOOTHING / y.shape[1]
    balance = y.sum(0).clamp_min(1).reciprocal()
    return y, (y @ balance) / (y @ balance).mean()


def weighed_loss(logits: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (B, M, K+1), mean over members and prompts, which count by weight (B,)."""
    loss = -(F.log_softmax(logits, dim=-1) * y[:, None]).sum(-1).mean(1)
    found: torch.Tensor = (loss * weight).mean()
    return found


def fit(features: Floats, targets: Floats, info: GateInfo, *, seed: int = 0) -> Gate:
    """Fit an ensemble of MLPs.

    Args:
        features: (B, D) float32.
        targets: (B, K+1) float32, rows sum to 1.
        info: what the gate decides between, and its widths.
        seed: of weights and order.

    Returns:
        A gate with temperature 1.
    """
    torch.manual_seed(seed)
    x = torch.from_numpy(features)
    y, weight = smoothed(targets)
    gate = Gate(info, x.mean(0), x.std(0).clamp_min(1e-3), seed=seed)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=3e-3, weight_decay=0.05)
    size = 256
    steps = PASSES * (len(x) // size + 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(PASSES):
        for rows in torch.randperm(len(x)).split(size):
            # noise of a tenth of a standard deviation: wording unseen in training lands beside what was seen
            noisy = x[rows] + 0.1 * gate.std * torch.randn_like(x[rows])
            loss = weighed_loss(gate(noisy), y[rows], weight[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    gate.eval()
    return gate


def folds(groups: npt.NDArray[np.int32], count: int = FOLDS, seed: int = 0) -> npt.NDArray[np.int64]:
    """Fold of each prompt, (B,) int64; prompts of one group fall into the same one."""
    names, place = np.unique(groups, return_inverse=True)
    found: npt.NDArray[np.int64] = (np.random.default_rng(seed).permutation(len(names)) % count)[place]
    return found


def held_out_logits(
    features: Floats,
    targets: Floats,
    fold: npt.NDArray[np.int64],
    info: GateInfo,
) -> Floats:
    """Logits (B, M, K+1) of each prompt from a gate that did not see its phrasing."""
    logits = np.zeros((len(features), info.members, targets.shape[1]), np.float32)
    for i in range(int(fold.max()) + 1):
        gate = fit(features[fold != i], targets[fold != i], info, seed=i)
        with torch.no_grad():
            logits[fold == i] = gate(torch.from_numpy(features[fold == i])).numpy()
    return logits


def train(
    features: Floats,
    targets: Floats,
    groups: npt.NDArray[np.int32],
    info: GateInfo,
) -> tuple[Gate, Scores]:
    """Calibrate on held-out phrasings, then fit on all prompts.

    Args:
        features: (B, D) float32.
        targets: (B, K+1) float32, rows sum to 1.
        groups: (B,) int32, prompts of one phrasing share a number.
        info: skills, layers, pooling, widths; its temperature and threshold are set.

    Returns:
        A gate that reads raw features, and how it did on phrasings that a fit did not see.
    """
    logits = held_out_logits(features, targets, folds(groups), info)
    temperature = temperature_of(logits, targets)
    probabilities = ensemble(logits, temperature)
    threshold = threshold_of(probabilities, targets)
    single = targets.max(1) > 0.999
    scores = score(probabilities[single], targets[single], threshold)
    gate = fit(features, targets, info)
    metrics = {
        "held_out_accuracy": scores.accuracy,
        "held_out_skill_to_base": scores.skill_to_base,
        "held_out_none_to_base": scores.none_to_base,
        "held_out_calibration_error": scores.calibration_error,
        "prompts": float(len(targets)),
    }
    gate.calibrate(gate_temperature=temperature, threshold=threshold, metrics=metrics)
    return gate, scores


def temperature_of(logits: Floats, targets: Floats) -> float:
    """The temperature with the lowest loss on held-out prompts (Guo et al. 2017), from a grid."""
    grid = np.geomspace(0.3, 4.0, 60)
    losses = [-(targets * np.log(ensemble(logits, t) + 1e-9)).sum(1).mean() for t in grid]
    return float(grid[int(np.argmin(losses))])


def ensemble(logits: Floats, temperature: float) -> npt.NDArray[np.float64]:
    """Probabilities (B, K+1), averaged over the members of (B, M, K+1) logits."""
    wide = logits.astype(np.float64) / temperature
    odds = np.exp(wide - wide.max(-1, keepdims=True))
    probabilities: npt.NDArray[np.float64] = (odds / odds.sum(-1, keepdims=True)).mean(1)
    return probabilities


def threshold_of(probabilities: npt.NDArray[np.float64], targets: Floats) -> float:
    """The threshold for "none of these" with the fewest wrong decisions, skills and none weighed alike."""
    grid = np.round(np.arange(0.2, 0.96, 0.01), 2)
    single = targets.max(1) > 0.999
    costs = []
    for value in grid:
        found = score(probabilities[single], targets[single], float(value))
        costs.append(found.skill_to_base + (1 - found.none_to_base))
    best = np.flatnonzero(np.asarray(costs) <= min(costs) + 1e-9)
    return float(grid[best[len(best) // 2]])


def score(probabilities: npt.NDArray[np.float64], targets: Floats, threshold: float) -> Scores:
    """Score decisions on prompts for one skill or none.

    Args:
        probabilities: (B, K+1).
        targets: (B, K+1), one-hot.
        threshold: least probability that a skill needs.
    """
    right = targets.argmax(1)
    chosen = decide(probabilities, threshold=threshold)
    base = targets.shape[1] - 1
    none = right == base
    top, hit = probabilities.max(1), probabilities.argmax(1) == right
    bins = np.minimum((top * 15).astype(int), 14)
    error = sum(
        abs(hit[bins == i].mean() - top[bins == i].mean()) * (bins == i).mean() for i in set(bins.tolist())
    )
    return Scores(
        accuracy=float((chosen == right).mean()),
        skill_to_base=float((chosen[~none] == base).mean()) if (~none).any() else 0.0,
        none_to_base=float((chosen[none] == base).mean()) if none.any() else 1.0,
        calibration_error=float(error),
    )
