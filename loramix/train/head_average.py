"""Averages a head that was trained further with the one that it began with.

A continued training learns what its requests have more of and loses a little of the rest; a mean of the weights before
and after keeps most of both (Wortsman et al., arXiv 2109.01903).
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import numpy.typing as npt
import torch

from loramix.models.early_head import EarlyHead
from loramix.train.head_fit import FitSettings, loss_of, loss_weights
from loramix.train.head_model import TorchHead
from loramix.train.head_states import TokenStates

Ints = npt.NDArray[np.int64]
SHARES = (0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
"""Shares of the trained weights that are compared."""


def averaged(
    start: EarlyHead, head: TorchHead, data: TokenStates, rows: Ints, settings: FitSettings
) -> Generator[str, None, TorchHead]:
    """The mean of two heads' weights with the lowest loss on prompts that neither was trained on.

    Args:
        start: the head that the training began with.
        head: the trained one.
        data: prompts with their states.
        rows: (N,) the prompts to choose on.
        settings: of the training.

    Yields:
        A line with the loss of each share.

    Returns:
        The head of the best share.
    """
    first = TorchHead(head.info, start.arrays["mean"], start.arrays["std"], seed=settings.seed)
    first.load(start.arrays, start.info.skills, start.info.tags)
    before, after = first.arrays(), head.arrays()
    best, chosen = float("inf"), head
    found = []
    for share in SHARES:
        mean = TorchHead(head.info, after["mean"], after["std"], dropout=0)
        mixed = {name: before[name] + np.float32(share) * (after[name] - before[name]) for name in after}
        mean.load(mixed, head.info.skills, head.info.tags)
        loss = loss_on(mean, data, rows, settings)
        found.append(f"{share}: {loss:.4f}")
        if loss < best:
            best, chosen = loss, mean
    yield f"loss on unseen wordings by share of the trained weights: {', '.join(found)}"
    return chosen


@torch.no_grad()  # type: ignore[untyped-decorator]  # mypy does not follow torch
def loss_on(
    head: TorchHead, data: TokenStates, rows: Ints, settings: FitSettings, *, size: int = 32
) -> float:
    """The training's loss on some prompts, without noise."""
    weights = loss_weights(data, rows, head.info, settings)
    head.eval()
    total = 0.0
    for _, batch in data.by_length(rows, size):
        logits, tags, _ = head(batch.states, batch.places, batch.lengths)
        total += float(loss_of(logits, tags, batch, weights, settings)) * len(batch.lengths)
    return total / len(rows)
