"""Change one class of a trained gate and leave the others as they are: for a skill that comes or goes.

The gate's own logits stay; beside them a few hidden units, fitted on the feature bank, move the logit of one
class: the new skill's, or the base's where a skill goes. A gate fitted anew on the bank would pay for what the
bank leaves out (four points on the default pack's held-out prompts).
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from loramix.errors import InvalidArtifact
from loramix.models.gate import Gate
from loramix.models.gate_numpy import NumpyGate
from loramix.train.gate_bank import Bank
from loramix.train.gate_fit import ensemble, folds, smoothed

UNITS = 16
PASSES, STEPS, BATCH = 30, 400, 512  # passes over the prompts, but at least so many steps where they are few
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Column:
    """What is added to one class's logit, by member: ``gelu(x @ w0 + b0) @ w1 + b1`` of components x over scale."""

    scale: float
    w0: torch.Tensor
    """(M, P, UNITS) float32."""
    b0: torch.Tensor
    """(M, UNITS)."""
    w1: torch.Tensor
    """(M, UNITS, 1)."""
    b1: torch.Tensor
    """(M, 1)."""

    def __call__(self, components: torch.Tensor) -> torch.Tensor:
        """(B, P) → (B, M)."""
        h = F.gelu(components / self.scale @ self.w0 + self.b0[:, None], approximate="tanh")
        found: torch.Tensor = (h @ self.w1 + self.b1[:, None])[..., 0].T
        return found


def kept_logits(old: NumpyGate, bank: Bank) -> Floats:
    """What a gate says to the bank's prompts, by the bank's classes: (N, M, K+1), 0 for one that it does not know."""
    features = bank.components @ bank.projection.matrix.T * bank.projection.std + bank.projection.mean
    with torch.no_grad():
        logits = Gate.from_arrays(old.info, old.arrays)(torch.from_numpy(features)).numpy()
    known = [*old.info.skills, "base"]
    found = np.zeros((*logits.shape[:2], len(bank.classes)), np.float32)
    for place, name in enumerate(bank.classes):
        if name in known:
            found[..., place] = logits[..., known.index(name)]
    return found


def fit_column(logits: Floats, components: Floats, targets: Floats, place: int, *, seed: int = 0) -> Column:
    """Fit what is to be added to one class's logit.

    Args:
        logits: (N, M, K+1) that stay.
        components: (N, P) of the same prompts.
        targets: (N, K+1), rows sum to 1.
        place: the class.
        seed: of weights and order.
    """
    generator = torch.Generator().manual_seed(seed)
    x, fixed = torch.from_numpy(components), torch.from_numpy(logits)
    y, weight = smoothed(targets)
    members, width = fixed.shape[1], x.shape[1]
    column = Column(
        float(x.std(0).square().mean().sqrt().clamp_min(1e-6)),
        (torch.randn((members, width, UNITS), generator=generator) / width**0.5).requires_grad_(),
        torch.zeros(members, UNITS, requires_grad=True),
        torch.zeros(members, UNITS, 1, requires_grad=True),
        torch.zeros(members, 1, requires_grad=True),
    )
    # with all other logits fixed, cross-entropy is that of two classes, but for a constant
    others = fixed.clone()
    others[..., place] = -torch.inf
    rest, own, wanted = others.logsumexp(-1), fixed[..., place], y[:, place, None]
    weights = [column.w0, column.b0, column.w1, column.b1]
    optimizer = torch.optim.AdamW(weights, lr=4e-3, weight_decay=0.05, fused=True)
    for _ in range(max(PASSES, STEPS // (len(x) // BATCH + 1))):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            noisy = x[rows] + 0.1 * column.scale * torch.randn(x[rows].shape, generator=generator)
            moved = own[rows] + column(noisy)
            loss = F.softplus(moved - rest[rows]) - wanted[rows] * moved
            loss = (loss.mean(1) * weight[rows]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return column


def moved_probabilities(
    logits: Floats, column: Column, components: Floats, place: int, temperature: float
) -> npt.NDArray[np.float64]:
    """(N, K+1) with one class's logit moved."""
    moved = logits.copy()
    with torch.no_grad():
        moved[..., place] += column(torch.from_numpy(components)).numpy()
    return ensemble(moved, temperature)


@dataclass(frozen=True, slots=True)
class Changes:
    """How a changed gate does on phrasings that the change was not fitted on."""

    own: float
    """Share of the prompts whose class was changed that it wins."""
    others: float
    """Share of the other prompts whose likeliest class is what it was."""


def extend(old: NumpyGate, bank: Bank, place: int) -> tuple[Gate, Changes]:
    """A gate of the bank's classes that is the old one but for one class.

    Args:
        old: knows all of the bank's classes but the new one, and perhaps one that is gone.
        bank: with the prompts of the change.
        place: among the bank's classes: the new skill, or the base where a skill is gone.

    Raises:
        InvalidArtifact: a gate of several hidden layers, which none of ours has.
    """
    if len(old.info.hidden) != 1:
        raise InvalidArtifact("the pack's gate has several hidden layers; run `loramix train gate`.")
    logits, components, targets = kept_logits(old, bank), bank.components, bank.targets
    temperature = float(old.info.gate_temperature)
    before, after = ensemble(logits, temperature), np.zeros(targets.shape)
    fold = folds(bank.groups)
    for i in range(int(fold.max(initial=0)) + 1):
        seen, left = fold != i, fold == i
        column = fit_column(logits[seen], components[seen], targets[seen], place, seed=i)
        after[left] = moved_probabilities(logits[left], column, components[left], place, temperature)
    if bank.classes[place] not in (*old.info.skills, "base"):
        before[:, place] = -1.0  # the old gate never chose it
    own = targets[:, place] > 0.999
    same = after.argmax(1) == before.argmax(1)
    changes = Changes(
        own=float((after.argmax(1) == place)[own].mean()) if own.any() else 1.0,
        others=float(same[~own].mean()) if (~own).any() else 1.0,
    )
    column = fit_column(logits, components, targets, place)
    return _joined(old, bank, place, column), changes


def _joined(old: NumpyGate, bank: Bank, place: int, column: Column) -> Gate:
    """The old gate's arrays with the column's units beside them, reading raw features."""
    arrays, projection = old.arrays, bank.projection
    members, hidden = arrays["w0"].shape[0], arrays["w0"].shape[2]
    known = [*old.info.skills, "base"]
    # components of what the gate standardizes in its own way
    turn = (arrays["std"] / projection.std)[:, None] * projection.matrix / column.scale
    shift = ((arrays["mean"] - projection.mean) / projection.std) @ projection.matrix / column.scale
    w0, b0, w1, b1 = (tensor.detach().numpy() for tensor in (column.w0, column.b0, column.w1, column.b1))
    out = np.zeros((members, hidden + UNITS, len(bank.classes)), np.float32)
    bias = np.zeros((members, len(bank.classes)), np.float32)
    for i, name in enumerate(bank.classes):
        if name in known:
            out[:, :hidden, i] = arrays["w1"][..., known.index(name)]
            bias[:, i] = arrays["b1"][..., known.index(name)]
    out[:, hidden:, place] = w1[..., 0]
    bias[:, place] += b1[:, 0]
    info = msgspec.structs.replace(old.info, skills=list(bank.classes[:-1]), hidden=[hidden + UNITS])
    wide = {
        "w0": np.concatenate([arrays["w0"], turn @ w0], 2),
        "b0": np.concatenate([arrays["b0"], b0 + shift @ w0], 1),
        "w1": out,
        "b1": bias,
    }
    gate = Gate.from_arrays(info, {**arrays, **wide})
    metrics = {**old.info.metrics, "prompts": float(len(bank.codes))}
    gate.calibrate(gate_temperature=old.info.gate_temperature, threshold=old.info.threshold, metrics=metrics)
    gate.eval()
    return gate
