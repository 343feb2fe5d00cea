"""Figures of an adapter on prepared rows: loss of the answers, and of labels accuracy and macro-F1 by source."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .model import Adapters, Base
from .rows import Rows, collate, evaluation_sequences

ON_GPU, ON_CPU = 32, 2
"""Sequences in a forward pass."""


@torch.no_grad()  # type: ignore[untyped-decorator]
def evaluate(
    base: Base,
    adapters: Adapters | None,
    rows: Rows,
    label_tokens: npt.NDArray[np.int32],
    limit: int,
) -> dict[str, Any]:
    """Compute the figures of one adapter.

    Args:
        base: the base.
        adapters: matrices of the adapter, S = 1; None for the bare base.
        rows: the rows.
        label_tokens: first token of each label; empty for skills that answer in free text.
        limit: tokens of a sequence.

    Returns:
        ``loss``, the mean over the answers' tokens in nats; with labels also ``accuracy``, ``macro_f1`` and
        ``sources``, the same by source. The predicted label is the one with the most probable first token.
    """
    device = base.head.device
    tokens = torch.from_numpy(label_tokens.astype(np.int64)).to(device)
    predicted = np.full(len(rows.ids), -2)
    total, count = 0.0, 0
    sequences = iter(evaluation_sequences(rows, limit))
    while part := list(itertools.islice(sequences, ON_GPU if device.type == "cuda" else ON_CPU)):
        batch = collate(part, limit, device)
        hidden = base.hidden(batch.ids, batch.positions, batch.segments, adapters)
        learned = batch.targets >= 0
        logits, targets = base.logits(hidden[learned]), batch.targets[learned]
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
        if len(tokens):
            starts = batch.starts[learned]
            first = starts >= 0
            best = logits[first][:, tokens].argmax(-1)
            predicted[starts[first].cpu().numpy()] = best.cpu().numpy()
    figures: dict[str, Any] = {"loss": total / count}
    if len(tokens) and rows.labels is not None:
        figures |= label_figures(predicted, rows.labels)
        if rows.sources is not None:
            figures["sources"] = {
                name: {"rows": int(own.sum()), **label_figures(predicted[own], rows.labels[own])}
                for number, name in enumerate(rows.source_names)
                if (own := rows.sources == number).any()
            }
    return figures


def label_figures(predicted: npt.NDArray[Any], labels: npt.NDArray[Any]) -> dict[str, float]:
    """Return accuracy and the mean F1 of the labels that occur.

    Args:
        predicted: number of the label of each row, (N,).
        labels: the right ones, (N,).
    """
    scores: Sequence[float] = [
        2
        * float(((predicted == label) & (labels == label)).sum())
        / float((predicted == label).sum() + (labels == label).sum())
        for label in np.unique(labels)
    ]
    return {"accuracy": float((predicted == labels).mean()), "macro_f1": float(np.mean(scores))}
