"""Extension of a trained gate by one class for a new skill, without changing the other logits.

A few additional hidden units, fitted on the feature bank, compute the new skill's logit. Refitting the complete gate
on the bank, which holds only part of the prompts, costs four points on the default pack's held-out prompts. Removing
a skill needs no fit: see `NumpyGate.without`.
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
from loramix.models.gate_bank import Bank
from loramix.models.gate_numpy import NumpyGate
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
    """(M, UNITS)."""
    b1: torch.Tensor
    """(M,)."""

    def __call__(self, components: torch.Tensor) -> torch.Tensor:
        """(B, P) → (B, M)."""
        h = F.gelu(components / self.scale @ self.w0 + self.b0[:, None], approximate="tanh")
        return torch.einsum("mbu,mu->bm", h, self.w1) + self.b1


def kept_logits(old: NumpyGate, bank: Bank) -> Floats:
    """What a gate says to the bank's prompts, by the bank's classes: (N, M, K+1), 0 for one that it does not know.

    Several classes of the base count as one that is as likely as they are together.
    """
    features = bank.components @ bank.projection.matrix.T * bank.projection.std + bank.projection.mean
    with torch.no_grad():
        logits = Gate.from_arrays(old.info, old.arrays)(torch.from_numpy(features))
    known, temperature = old.info.skills, old.info.gate_temperature
    found = np.zeros((*logits.shape[:2], len(bank.classes)), np.float32)
    for place, name in enumerate(bank.classes[:-1]):
        if name in known:
            found[..., place] = logits[..., known.index(name)]
    found[..., -1] = temperature * (logits[..., len(known) :] / temperature).logsumexp(-1)
    return found


def fit_columns(
    logits: Floats, components: Floats, targets: Floats, place: int, seen: npt.NDArray[np.bool_]
) -> list[Column]:
    """Fit what is to be added to one class's logit, several times at once, each time on some of the prompts.

    Args:
        logits: (N, M, K+1) that stay.
        components: (N, P) of the same prompts.
        targets: (N, K+1), rows sum to 1.
        place: the class.
        seen: (N, F): which prompts each of the F fits learns from.
    """
    generator = torch.Generator().manual_seed(0)
    x, fixed, mask = torch.from_numpy(components), torch.from_numpy(logits), torch.from_numpy(seen).float()
    y, weight = smoothed(targets)
    (members, width), fits = (fixed.shape[1], x.shape[1]), mask.shape[1]
    scale = float(x.std(0).square().mean().sqrt().clamp_min(1e-6))
    w0 = (torch.randn((fits, members, width, UNITS), generator=generator) / width**0.5).requires_grad_()
    b0 = torch.zeros((fits, members, UNITS), requires_grad=True)
    w1 = torch.zeros((fits, members, UNITS), requires_grad=True)
    b1 = torch.zeros((fits, members), requires_grad=True)
    weights = [w0, b0, w1, b1]
    # with all other logits fixed, cross-entropy is that of two classes, but for a constant
    others = fixed.clone()
    others[..., place] = -torch.inf
    rest, own, wanted = others.logsumexp(-1)[:, None], fixed[:, None, :, place], y[:, place, None, None]
    optimizer = torch.optim.AdamW(weights, lr=4e-3, weight_decay=0.05, fused=True)
    for _ in range(max(PASSES, STEPS // (len(x) // BATCH + 1))):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            noisy = x[rows] / scale + 0.1 * torch.randn(x[rows].shape, generator=generator)
            h = F.gelu(torch.einsum("bp,fmpu->bfmu", noisy, w0) + b0, approximate="tanh")
            moved = own[rows] + torch.einsum("bfmu,fmu->bfm", h, w1) + b1
            loss = F.softplus(moved - rest[rows]) - wanted[rows] * moved
            loss = loss.mean(2) * weight[rows, None] * mask[rows]
            optimizer.zero_grad()
            (loss.sum(0) / mask[rows].sum(0).clamp_min(1)).sum().backward()
            optimizer.step()
    return [Column(scale, *parts) for parts in zip(*(tensor.detach() for tensor in weights), strict=True)]


def moved_probabilities(
    logits: Floats, column: Column, components: Floats, place: int, temperature: float
) -> npt.NDArray[np.float64]:
    """(N, K+1) with one class's logit moved."""
    moved = logits.copy()
    moved[..., place] += column(torch.from_numpy(components)).numpy()
    return ensemble(moved, temperature)


@dataclass(frozen=True, slots=True)
class Changes:
    """How an extended gate does on phrasings that the change was not fitted on."""

    own: float
    """Share of the new skill's prompts that are routed to it."""
    others: float
    """Share of the other prompts whose most probable class is unchanged."""


def extend(old: NumpyGate, bank: Bank, logits: Floats, place: int) -> tuple[Gate, Changes]:
    """A gate of the bank's classes that is the old one but for the new skill.

    Args:
        old: knows all of the bank's classes but the new one, or an earlier skill of its name.
        bank: with the new skill's prompts.
        logits: (N, M, K+1), what the old gate says to them, see `kept_logits`.
        place: of the new skill among the bank's classes.

    Raises:
        InvalidArtifact: a gate of several hidden layers, which none of ours has.
    """
    if len(old.info.hidden) != 1:
        raise InvalidArtifact("the pack's gate has several hidden layers; run `loramix train gate`.")
    components, targets = bank.components, bank.targets
    temperature = float(old.info.gate_temperature)
    before, after = ensemble(logits, temperature), np.zeros(targets.shape)
    fold = folds(bank.groups)
    # a fit without each of the folds, and one of everything
    seen = fold[:, None] != np.arange(fold.max(initial=0) + 2)
    *judges, column = fit_columns(logits, components, targets, place, seen)
    for i, judge in enumerate(judges):
        left = fold == i
        after[left] = moved_probabilities(logits[left], judge, components[left], place, temperature)
    if bank.classes[place] not in old.info.skills:
        before[:, place] = -1.0  # the old gate never chose it
    own = targets[:, place] > 0.999
    same = after.argmax(1) == before.argmax(1)
    changes = Changes(
        own=float((after.argmax(1) == place)[own].mean()) if own.any() else 1.0,
        others=float(same[~own].mean()) if (~own).any() else 1.0,
    )
    return _joined(old, bank, place, column), changes


def _joined(old: NumpyGate, bank: Bank, place: int, column: Column) -> Gate:
    """The old gate's arrays with the column's units beside them, reading raw features."""
    arrays, projection = old.arrays, bank.projection
    members, hidden = arrays["w0"].shape[0], arrays["w0"].shape[2]
    known, skills = old.info.skills, list(bank.classes[:-1])
    # components of what the gate standardizes in its own way
    turn = (arrays["std"] / projection.std)[:, None] * projection.matrix / column.scale
    shift = ((arrays["mean"] - projection.mean) / projection.std) @ projection.matrix / column.scale
    w0, b0, w1, b1 = (tensor.numpy() for tensor in (column.w0, column.b0, column.w1, column.b1))
    n_classes = len(skills) + old.info.base_classes
    out = np.zeros((members, hidden + UNITS, n_classes), np.float32)
    bias = np.zeros((members, n_classes), np.float32)
    out[:, :hidden, len(skills) :] = arrays["w1"][..., len(known) :]
    bias[:, len(skills) :] = arrays["b1"][..., len(known) :]
    for i, name in enumerate(skills):
        if name in known:
            out[:, :hidden, i] = arrays["w1"][..., known.index(name)]
            bias[:, i] = arrays["b1"][..., known.index(name)]
    out[:, hidden:, place] = w1
    bias[:, place] += b1
    info = msgspec.structs.replace(old.info, skills=skills, hidden=[hidden + UNITS])
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
