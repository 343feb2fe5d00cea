"""Activated LoRA (Greenewald et al., arXiv 2504.12397): adapters that are active from the answer's header on.

The prompt's KV cache is the bare base's, so the gate's forward pass is also the prefill of every skill.
Training is cheaper too: the forward pass over the prompt needs no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from loramix.train.data import Example
from loramix.train.forward import padded, shared_prefix


def late_states(
    model: Any, part: Sequence[Example], n_header: int, prefix: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the last hidden states from the header on, with the adapter active only there.

    Args:
        model: PEFT model.
        part: examples of the batch.
        n_header: number of tokens in the answer's header.
        prefix: length of the common prefix of all prompts, which is computed only once.

    Returns:
        Hidden states (B, T, D), ids (B, T) int64 from the header on, and the loss mask (B, T-1)
        bool.
    """
    inner = model.get_base_model().model
    starts = [len(example.ids) - example.n_answer - n_header for example in part]
    prompts, seen = padded([example.ids[:start] for example, start in zip(part, starts, strict=True)])
    tails, acting = padded([example.ids[start:] for example, start in zip(part, starts, strict=True)])
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
    """Compute the KV cache of prompts; their common prefix is computed only once.

    Args:
        inner: decoder without its head.
        ids: (B, T) int64.
        mask: (B, T) int64, 0 for padding.
        prefix: length of the common prefix of all rows, less than T.
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
