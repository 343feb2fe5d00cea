"""Late adapters (activated LoRA, Greenewald et al., arXiv 2504.12397): LoRA that acts from the answer's header on.

The prompt's KV is the bare base's, so that the gate's pass over it is its prefill, whichever skill answers.
Training is cheaper too: the prompt is read without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loramix.train.data import Example
from loramix.train.frozen import device


def header(asked: Sequence[Sequence[int]]) -> list[int]:
    """The tokens that the chat template puts behind the user's text, up to the answer.

    Args:
        asked: ids of two prompts whose texts end differently.
    """
    first, second = asked
    count = 0
    while count < min(len(first), len(second)) and first[-1 - count] == second[-1 - count]:
        count += 1
    return [int(token) for token in first[len(first) - count :]]


def late_states(
    model: Any, part: Sequence[Example], n_header: int, prefix: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Last hidden states from the header on, the adapter acting there alone.

    Args:
        model: a PEFT model.
        part: examples.
        n_header: tokens of the header.
        prefix: tokens that all prompts begin with; read once for the batch.

    Returns:
        Hidden states (B, T, D), ids (B, T) int64 from the header on, and (B, T-1) bool: the next token is
        to be learned.
    """
    inner = model.get_base_model().model
    starts = [len(example.ids) - example.n_answer - n_header for example in part]
    prompts, seen = _padded([example.ids[:start] for example, start in zip(part, starts, strict=True)])
    tails, acting = _padded([example.ids[start:] for example, start in zip(part, starts, strict=True)])
    with torch.no_grad(), model.disable_adapter():
        cache = prefilled(inner, prompts, seen, min(prefix, *starts))
    first = torch.tensor(starts, device=tails.device)[:, None]
    places = first + torch.arange(tails.shape[1], device=tails.device)
    hidden: torch.Tensor = inner(
        input_ids=tails,
        attention_mask=torch.cat([seen, acting], 1),
        position_ids=places,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    learned = torch.arange(tails.shape[1] - 1, device=tails.device) >= n_header - 1
    return hidden, tails, learned & acting[:, 1:].bool()


def prefilled(inner: Any, ids: torch.Tensor, mask: torch.Tensor, prefix: int) -> Any:
    """The KV cache of prompts, what all of them begin with computed once.

    Args:
        inner: the decoder without its head.
        ids: (B, T) int64.
        mask: (B, T) int64, 0 for padding.
        prefix: tokens that all rows begin with, fewer than T.
    """
    cache = None
    if prefix and len(ids) > 1:
        cache = shared_prefix(inner, ids, prefix)
        ids = ids[:, prefix:]
    if ids.shape[1]:
        cache = inner(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True
        ).past_key_values
    return cache


def shared_prefix(inner: Any, ids: torch.Tensor, prefix: int) -> Any:
    """The KV cache of a prefix that all rows share: computed once, seen by each row.

    Args:
        inner: the decoder without its head.
        ids: (B, T) int64.
        prefix: tokens that all rows begin with, at least one.
    """
    cache = inner(input_ids=ids[:1, :prefix], use_cache=True).past_key_values
    for layer in cache.layers:
        layer.keys = layer.keys.expand(len(ids), -1, -1, -1)
        layer.values = layer.values.expand(len(ids), -1, -1, -1)
    return cache


def _padded(rows: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row.astype("int64"))
        mask[i, : len(row)] = 1
    return ids.to(device()), mask.to(device())
