"""What a forward pass keeps for the backward one, and gradient checkpointing where memory is short.

Chen et al., arXiv 1604.06174: each layer keeps its input alone, and is computed again on the way back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from loramix.hardware import memory_bytes
from loramix.train.data import Example

SHARE = 0.8
"""Of the memory that is free once the base is loaded; the rest is for the optimizer and temporary values."""
FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The size of one micro-batch."""

    rows: int
    length: int
    """Tokens of its longest row."""
    answers: int
    """Answer tokens of all rows: the positions that the head reads."""
    prefix: int = 0
    """Tokens that all rows begin with; they are read once."""

    @classmethod
    def of(cls, part: Sequence[Example], prefix: int) -> BatchShape:
        """The size of a micro-batch of examples that begin with ``prefix`` equal tokens."""
        longest = max(len(example.ids) for example in part)
        return cls(len(part), longest, sum(example.n_answer for example in part), prefix)

    @property
    def tokens(self) -> int:
        """Tokens that are read, padding included."""
        shared = self.prefix if self.rows > 1 else 0
        return self.rows * (self.length - shared) + shared


def trained_layers(model: Any) -> list[Any]:
    """The decoder's layers with an adapter, lowest first: gradients pass these and what lies between them.

    Args:
        model: a PEFT model.
    """
    return [layer for layer in model.get_base_model().model.layers if _learns(layer)]


def kept_bytes(model: Any, shape: BatchShape, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that a forward pass keeps for the backward one, activations and log-probabilities.

    Args:
        model: a PEFT model; its adapted layers count, since autograd keeps nothing below the lowest.
        shape: of the micro-batch.
        dtype: of the products, float32 or bfloat16 under autocast.
    """
    layers = trained_layers(model)
    kept = sum(_layer_bytes(layer, shape, dtype) for layer in layers)
    return kept + _log_probabilities(model, shape)


def step_bytes(model: Any, shape: BatchShape, dtype: torch.dtype = torch.float32) -> int:
    """`kept_bytes` and the two gradients of the size of the log-probabilities that the backward pass begins with."""
    return kept_bytes(model, shape, dtype) + 2 * _log_probabilities(model, shape)


def _log_probabilities(model: Any, shape: BatchShape) -> int:
    """Bytes of the answers' log-probabilities, which are float32 in any case."""
    vocabulary: int = model.get_base_model().lm_head.out_features
    return FLOAT32 * vocabulary * shape.answers


def _layer_bytes(layer: Any, shape: BatchShape, dtype: torch.dtype) -> int:
    """What one adapted layer keeps: what its norms, attention, activation and LoRA matrices read."""
    attention, size = layer.self_attn, int(dtype.itemsize)
    queries, keys = int(attention.q_proj.out_features), int(attention.k_proj.out_features)
    hidden, inner = int(attention.q_proj.in_features), int(layer.mlp.up_proj.out_features)
    widths = {"q_norm": queries, "k_norm": keys}
    norms = [name for name, _ in layer.named_modules() if name.endswith("norm")]
    per_token = FLOAT32 * sum(widths.get(name.rpartition(".")[2], hidden) for name in norms)
    per_token += size * (2 * queries + 3 * inner) + _adapter_bytes(layer, dtype)
    repeated, window = keys, getattr(attention, "sliding_window", None) or shape.length
    # padding and windows need a mask, and with a mask keys and values are copied for each head of the queries
    if shape.rows > 1 or shape.length > window:
        per_token += size * shape.length
        if keys != attention.head_dim or dtype != torch.float32:  # a single head is expanded without a copy
            repeated = queries
    kept: int = per_token * shape.tokens + 2 * size * repeated * shape.rows * shape.length
    return kept


def _adapter_bytes(layer: Any, dtype: torch.dtype) -> int:
    """What a layer's LoRA matrices keep for each token: their inputs, and what is between A and B."""
    groups: dict[str, int] = {}
    total = 0
    for name, module in layer.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        part = name.rpartition(".")[2]
        total += int(dtype.itemsize) * sum(module.r.values())
        if any(isinstance(drop, torch.nn.Dropout) and drop.p for drop in module.lora_dropout.values()):
            total += (dtype.itemsize + FLOAT32) * module.in_features  # its own copy, and what was left out
        elif dtype != torch.float32:
            total += dtype.itemsize * module.in_features  # autocast rounds the input for each matrix
        elif part != "o_proj":  # attention keeps its result already
            groups[_INPUTS.get(part, part)] = FLOAT32 * module.in_features
    return total + sum(groups.values())


_INPUTS = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention"}
_INPUTS |= {"gate_proj": "feed-forward", "up_proj": "feed-forward"}


def is_short(model: Any, shapes: Iterable[BatchShape], dtype: torch.dtype = torch.float32) -> bool:
    """Whether free memory does not hold what the largest micro-batch takes.

    Args:
        model: a PEFT model, loaded.
        shapes: of the micro-batches.
        dtype: see `kept_bytes`.
    """
    _, available = memory_bytes()
    most = max(step_bytes(model, shape, dtype) for shape in shapes)
    return bool(available) and most > SHARE * available


def checkpoint_layers(model: Any) -> None:
    """Keep each layer's input alone; the results stay the same, a step takes a third longer.

    Args:
        model: a PEFT model; no KV cache may be used in training afterwards: it would be written twice.
    """
    for layer in trained_layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _learns(layer: Any) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())
