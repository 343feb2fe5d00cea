"""Reads an mlx-lm LoRA directory into the same record as a PEFT one.

mlx-lm stores ``lora_a`` (in, R) and ``lora_b`` (R, out) and computes ``y + scale * (x @ a) @ b``
(mlx_lm/tuner/lora.py). Transposed, they are PEFT's A and B; ``scale`` is PEFT's complete scaling, independent of
alpha and rank. Modules have the names, and the order of rotary halves, of the Hugging Face checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loramix.convert.peft_reader import Floats, PeftAdapter, paired, read_config
from loramix.convert.wrappers import unwrapped_names
from loramix.errors import InvalidArtifact, NotFound, Unsupported
from loramix.formats.validate import read_safetensors

WEIGHTS = "adapters.safetensors"
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<half>[ab])")


def is_mlx(directory: Path) -> bool:
    """Whether a directory is mlx-lm's rather than PEFT's."""
    return any((directory / name).is_file() for name in (WEIGHTS, "adapters.npz"))


def read_mlx(directory: Path) -> PeftAdapter:
    """Read an mlx-lm LoRA directory without MLX.

    Args:
        directory: holds ``adapter_config.json`` and ``adapters.safetensors``.

    Raises:
        NotFound: one of the two files is missing.
        InvalidArtifact: a file is damaged.
        Unsupported: a kind of adapter that llama.cpp cannot run; the message has the reason.
    """
    config_path, weights = directory / "adapter_config.json", directory / WEIGHTS
    if not weights.is_file():
        raise Unsupported(
            f"{directory} has the adapters.npz of an old mlx-lm; save the adapter again with a newer mlx-lm."
        )
    if not config_path.is_file():
        raise NotFound(f"no {config_path.name} in {directory}; give the directory that mlx_lm.lora wrote.")
    config = read_config(config_path)
    scale = _scale(config, config_path)
    halves: dict[str, dict[str, Floats]] = {}
    tensors = read_safetensors(weights)
    plain = unwrapped_names(tensors, str(weights))
    for key, tensor in tensors.items():
        match = _MATRIX.fullmatch(plain[key])
        if match is None:
            raise Unsupported(
                f"{weights} has {key!r}, not a LoRA matrix (DoRA's magnitudes end with '.m'); train without it."
            )
        if match["module"].endswith("embed_tokens"):
            raise Unsupported(f"{weights} adapts {match['module']!r}, the token embedding; train without it.")
        halves.setdefault(match["module"], {})[match["half"]] = np.ascontiguousarray(tensor.T)
    pairs = paired(halves, "a", "b", weights)
    base = config.get("model")
    named = base if isinstance(base, str) else ""
    return PeftAdapter(pairs, dict.fromkeys(pairs, scale), directory.name, named)


def _scale(config: Mapping[str, Any], path: Path) -> float:
    """Return the scale of ``lora_parameters``."""
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise Unsupported(
            f"{path} has fine_tune_type {kind!r}; only 'lora' runs in llama.cpp: train with that."
        )
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise InvalidArtifact(f"{path} has no lora_parameters; give the directory that mlx_lm.lora wrote.")
    scale = parameters.get("scale")
    if "alpha" in parameters:
        raise Unsupported(
            f"{path} has an alpha, which older mlx-lm versions use (scale * alpha / rank) and newer ones ignore; "
            "remove it, and set scale to the factor that was used in training."
        )
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < math.inf:
        raise InvalidArtifact(
            f"scale of lora_parameters in {path} is {scale!r}; it must be a positive number."
        )
    return float(scale)
