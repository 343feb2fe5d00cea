"""What a forward pass keeps for the backward one, and gradient checkpointing where memory is short.

Chen et al., arXiv 1604.06174: each layer keeps its input alone, and is computed again on the way back.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from loramix.hardware import memory_bytes

SHARE = 0.8
"""Of the memory that is free once the base is loaded; the rest is for the optimizer, the logits and others."""


def kept_bytes(config: Any, n_layers: int, n_tokens: int) -> int:
    """Bytes that a forward pass keeps for the backward one, in float32.

    Args:
        config: transformers' of a Llama base.
        n_layers: layers that gradients pass.
        n_tokens: of a micro-batch, padding included.
    """
    # a layer keeps what its norms, matrices, attention and activation read: see docs/tinyllama.md for measurements
    key_value = 2 * config.num_key_value_heads * config.head_dim
    width = 9 * config.hidden_size + 2 * key_value + 4 * config.intermediate_size
    return int(4 * width * n_layers * n_tokens)


def is_short(model: Any, n_layers: int, n_tokens: int) -> bool:
    """Whether free memory does not hold what a micro-batch keeps.

    Args:
        model: the base, loaded.
        n_layers: see `kept_bytes`.
        n_tokens: see `kept_bytes`.
    """
    _, available = memory_bytes()
    return bool(available) and kept_bytes(model.config, n_layers, n_tokens) > SHARE * available


def checkpoint_layers(model: Any) -> None:
    """Keep each layer's input alone; the results stay the same, a step takes a third longer.

    Args:
        model: a PEFT model; no KV cache may be used in training afterwards: it would be written twice.
    """
    for layer in model.get_base_model().model.layers:
        if any(parameter.requires_grad for parameter in layer.parameters()):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
