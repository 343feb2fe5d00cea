"""Extension of a gate by one class for a new skill: a column of its last linear map, all other logits unchanged.

The column is fitted on the pooled vectors of the bank, so that the other skills' data are not needed. Removing a
skill needs no fit: see `EarlyHead.without`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from loramix.models.early_head import EarlyHead
from loramix.models.gate_bank import Bank
from loramix.train.gate_scores import FOLDS, folds, probabilities_of

Floats = npt.NDArray[np.float32]
DECAY, SMOOTHING = 1e-5, 0.02
SHARE, JUDGES_SHARE = 0.03, 0.3
"""Share of the new skill's prompts in the loss: for the gate, and for the check of prompts for none. With a
larger share, the class takes others' prompts in unseen wordings (docs/gate.md)."""
CONTRADICTED = 0.5


def kept_logits(old: EarlyHead, bank: Bank) -> Floats:
    """A gate's logits for the bank's prompts, by the bank's classes: (N, K+1), 0 for one that it does not know.

    Several classes of the base count as one, with their probabilities added.
    """
    pooled = bank.components @ bank.projection.matrix.T * bank.projection.std + bank.projection.mean
    logits = pooled @ old.arrays["out.weight"] + old.arrays["out.bias"]
    known, temperature = old.info.skills, old.info.temperature
    found = np.zeros((len(logits), len(bank.classes)), np.float32)
    for place, name in enumerate(bank.classes[:-1]):
        if name in known:
            found[:, place] = logits[:, known.index(name)]
    base = torch.from_numpy(logits[:, len(known) :] / temperature).logsumexp(-1)
    found[:, -1] = temperature * base.numpy()
    return found


@dataclass(frozen=True, slots=True)
class Column:
    """The logit of a class: ``components / scale @ weight + bias``."""

    scale: Floats
    """(P,) float32, positive."""
    weight: Floats
    """(P,) float32."""
    bias: float

    def __call__(self, components: Floats) -> Floats:
        """(N, P) → (N,)."""
        found: Floats = (components / self.scale @ self.weight + np.float32(self.bias)).astype(np.float32)
        return found


def fit_columns(
    logits: Floats,
    components: Floats,
    targets: Floats,
    place: int,
    seen: npt.NDArray[np.bool_],
    share: float = SHARE,
) -> list[Column]:
    """Fit one class's logit several times at once, each time on some of the prompts; the other logits stay.

    Args:
        logits: (N, K+1); those of ``place`` are not used.
        components: (N, P) of the same prompts.
        targets: (N, K+1), rows sum to 1.
        place: the class.
        seen: (N, F): which prompts each of the F fits is trained on.
        share: of the loss that the class's prompts have together.
    """
    scale = np.full(components.shape[1], components.std(0).max().clip(1e-6), np.float32)
    x, mask = torch.from_numpy(components / scale), torch.from_numpy(seen).float()
    others = torch.from_numpy(logits.copy())
    others[:, place] = -torch.inf
    # with all other logits fixed, cross-entropy equals that of two classes up to a constant
    rest = others.logsumexp(-1)[:, None]
    wanted = torch.from_numpy(targets[:, place])[:, None]
    wanted = wanted * (1 - SMOOTHING) + SMOOTHING / targets.shape[1]
    own, other = (mask * wanted).sum(0).clamp_min(1), (mask * (1 - wanted)).sum(0).clamp_min(1)
    weight = mask * (wanted * (share / own) + (1 - wanted) * ((1 - share) / other))
    column = torch.zeros((x.shape[1], mask.shape[1]), requires_grad=True)
    bias = torch.zeros(mask.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [column, bias], max_iter=200, history_size=12, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        moved = x @ column + bias
        loss = (F.softplus(moved - rest) - wanted * (moved - rest)) * weight
        total = loss.sum() + DECAY * column.square().sum()
        total.backward()
        return total

    optimizer.step(closure)
    found, biases = column.detach().numpy(), bias.detach().numpy()
    return [Column(scale, found[:, i].copy(), float(biases[i])) for i in range(found.shape[1])]


def moved_probabilities(
    logits: Floats, column: Column, components: Floats, place: int, temperature: float
) -> npt.NDArray[np.float64]:
    """(N, K+1) with one class's logit from a column."""
    moved = logits.copy()
    moved[:, place] = column(components)
    return probabilities_of(moved, temperature)


def uncontradicted(bank: Bank, logits: Floats, place: int, old: int) -> npt.NDArray[np.bool_]:
    """Select the prompts to keep; drops prompts labelled "no skill" that look like requests for the new skill.

    "Translate this into German" fits no skill until one is added; the old texts are not available for relabelling.

    Args:
        bank: with the new skill's prompts after the old ones.
        logits: (N, K+1), what the gate without it says to them.
        place: of the new skill among the bank's classes.
        old: how many prompts there were before.

    Returns:
        (N,) bool.
    """
    new = np.arange(len(bank.codes)) >= old
    was_none = (bank.targets[:, -1] > 0.999) & ~new
    components, fold = bank.components, folds(bank.groups)
    # a judge sees half of the requests for none: not too sure that a new wish was for none
    half = ~was_none | (np.arange(len(new)) % 2 == 0)
    seen = half[:, None] & (fold[:, None] != np.arange(FOLDS))
    keep = np.ones(len(new), bool)
    judges = fit_columns(logits, components, bank.targets, place, seen, JUDGES_SHARE)
    for i, judge in enumerate(judges):
        judged = np.flatnonzero((fold == i) & was_none)
        table = moved_probabilities(logits[judged], judge, components[judged], place, 1.0)
        keep[judged] = table[:, place] < CONTRADICTED
    return keep


@dataclass(frozen=True, slots=True)
class Changes:
    """Accuracy of an extended gate on wordings that the change was not fitted on."""

    own: float
    """Share of the new skill's prompts that are routed to it."""
    others: float
    """Share of the other prompts whose most probable class is unchanged."""


def extend(old: EarlyHead, bank: Bank, logits: Floats, place: int) -> tuple[EarlyHead, Changes]:
    """The old gate with a class for the new skill.

    Args:
        old: knows all of the bank's classes but the new one, or an earlier skill of its name.
        bank: with the new skill's prompts.
        logits: (N, K+1), what the old gate says to them, see `kept_logits`.
        place: of the new skill among the bank's classes.
    """
    components, targets = bank.components, bank.targets
    temperature = old.info.temperature
    before, after = probabilities_of(logits, temperature), np.zeros(targets.shape)
    fold = folds(bank.groups)
    # a fit without each of the folds, and one of everything
    seen = fold[:, None] != np.arange(FOLDS + 1)
    *judges, column = fit_columns(logits, components, targets, place, seen)
    for i, judge in enumerate(judges):
        left = fold == i
        after[left] = moved_probabilities(logits[left], judge, components[left], place, temperature)
    before[:, place] = -1.0  # not chosen before
    own = targets[:, place] > 0.999
    same = after.argmax(1) == before.argmax(1)
    changes = Changes(
        own=float((after.argmax(1) == place)[own].mean()) if own.any() else 1.0,
        others=float(same[~own].mean()) if (~own).any() else 1.0,
    )
    return _joined(old, bank, place, column), changes


def _joined(old: EarlyHead, bank: Bank, place: int, column: Column) -> EarlyHead:
    """The old gate with one more column, which reads raw pooled vectors."""
    known, skills = old.info.skills, list(bank.classes[:-1])
    weight, bias = old.arrays["out.weight"], old.arrays["out.bias"]
    turned = bank.projection.matrix @ (column.weight / column.scale) / bank.projection.std
    shift = column.bias - float(bank.projection.mean @ turned)
    columns: list[npt.NDArray[np.floating[Any]]] = []
    biases: list[float] = []
    for i, name in enumerate(skills):
        if i == place:
            columns.append(turned)
            biases.append(shift)
        else:
            columns.append(weight[:, known.index(name)])
            biases.append(float(bias[known.index(name)]))
    out = np.concatenate([np.stack(columns, 1), weight[:, len(known) :]], 1).astype(np.float32)
    ends = np.concatenate([np.asarray(biases, np.float32), bias[len(known) :]])
    metrics = {**old.info.metrics, "prompts": float(len(bank.codes))}
    info = msgspec.structs.replace(old.info, skills=skills, metrics=metrics)
    return EarlyHead(info, {**old.arrays, "out.weight": out, "out.bias": ends})
