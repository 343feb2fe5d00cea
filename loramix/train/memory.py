"""Estimates the memory that a forward pass keeps for the backward pass; gradient checkpointing if memory is short.

With checkpointing (Chen et al., arXiv 1604.06174) each layer keeps only its input, and is recomputed in the backward
pass.
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
"""Share of the free memory after loading the base; the rest is for the optimizer and temporary values."""
FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The size of one micro-batch."""

    rows: int
    length: int
    """Length of the longest row in tokens."""
    answers: int
    """Number of answer tokens of all rows, the positions that the head computes."""
    prefix: int = 0
    """Length of the common prefix in tokens, which is computed once."""

    @classmethod
    def of(cls, part: Sequence[Example], prefix: int) -> BatchShape:
        """Return the size of a micro-batch of examples with a common prefix."""
        longest = max(len(example.ids) for example in part)
        return cls(len(part), longest, sum(example.n_answer for example in part), prefix)

    @property
    def tokens(self) -> int:
        """Number of computed tokens, including padding."""
        shared = self.prefix if self.rows > 1 else 0
        return self.rows * (self.length - shared) + shared


def trained_layers(model: Any) -> list[Any]:
    """Return the decoder's layers with an adapter, lowest first; gradients pass them and the layers between them.

    Args:
        model: a PEFT model.
    """
    return [layer for layer in model.get_base_model().model.layers if _learns(layer)]


def kept_bytes(model: Any, shape: BatchShape, dtype: torch.dtype = torch.float32) -> int:
    """Estimate the bytes of activations and log-probabilities kept for the backward pass.

    Args:
        model: a PEFT model; autograd keeps nothing below its lowest adapted layer.
        shape: shape of the micro-batch.
        dtype: type of the products, float32 or bfloat16 under autocast.
    """
    layers = trained_layers(model)
    kept = sum(_layer_bytes(layer, shape, dtype) for layer in layers)
    return kept + _log_probabilities(model, shape)


def step_bytes(model: Any, shape: BatchShape, dtype: torch.dtype = torch.float32) -> int:
    """Estimate `kept_bytes` plus the first two gradients, which have the size of the log-probabilities."""
    return kept_bytes(model, shape, dtype) + 2 * _log_probabilities(model, shape)


def _log_probabilities(model: Any, shape: BatchShape) -> int:
    """Bytes of the answers' log-probabilities, which are always float32."""
    vocabulary: int = model.get_base_model().lm_head.out_features
    return FLOAT32 * vocabulary * shape.answers


def _layer_bytes(layer: Any, shape: BatchShape, dtype: torch.dtype) -> int:
    """Bytes that one adapted layer keeps: the inputs of its norms, attention, activation and LoRA matrices."""
    attention, size = layer.self_attn, int(dtype.itemsize)
    queries, keys = int(attention.q_proj.out_features), int(attention.k_proj.out_features)
    hidden, inner = int(attention.q_proj.in_features), int(layer.mlp.up_proj.out_features)
    widths = {"q_norm": queries, "k_norm": keys}
    norms = [name for name, _ in layer.named_modules() if name.endswith("norm")]
    per_token = FLOAT32 * sum(widths.get(name.rpartition(".")[2], hidden) for name in norms)
    per_token += size * (2 * queries + 3 * inner) + _adapter_bytes(layer, dtype)
    repeated, window = keys, getattr(attention, "sliding_window", None) or shape.length
    # padding and windows need a mask, with which keys and values are copied for each query head
    if shape.rows > 1 or shape.length > window:
        per_token += size * shape.length
        if keys != attention.head_dim or dtype != torch.float32:  # a single head is expanded without a copy
            repeated = queries
    kept: int = per_token * shape.tokens + 2 * size * repeated * shape.rows * shape.length
    return kept


def _adapter_bytes(layer: Any, dtype: torch.dtype) -> int:
    """Bytes that a layer's LoRA matrices keep per token: their inputs, and the values between A and B."""
    groups: dict[str, int] = {}
    total = 0
    for name, module in layer.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        part = name.rpartition(".")[2]
        total += int(dtype.itemsize) * sum(module.r.values())
        if any(isinstance(drop, torch.nn.Dropout) and drop.p for drop in module.lora_dropout.values()):
            total += (dtype.itemsize + FLOAT32) * module.in_features  # a copy, and the dropout mask
        elif dtype != torch.float32:
            total += dtype.itemsize * module.in_features  # autocast rounds the input for each matrix
        elif part != "o_proj":  # the attention already keeps its result
            groups[_INPUTS.get(part, part)] = FLOAT32 * module.in_features
    return total + sum(groups.values())


_INPUTS = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention"}
_INPUTS |= {"gate_proj": "feed-forward", "up_proj": "feed-forward"}


def is_short(model: Any, shapes: Iterable[BatchShape], dtype: torch.dtype = torch.float32) -> bool:
    """Whether free memory is too small for the largest micro-batch.

    Args:
        model: a loaded PEFT model.
        shapes: shapes of the micro-batches.
        dtype: see `kept_bytes`.
    """
    _, available = memory_bytes()
    most = max(step_bytes(model, shape, dtype) for shape in shapes)
    return bool(available) and most > SHARE * available


def checkpoint_layers(model: Any) -> None:
    """Enable gradient checkpointing; results stay the same, and a step takes a third longer.

    Args:
        model: a PEFT model; training must not use a KV cache afterwards, because it would be written twice.
    """
    for layer in trained_layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _learns(layer: Any) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())
