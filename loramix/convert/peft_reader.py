"""Reads matrices and scalings of a PEFT LoRA directory without PEFT, and rejects unsupported kinds.

Covers PEFT's format only (``adapter_config.json`` and ``adapter_model.safetensors``); `loramix.convert.mlx` reads
mlx-lm's format into the same record, and `loramix.convert.adapter` converts either to GGUF.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from loramix.convert.wrappers import unwrapped_names
from loramix.errors import InvalidArtifact, NotFound, Unsupported
from loramix.formats.textfile import is_plain_utf8, read_text
from loramix.formats.validate import read_safetensors

_WEIGHT = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_WHOLE = re.compile(r"(?:.+\.)?(?P<module>embed_tokens|lm_head)(?:\.(?:base_layer|original_module))?\.weight")
_REFUSED = {
    "use_dora": "DoRA rescales columns by the merged weight's norm, which llama.cpp cannot do",
    "modules_to_save": "full modules were trained, which an adapter file cannot store",
    "trainable_token_indices": "new token embeddings were trained, which an adapter file cannot store",
    "lora_bias": "the GGUF format cannot store LoRA biases",
    "layer_replication": "layers are replicated, which needs another base",
    "target_parameters": "parameters outside linear layers were adapted, which llama.cpp cannot do",
    "fan_in_fan_out": "its matrices are stored transposed (Conv1D), which no Llama base has",
    "use_qalora": "QALoRA pools its inputs, which llama.cpp cannot do",
    "use_bdlora": "block-diagonal LoRA stores its matrices in another shape",
    "kasa_config": "KaSA truncates the base's weights and scales by singular values, which llama.cpp cannot do",
    "monteclora_config": "MonteCLoRA draws its weights from a distribution, which llama.cpp cannot do",
    "arrow_config": "Arrow routes between adapters inside each layer, which llama.cpp cannot do",
}
_MOVES_BASE = (
    "pissa",
    "corda",
    "olora",
    "loftq",
    "lora_ga",
)  # initializations that change the base's weights


Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """An adapter in PEFT's form: pairs of A (R, in) and B (out, R), float32, and the scaling by module name."""

    pairs: dict[str, tuple[Floats, Floats]]
    scaling: dict[str, float]
    name: str
    base: str = ""
    """Name or path of the base in the adapter's configuration, for messages."""
    model_class: str = ""
    """transformers' class of that model; empty if unknown."""
    invocation: tuple[int, ...] = ()
    """Invocation tokens of an activated LoRA; empty means always active."""
    copies: dict[str, Floats] = field(default_factory=dict)
    """Full embeddings saved with the adapter, by module; they must equal the base's."""
    as_saved: bool = True
    """Whether PEFT can read it unchanged: original names, no further tensors, no byte-order mark."""


def read_peft(directory: Path) -> PeftAdapter:
    """Read a PEFT LoRA directory without PEFT.

    Args:
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        NotFound: one of the two files is missing.
        InvalidArtifact: a file is damaged.
        Unsupported: a kind of adapter that llama.cpp cannot run; the message has the reason.
    """
    config_path, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    if not weights.is_file() and (directory / "adapter_model.bin").is_file():
        raise Unsupported(
            f"{directory} contains a pickle (.bin), which can run code: save the adapter again as safetensors."
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
    copies: dict[str, Floats] = {}
    adapters: set[str] = set()
    saved: dict[str, str] = {}  # module names of the trained model, to which rank and alpha patterns apply
    plain = unwrapped_names(tensors, str(weights))
    for key, tensor in tensors.items():
        match = _WEIGHT.fullmatch(plain[key])
        if match is not None:
            adapters.add(match["adapter"] or "")
            saved[match["module"]] = key.removeprefix("base_model.model.").partition(".lora_")[0]
            halves.setdefault(match["module"], {})[match["half"]] = tensor
        elif tensor.ndim == 2 and (whole := _WHOLE.fullmatch(plain[key])):
            copies[whole["module"]] = tensor
        else:
            raise Unsupported(f"{weights} has {key!r}, {_explain_tensor(key)}.")
    if len(adapters) > 1:
        raise Unsupported(
            f"{weights} has several adapters ({', '.join(sorted(adapters))[:100]}); save each in its own directory."
        )
    pairs = paired(halves, "A", "B", weights)
    as_saved = (
        not copies
        and adapters == {""}
        and all(key == f"base_model.model.{plain[key]}" for key in tensors)
        and is_plain_utf8(config_path)
    )
    scaling = {
        module: _scaling(config, (module, saved[module]), a.shape[0]) for module, (a, _) in pairs.items()
    }
    invocation = config.get("alora_invocation_tokens") or []
    if not isinstance(invocation, list) or not all(type(token) is int and token >= 0 for token in invocation):
        raise InvalidArtifact(f"alora_invocation_tokens of {config_path} must be token ids; save it again.")
    base = config.get("base_model_name_or_path")
    named = base if isinstance(base, str) and base != "None" else ""  # PEFT writes None as a text
    mapping = config.get("auto_mapping")
    model_class = str(mapping.get("base_model_class") or "") if isinstance(mapping, dict) else ""
    return PeftAdapter(
        pairs, scaling, directory.name, named, model_class, tuple(invocation), copies, as_saved
    )


def paired(
    halves: Mapping[str, Mapping[str, Floats]], a: str, b: str, weights: Path
) -> dict[str, tuple[Floats, Floats]]:
    """Pair A (R, in) with B (out, R) for each module, and check that they match.

    Args:
        halves: the matrices by module, then by half.
        a: name of the half that is A.
        b: name of the half that is B.
        weights: the file, for messages.

    Raises:
        InvalidArtifact: a matrix is missing, its rank differs, or there are no matrices.
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
                f"{weights}: {module!r} lacks one of its two matrices, or their ranks differ; save the adapter again."
            )
        pairs[module] = first, second
    if not pairs:
        raise InvalidArtifact(f"{weights} has no LoRA matrices; train the adapter again.")
    return pairs


def read_config(path: Path) -> dict[str, Any]:
    """Read an adapter_config.json, PEFT's or mlx-lm's.

    Raises:
        InvalidArtifact: not a JSON object.
    """
    try:
        config = json.loads(read_text(path, InvalidArtifact))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise InvalidArtifact(f"{path} is not usable JSON ({error}); save the adapter again.") from None
    return config


_PARTS = (
    ("lora_magnitude_vector", "a magnitude of DoRA, which llama.cpp cannot apply; train without use_dora"),
    (
        "lora_embedding_",
        "a LoRA on the token embeddings, which llama.cpp cannot run safely; train again without embed_tokens in "
        "target_modules",
    ),
    ("token_adapter", "trained token embeddings; train without trainable_token_indices"),
    ("modules_to_save", "a full module that was trained too; train without modules_to_save"),
    ("_flat_param", "a part of FSDP's flattened weights; save with FSDP's full state dict"),
    ("v_head.", "a value head of reinforcement learning; save the model without it"),
    ("score.", "a classifier's head; adapters of text generation run here"),
    ("classifier.", "a classifier's head; adapters of text generation run here"),
    ("hada_", "a LoHa matrix; train a plain LoRA"),
    ("lokr_", "a LoKr matrix; train a plain LoRA"),
    ("oft_", "an OFT matrix; train a plain LoRA"),
    ("ia3_", "an IA3 vector; train a plain LoRA"),
    ("prompt_embeddings", "a soft prompt; train a plain LoRA"),
    (
        "lora_down",
        "a LoRA in the format of image models (lora_down, lora_up); adapters of text models run here",
    ),
    (
        "lora_up",
        "a LoRA in the format of image models (lora_down, lora_up); adapters of text models run here",
    ),
    ("vision", "a part of an image encoder; adapters of text models run here"),
    (
        ".base_layer.",
        "a weight of the base: the full model was saved; save the adapter with save_pretrained",
    ),
    ("lora_", "a part of a LoRA that llama.cpp cannot apply; train a plain LoRA of linear layers"),
    ("layernorm", "a full norm that was trained too; train without it"),
    ("norm.", "a full norm that was trained too; train without it"),
    ("bias", "a trained bias; train with bias='none'"),
    ("layers.", "a weight of a full model; save the adapter with PEFT's save_pretrained"),
)


def _explain_tensor(key: str) -> str:
    """Explain what a tensor is if it is not a LoRA matrix of a linear layer, and how to fix it."""
    found = next(
        (what for part, what in _PARTS if part in key), "a tensor of an unknown kind; train a plain LoRA"
    )
    return f"which is not a LoRA matrix: {found}"


def _refuse(config: Mapping[str, Any], directory: Path) -> None:
    kind = config.get("peft_type")
    if kind is None:
        raise InvalidArtifact(
            f"{directory / 'adapter_config.json'} has no peft_type; save the adapter again with PEFT."
        )
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
            f"{directory} starts from {init}, which changes the base's weights, so it does not fit the original base; "
            "save it with PEFT's path_initial_model_for_weight_conversion, or train with init_lora_weights=True."
        )


def _scaling(config: Mapping[str, Any], names: tuple[str, str], rank: int) -> float:
    """Compute alpha / r, or alpha / sqrt(r) for rsLoRA; patterns match as in PEFT (peft.utils, get_pattern_key).

    Args:
        config: content of adapter_config.json.
        names: names of the module in the language model and in the trained model.
        rank: rank of its matrices.
    """
    alpha, patterns = config.get("lora_alpha", 8), config.get("alpha_pattern") or {}
    try:
        for pattern, value in patterns.items():
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                alpha = value
                break
    except (AttributeError, re.error) as error:
        raise InvalidArtifact(
            f"alpha_pattern {str(patterns)[:80]!r} is invalid ({error}); correct it."
        ) from None
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
        raise InvalidArtifact(f"lora_alpha of {names[0]!r} is {alpha!r}; it must be a positive number.")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
