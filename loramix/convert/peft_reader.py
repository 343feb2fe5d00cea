"""A PEFT LoRA directory, read without PEFT: its matrices and scalings, or the reason why it cannot run.

Knows PEFT's format only (``adapter_config.json`` and ``adapter_model.safetensors``); `loramix.convert.mlx` reads
mlx-lm's into the same record, and `loramix.convert.adapter` makes GGUF of either.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from loramix.convert.validate import read_safetensors
from loramix.errors import InvalidArtifact, NotFound, Unsupported

_WEIGHT = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")
_REFUSED = {
    "use_dora": "DoRA rescales columns by the merged weight's norm, which llama.cpp cannot do",
    "modules_to_save": "whole modules were trained, which an adapter file cannot hold",
    "trainable_token_indices": "new token embeddings were trained, which an adapter file cannot hold",
    "lora_bias": "LoRA biases have no place in the GGUF format",
    "layer_replication": "layers are replicated, which needs another base",
    "target_parameters": "parameters outside linear layers were adapted, which llama.cpp cannot do",
    "fan_in_fan_out": "its matrices are stored transposed (Conv1D), which no Llama base has",
    "use_qalora": "QALoRA pools its inputs, which llama.cpp does not",
    "use_bdlora": "block-diagonal LoRA stores its matrices in another shape",
    "kasa_config": "KaSA truncates the base's weights and scales by singular values, which llama.cpp cannot do",
    "monteclora_config": "MonteCLoRA draws its weights from a distribution, which llama.cpp cannot do",
    "arrow_config": "Arrow routes between adapters inside each layer, which llama.cpp cannot do",
}
_MOVES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # inits that train against changed base weights


Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter as PEFT holds it: pairs (A (R, in), B (out, R)) float32 and scaling by module name."""

    pairs: dict[str, tuple[Floats, Floats]]
    scaling: dict[str, float]
    name: str
    base: str = ""
    """What it says it was trained on; a name or path on somebody's machine, for messages."""
    invocation: tuple[int, ...] = ()
    """Tokens from which on it acts, where it is a late adapter (activated LoRA)."""


def read_peft(directory: Path) -> PeftAdapter:
    """Read a PEFT LoRA directory without PEFT.

    Args:
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        NotFound: one of the two is missing.
        InvalidArtifact: damaged.
        Unsupported: a kind that llama.cpp cannot run, with the reason.
    """
    config_path, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    if not weights.is_file() and (directory / "adapter_model.bin").is_file():
        raise Unsupported(
            f"{directory} holds a pickle (.bin), which can run code: save it again as safetensors."
        )
    for path in (config_path, weights):
        if not path.is_file():
            raise NotFound(
                f"no {path.name} in {directory}; give the directory that PEFT's save_pretrained wrote."
            )
    config = read_config(config_path)
    _refuse(config, directory)
    tensors = read_safetensors(weights)
    halves: dict[str, dict[str, Floats]] = {}
    for key, tensor in tensors.items():
        match = _WEIGHT.fullmatch(key)
        if match is None:
            raise Unsupported(f"{weights} holds {key!r}, {_what_else(key, tensor)}; train without it.")
        halves.setdefault(match["module"], {})[match["half"]] = tensor
    pairs = paired(halves, "A", "B", weights)
    scaling = {module: _scaling(config, module, a.shape[0]) for module, (a, _) in pairs.items()}
    invocation = config.get("alora_invocation_tokens") or []
    if not isinstance(invocation, list) or not all(type(token) is int and token >= 0 for token in invocation):
        raise InvalidArtifact(f"alora_invocation_tokens of {config_path} must be token ids; save it again.")
    base = config.get("base_model_name_or_path")
    named = base if isinstance(base, str) else ""
    return PeftAdapter(pairs, scaling, directory.name, named, tuple(invocation))


def paired(
    halves: Mapping[str, Mapping[str, Floats]], a: str, b: str, weights: Path
) -> dict[str, tuple[Floats, Floats]]:
    """A (R, in) and B (out, R) of each module, if both are there and fit each other.

    Args:
        halves: the matrices by module, then by half.
        a: name of the half that is A.
        b: name of the half that is B.
        weights: the file, for messages.

    Raises:
        InvalidArtifact: they do not, or there are none.
    """
    pairs = {}
    for module, half in halves.items():
        first, second = half.get(a), half.get(b)
        if (
            first is None
            or second is None
            or not first.ndim == second.ndim == 2
            or not first.shape[0]
            or first.shape[0] != second.shape[1]
        ):
            raise InvalidArtifact(
                f"{weights}: {module!r} lacks a half, or its ranks differ; save the adapter again."
            )
        pairs[module] = first, second
    if not pairs:
        raise InvalidArtifact(f"{weights} holds no LoRA matrices; train the adapter again.")
    return pairs


def read_config(path: Path) -> dict[str, Any]:
    """Read an adapter_config.json, PEFT's or mlx-lm's.

    Raises:
        InvalidArtifact: not a JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise InvalidArtifact(f"{path} is not usable JSON ({error}); save the adapter again.") from None
    return config


def _what_else(key: str, tensor: Floats) -> str:
    """What a tensor is that is no LoRA matrix of a linear layer."""
    if "lora_magnitude_vector" in key:
        return "which is no LoRA matrix: a magnitude of DoRA, which llama.cpp cannot apply"
    if "lora_embedding_" in key:
        return (
            "which is no LoRA matrix of a linear layer: embeddings were adapted, which is unsafe in llama.cpp"
        )
    if key.endswith(("embed_tokens.weight", "lm_head.weight")):
        return f"which is no LoRA matrix: a whole embedding of {tensor.shape[0]} tokens, a new vocabulary"
    return "which is no LoRA matrix"


def _refuse(config: Mapping[str, Any], directory: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise Unsupported(f"{directory} is a {kind} adapter; only LoRA runs in llama.cpp: train one.")
    for key, why in _REFUSED.items():
        if config.get(key):
            raise Unsupported(f"{directory} cannot be converted, {key} is set: {why}; train without it.")
    if config.get("bias", "none") != "none":
        raise Unsupported(f"{directory} cannot be converted, it trains biases; train with bias='none'.")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_MOVES_BASE):
        raise Unsupported(
            f"{directory} starts from {init}, which changes the base's weights, so it fits no plain base; save it "
            "with PEFT's path_initial_model_for_weight_conversion, or train with init_lora_weights=True."
        )


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA, with patterns matched as PEFT does (peft.utils, get_pattern_key)."""
    alpha, patterns = config.get("lora_alpha", 8), config.get("alpha_pattern") or {}
    try:
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
    except (AttributeError, re.error) as error:
        raise InvalidArtifact(
            f"alpha_pattern {str(patterns)[:80]!r} is unusable ({error}); mend it."
        ) from None
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
        raise InvalidArtifact(f"lora_alpha of {module!r} is {alpha!r}; it must be a positive number.")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
