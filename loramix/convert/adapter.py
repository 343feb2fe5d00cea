"""PEFT LoRA directory → GGUF LoRA file that llama.cpp applies as PEFT does.

llama.cpp computes ``scale * alpha / rank`` itself, from one alpha and each tensor's rank. What PEFT scales
otherwise (rsLoRA, alpha and rank patterns) is folded into B, and only then does B change at all.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.convert.validate import INVOCATION, BaseShape, check_adapter, read_base, read_safetensors
from loramix.errors import InvalidArtifact, NotFound, SelfCheckFailed, Unsupported, WrongBase
from loramix.paths import atomic_path

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
}


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """A PEFT adapter as read: pairs (A (R, in), B (out, R)) float32 and scaling by module name."""

    pairs: dict[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]
    scaling: dict[str, float]
    name: str
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
    try:
        config = json.loads(config_path.read_text())
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise InvalidArtifact(
            f"{config_path} is not usable JSON ({error}); save the adapter again."
        ) from None
    _refuse(config, directory)
    tensors = read_safetensors(weights)
    halves: dict[str, dict[str, npt.NDArray[np.float32]]] = {}
    for key, tensor in tensors.items():
        match = _WEIGHT.fullmatch(key)
        if match is None:
            raise Unsupported(f"{weights} holds {key!r}, which is no LoRA matrix; train without it.")
        halves.setdefault(match["module"], {})[match["half"]] = tensor
    pairs = {}
    for module, half in halves.items():
        if set(half) != {"A", "B"} or half["A"].ndim != 2 or half["A"].shape[0] != half["B"].shape[-1]:
            raise InvalidArtifact(
                f"{weights}: {module!r} lacks a half, or its ranks differ; save the adapter again."
            )
        pairs[module] = (half["A"], half["B"])
    if not pairs:
        raise InvalidArtifact(f"{weights} holds no LoRA matrices; train the adapter again.")
    scaling = {module: _scaling(config, module, a.shape[0]) for module, (a, _) in pairs.items()}
    invocation = config.get("alora_invocation_tokens") or []
    if not isinstance(invocation, list) or not all(type(token) is int and token >= 0 for token in invocation):
        raise InvalidArtifact(f"alora_invocation_tokens of {config_path} must be token ids; save it again.")
    return PeftAdapter(pairs, scaling, directory.name, tuple(invocation))


def _refuse(config: Mapping[str, Any], directory: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise Unsupported(f"{directory} is a {kind} adapter; only LoRA runs in llama.cpp: train one.")
    for key, why in _REFUSED.items():
        if config.get(key):
            raise Unsupported(f"{directory} cannot be converted, {key} is set: {why}; train without it.")
    if config.get("bias", "none") != "none":
        raise Unsupported(f"{directory} cannot be converted, it trains biases; train with bias='none'.")


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA, with patterns matched as PEFT does (peft.utils, get_pattern_key)."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
        raise InvalidArtifact(f"lora_alpha of {module!r} is {alpha!r}; it must be a positive number.")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def convert_adapter(
    source: Path,
    base: Path,
    out: Path,
    *,
    name: str | None = None,
    base_name: str | None = None,
    base_sha256: str | None = None,
    outtype: str = "f16",
) -> None:
    """Convert a PEFT LoRA into a GGUF LoRA.

    Args:
        source: PEFT directory.
        base: the GGUF base that it was trained on.
        out: file to write.
        name: skill name for the metadata; by default the directory's.
        base_name: the base's name for the metadata.
        base_sha256: its digest; an adapter that carries it is refused on any other base.
        outtype: ``f16`` or ``f32``.

    Raises:
        NotFound, InvalidArtifact, Unsupported: see `read_peft`.
        WrongBase: shapes that are not the base's.
    """
    import gguf

    adapter = read_peft(source)
    _, shape = read_base(base)
    kind = gguf.GGMLQuantizationType.F16 if outtype == "f16" else gguf.GGMLQuantizationType.F32
    tensors, alpha = to_gguf(adapter, shape)
    with atomic_path(out) as temporary:
        writer = gguf.GGUFWriter(temporary, shape.architecture)
        writer.add_type("adapter")
        writer.add_name(name or adapter.name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.add_string("adapter.lora.task_name", name or adapter.name)
        if adapter.invocation:
            array, uint32 = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
            writer.add_key_value(INVOCATION, list(adapter.invocation), array, sub_type=uint32)
        if base_name:
            writer.add_string("loramix.base.name", base_name)
        if base_sha256:
            writer.add_string("loramix.base.sha256", base_sha256)
        for key in sorted(tensors):
            data = tensors[key].astype(np.float16 if outtype == "f16" else np.float32)
            if not np.isfinite(data).all():
                raise Unsupported(f"{key} does not fit float16; convert with --outtype f32.")
            writer.add_tensor(key, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        check_adapter(temporary.read_bytes(), shape, str(out), base_sha256=base_sha256)


def to_gguf(adapter: PeftAdapter, base: BaseShape) -> tuple[dict[str, npt.NDArray[np.float32]], float]:
    """Rename, permute and fold a PEFT adapter's matrices; the runtime pads them (`loramix.convert.fuse`).

    Args:
        adapter: as read.
        base: shapes of the base's matrices.

    Returns:
        Tensors by GGUF name, ``.lora_a`` (R, in) and ``.lora_b`` (out, R) float32, and the alpha to write.
    """
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, base.n_layer)
    first = next(iter(adapter.pairs))
    alpha = float(np.float32(adapter.scaling[first] * adapter.pairs[first][0].shape[0]))
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for module, (a, b) in adapter.pairs.items():
        target = names.get_name(module)
        weight = f"{target}.weight"
        if target is None or weight not in base.tensors:
            raise WrongBase(
                f"the base has no matrix for {module!r}: this adapter is for another base; give that one."
            )
        if (b.shape[0], a.shape[1]) != base.tensors[weight]:
            raise WrongBase(
                f"{module!r} adapts a matrix of {b.shape[0]} x {a.shape[1]}, the base's is "
                f"{' x '.join(map(str, base.tensors[weight]))}: this adapter is for another base; give that one."
            )
        if target.endswith("attn_q"):
            b = permute(b, base.n_head)
        elif target.endswith("attn_k"):
            b = permute(b, base.n_head_kv)
        factor = adapter.scaling[module] * a.shape[0] / alpha
        if not math.isclose(factor, 1.0, rel_tol=1e-7):
            b = b * np.float32(factor)
        tensors[f"{weight}.lora_a"] = a
        tensors[f"{weight}.lora_b"] = b
    return tensors, alpha


def permute(b: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Reorder rows as llama.cpp's converter reorders Q and K (conversion/llama.py): halves interleaved.

    Args:
        b: (out, R) or a bias (out,), out a multiple of ``2 * heads``.
        heads: attention heads of Q, or key-value heads of K.
    """
    out = b.shape[0]
    if out % (2 * heads):
        raise SelfCheckFailed(f"{out} rows do not divide into {heads} heads of two halves.")
    paired = b.reshape(heads, 2, out // heads // 2, *b.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(paired.reshape(b.shape))
