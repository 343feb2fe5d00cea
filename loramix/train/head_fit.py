"""The training loop of the early head, with checkpoints that it resumes from.

Knows numbers alone: states, targets, token tags.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from loramix.models.early_head import EarlyHead
from loramix.models.head_info import HeadInfo
from loramix.train import checkpoint
from loramix.train.head_model import TorchHead
from loramix.train.head_states import Batch, TokenStates

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
SAVE_EVERY = 300  # steps, a minute or two
FEWEST_STEPS, SMALLEST_BATCH = 300, 8
"""A gate of few prompts is trained in smaller batches, so that it gets as many steps for the same work."""


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How a head is trained."""

    passes: float = 9.0
    batch: int = 48
    """Prompts in a step; fewer where there are few prompts, see `FEWEST_STEPS`."""
    rate: float = 1.2e-3
    warmup: float = 0.15
    """Share of the steps in which the rate rises; then it falls by a cosine."""
    weight_decay: float = 0.05
    dropout: float = 0.2
    dropped: float = 0.1
    """Share of the tokens that a step leaves out."""
    smoothing: float = 0.05
    none_weight: float = 2.0
    """Weight of the base's class; without it, classes count alike whatever their number of prompts."""
    tag_weight: float = 0.3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class FitProgress:
    """How far a training is."""

    step: int
    steps: int
    loss: float


def class_weights(targets: Floats, none_weight: float) -> torch.Tensor:
    """Weights (K + 1,) by which all classes count alike, but the last one by its own; of mean 1 over the prompts."""
    count = torch.from_numpy(targets.sum(0)).clamp_min(1)
    weight = count.sum() / len(count) / count
    weight[-1] *= none_weight
    found: torch.Tensor = weight / (weight * count).sum() * count.sum()
    return found


def tag_weights(tags: npt.NDArray[np.int8], count: int) -> torch.Tensor:
    """Weights (count,) by which a rare tag's token counts more; of mean 1 over the tokens.

    Most tokens are text: without weights, words that few requests have, such as those for an answer, are not learned.
    """
    found = torch.bincount(torch.from_numpy(tags[tags >= 0].astype(np.int64)), minlength=count).float()
    weight = found.clamp_min(1).pow(-0.25)
    mean: torch.Tensor = weight / (weight * found).sum().clamp_min(1e-9) * found.sum().clamp_min(1)
    return mean


def loss_weights(
    data: TokenStates, rows: Ints, info: HeadInfo, settings: FitSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of the classes (K + 1,) and of the tags (tags,) for `loss_of` on some prompts."""
    classes = class_weights(data.targets[rows], settings.none_weight)
    return classes, tag_weights(data.tags, len(info.tags))


def loss_of(
    logits: torch.Tensor,
    tags: torch.Tensor,
    batch: Batch,
    weights: tuple[torch.Tensor, torch.Tensor],
    settings: FitSettings,
) -> torch.Tensor:
    """Cross-entropy of the classes with label smoothing, and that of the token tags.

    Args:
        logits: (B, K + 1).
        tags: (B, T, tags) logits.
        batch: the prompts.
        weights: (K + 1,) of the classes and (tags,) of the tags.
        settings: see `FitSettings`.
    """
    weight, of_tags = weights
    classes = batch.targets.shape[1]
    smooth = batch.targets * (1 - settings.smoothing) + settings.smoothing / classes
    loss = (-(logits.log_softmax(-1) * smooth).sum(-1) * (batch.targets @ weight)).mean()
    if tags.shape[-1] and bool((batch.tags >= 0).any()):
        loss = loss + settings.tag_weight * F.cross_entropy(
            tags.flatten(0, 1), batch.tags.flatten(), weight=of_tags, ignore_index=-1
        )
    return loss


def fit(
    data: TokenStates,
    rows: Ints,
    info: HeadInfo,
    settings: FitSettings,
    *,
    start: EarlyHead | None = None,
    checkpoints: Path | None = None,
) -> Generator[FitProgress, None, TorchHead]:
    """Train a head.

    The result depends on the seed alone, whether or not the training was interrupted.

    Args:
        data: prompts with their states.
        rows: (N,) the prompts to train on.
        info: the head's sizes and classes.
        settings: see `FitSettings`.
        start: a trained head of the same sizes and skills to begin with, see `unlike`.
        checkpoints: directory that holds the training's state; a training of the same settings there is resumed.

    Yields:
        The progress after each step.

    Returns:
        The head in evaluation mode, with temperature 1.
    """
    size = batch_size(len(rows), settings)
    per_pass = -(-len(rows) // size)
    steps = max(1, round(settings.passes * per_pass))
    mean, std = (start.arrays["mean"], start.arrays["std"]) if start else data.standard(rows)
    head = TorchHead(info, mean, std, seed=settings.seed, dropout=settings.dropout)
    if start:
        head.load(start.arrays, start.info.skills, start.info.tags)
    weights = loss_weights(data, rows, info, settings)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=settings.rate, weight_decay=settings.weight_decay, fused=True
    )
    key = {"settings": asdict(settings), "steps": steps, "prompts": len(rows), "skills": info.skills}
    if start:
        key["start"] = hashlib.sha256(start.to_bytes()).hexdigest()
    step = _resumed(checkpoints, head, optimizer, key) if checkpoints else 0
    head.train()
    while step < steps:
        number, skip = divmod(step, per_pass)
        order = data.batches(rows, size, np.random.default_rng((settings.seed, number)))
        for i, chosen in enumerate(order):
            if i < skip:
                continue
            if step >= steps:
                break
            torch.manual_seed(settings.seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, steps, settings)
            batch = data.batch(
                chosen, dropped=settings.dropped, rng=np.random.default_rng((settings.seed, step))
            )
            logits, tags, _ = head(batch.states, batch.places, batch.lengths)
            loss = loss_of(logits, tags, batch, weights, settings)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            step += 1
            if checkpoints and (step % SAVE_EVERY == 0 or step == steps):
                _save(checkpoints, head, optimizer, step, key)
            yield FitProgress(step, steps, float(loss.detach()))
    head.eval()
    return head


def batch_size(prompts: int, settings: FitSettings) -> int:
    """Prompts in a step, so that at least `FEWEST_STEPS` are taken where the prompts allow it."""
    return min(settings.batch, max(SMALLEST_BATCH, int(settings.passes * prompts / FEWEST_STEPS)))


def unlike(start: HeadInfo, info: HeadInfo) -> str:
    """Why a training of one head cannot begin with another one; empty if it can.

    Args:
        start: of the head to begin with.
        info: of the head to train.
    """
    if set(start.skills) != set(info.skills) or start.base_classes != info.base_classes:
        return f"it decides between {', '.join(start.skills)} and {start.base_classes} classes of the base"
    for what in ("base_sha256", "layers", "width", "d", "depth", "heads", "first", "last"):
        if getattr(start, what) != getattr(info, what):
            return f"its {what} is {getattr(start, what)}, not {getattr(info, what)}"
    return ""


def rate_at(step: int, steps: int, settings: FitSettings) -> float:
    """The learning rate of a step, counted from 0."""
    done = (step + 1) / steps
    if done < settings.warmup:
        return settings.rate * done / settings.warmup
    share = (done - settings.warmup) / (1 - settings.warmup)
    return settings.rate * (0.5 * (1 + math.cos(math.pi * share)) + 1e-3)


def decide(head: TorchHead, data: TokenStates, rows: Ints, *, size: int = 32) -> tuple[Floats, Floats]:
    """Logits (N, K + 1) and pooled vectors (N, 6 d) of some prompts, in their order."""
    classes = data.targets.shape[1]
    logits = np.zeros((len(rows), classes), np.float32)
    pooled = np.zeros((len(rows), 6 * head.info.d), np.float32)
    head.eval()
    with torch.no_grad():
        for part, batch in data.by_length(rows, size):
            found, _, vectors = head(batch.states, batch.places, batch.lengths)
            logits[part], pooled[part] = found.numpy(), vectors.numpy()
    return logits, pooled


def _save(
    directory: Path, head: TorchHead, optimizer: torch.optim.Optimizer, step: int, key: dict[str, object]
) -> None:
    moments = optimizer.state_dict()["state"]
    tensors = {f"{i}.{name}": value for i, state in moments.items() for name, value in state.items()}
    checkpoint.save(directory, step, {"head": head.state_dict(), "optimizer": tensors}, {"key": key})


def _resumed(
    directory: Path, head: TorchHead, optimizer: torch.optim.Optimizer, key: dict[str, object]
) -> int:
    """Load the newest checkpoint of the same training; its step, or 0."""
    found = checkpoint.latest(directory)
    if found is None or found.state.get("key") != key:
        return 0
    head.load_state_dict(found.tensors["head"])
    state = optimizer.state_dict()
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in found.tensors["optimizer"].items():
        place, _, what = name.partition(".")
        moments.setdefault(int(place), {})[what] = value
    optimizer.load_state_dict({**state, "state": moments})
    return found.step
