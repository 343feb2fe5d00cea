"""Padded batches of examples, and the decoder's forward pass with a shared prefix computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loramix.convert.base_model import device
from loramix.train.data import Example


def padded(rows: Sequence[npt.NDArray[np.int32]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad rows of ids on the right; return ids (B, T) int64 and attention mask (B, T) int64."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
        mask[i, : len(row)] = 1
    return ids.to(device()), mask.to(device())


def collate(part: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad examples on the right.

    Returns:
        ids (B, T) int64, attention mask (B, T) int64, and the loss mask (B, T-1) bool.
    """
    ids, mask = padded([example.ids for example in part])
    starts = torch.tensor([len(e.ids) - e.n_answer for e in part], device=ids.device)
    places = torch.arange(1, ids.shape[1], device=ids.device)
    return ids, mask, (places >= starts[:, None]) & mask[:, 1:].bool()


def shared_prefix(inner: Any, ids: torch.Tensor, prefix: int) -> Any:
    """Compute the KV cache of a shared prefix once and expand it to all rows.

    Args:
        inner: decoder without its head.
        ids: (B, T) int64.
        prefix: length of the common prefix of all rows, at least 1.
    """
    cache = inner(input_ids=ids[:1, :prefix], use_cache=True).past_key_values
    for layer in cache.layers:
        layer.keys = layer.keys.expand(len(ids), -1, -1, -1)
        layer.values = layer.values.expand(len(ids), -1, -1, -1)
    return cache


def hidden_states(inner: Any, ids: torch.Tensor, mask: torch.Tensor, prefix: int) -> torch.Tensor:
    """Compute the last hidden states after a shared prefix, which is computed once for the batch.

    Exact, including gradients; with short prompts it saves a third of the tokens.

    Args:
        inner: decoder without its head.
        ids: (B, T) int64.
        mask: (B, T) int64, 0 for padding.
        prefix: length of the common prefix of all rows.

    Returns:
        (B, T - prefix, D).
    """
    if prefix == 0 or len(ids) == 1:
        whole: torch.Tensor = inner(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return whole[:, prefix:]
    cache = shared_prefix(inner, ids, prefix)
    rest = inner(input_ids=ids[:, prefix:], attention_mask=mask, past_key_values=cache, use_cache=True)
    hidden: torch.Tensor = rest.last_hidden_state
    return hidden
