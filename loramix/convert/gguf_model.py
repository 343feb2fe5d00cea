"""Loads a GGUF base as a dequantized transformers model; rejects the file if a tensor would be unused.

transformers' own GGUF loader silently drops biases and RoPE factors of some architectures, so that training would
use other weights than serving.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from loramix.architectures import LINEAR
from loramix.convert.peft import unpermute
from loramix.errors import InvalidArtifact, Unsupported
from loramix.formats.validate import BaseShape, read_base

_ROPE_FACTORS = "rope_freqs.weight"
_GEMMA3_27B_LAYERS = 62  # this model scales its queries differently (src/models/gemma3.cpp)


def load_gguf(path: Path) -> Any:
    """Load a GGUF base into PyTorch.

    Args:
        path: a GGUF of one of `loramix.architectures.ARCHITECTURES`.

    Returns:
        A transformers causal LM, float32, with the file's dequantized values.

    Raises:
        NotFound, InvalidArtifact, Unsupported: see `loramix.formats.validate.read_base`; also for tensors or
            settings that the transformers model does not have.
    """
    import gguf
    import transformers

    file, shape = read_base(path)
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    settings = {
        key.removeprefix(f"{shape.architecture.name}."): value for key, value in file.metadata.items()
    }
    config = transformers.AutoConfig.for_model(
        shape.architecture.model_type, **_config(shape, settings, stored.keys(), str(path))
    )
    names = dict(_names(shape, stored.keys()))
    if lost := stored.keys() - names.values() - {_ROPE_FACTORS}:
        raise Unsupported(
            f"{path} has {min(lost)!r}, which no {shape.architecture.label} model has; train on another base."
        )
    state = {}
    for name, tensor_name in names.items():
        if tensor_name not in stored:
            raise InvalidArtifact(f"{path} lacks {tensor_name!r}; get the base again.")
        state[name] = torch.from_numpy(_values(stored[tensor_name], shape))
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    kind = getattr(transformers, shape.architecture.model_class)
    model = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, attn_implementation="sdpa"
    )
    if _ROPE_FACTORS in stored:
        divisor = torch.from_numpy(np.array(stored[_ROPE_FACTORS].data, np.float32))
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq / divisor
    return model


def _names(shape: BaseShape, stored: Any) -> Iterator[tuple[str, str]]:
    """Yield (transformers' name, GGUF's name) of each tensor that a model of this shape has."""
    yield "model.embed_tokens.weight", "token_embd.weight"
    yield "model.norm.weight", "output_norm.weight"
    if not shape.tied:
        yield "lm_head.weight", "output.weight"
    for layer in range(shape.n_layer):
        for module, tensor in (LINEAR | shape.architecture.norms).items():
            yield f"model.layers.{layer}.{module}.weight", f"blk.{layer}.{tensor}.weight"
            if (bias := f"blk.{layer}.{tensor}.bias") in stored:
                yield f"model.layers.{layer}.{module}.bias", bias


def _values(tensor: Any, shape: BaseShape) -> npt.NDArray[np.float32]:
    """Return a tensor's values in transformers' order, (out, in) or (out,) float32."""
    import gguf

    values = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
    if heads := shape.architecture.heads(tensor.name, shape.n_head, shape.n_head_kv):
        return unpermute(values.reshape(len(values), -1), heads).reshape(values.shape)
    if "norm" in tensor.name:
        values -= np.float32(shape.architecture.norm_offset)
    return values


def _config(shape: BaseShape, settings: dict[str, Any], stored: Any, name: str) -> dict[str, Any]:
    """Build the arguments of the transformers config.

    Args:
        shape: shape of the base.
        settings: the GGUF's metadata without the architecture's prefix.
        stored: names of the file's tensors.
        name: name of the file, for messages.
    """
    head = int(settings.get("attention.key_length", shape.n_embd // shape.n_head))
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(settings.get("rope.freq_base", 10000.0)),
    }
    scaling = settings.get("rope.scaling.type", "none")
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": float(settings["rope.scaling.factor"])}
    elif scaling != "none":
        raise Unsupported(
            f"{name} scales RoPE by {scaling!r}, which training does not support; use another base."
        )
    config: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.n_embd,
        "intermediate_size": int(settings["feed_forward_length"]),
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_head_kv,
        "head_dim": head,
        "max_position_embeddings": shape.context_length,
        "rms_norm_eps": float(settings["attention.layer_norm_rms_epsilon"]),
        "tie_word_embeddings": shape.tied,
        "rope_parameters": rope,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    for setting, modules in shape.architecture.bias_settings.items():
        config[setting] = f"blk.0.{LINEAR[modules[0]]}.bias" in stored
    if period := shape.architecture.sliding_period:
        window = int(settings.get("attention.sliding_window", 0))
        local = {"rope_type": "default", "rope_theta": float(settings.get("rope.freq_base_swa", 10000.0))}
        full = [not window or layer % period == period - 1 for layer in range(shape.n_layer)]
        config |= {
            "rope_parameters": {"full_attention": rope, "sliding_attention": local},
            "layer_types": ["full_attention" if every else "sliding_attention" for every in full],
            "sliding_window": window or None,
            "query_pre_attn_scalar": shape.n_embd // shape.n_head
            if shape.n_layer == _GEMMA3_27B_LAYERS
            else head,
        }
    return config
