"""GGUF LoRA → PEFT LoRA directory: what `loramix.convert.adapter` does, backwards.

For training on, or for a comparison in PyTorch, where only a pack is at hand.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loramix.convert.gguf_reader import read_gguf, tensor_values
from loramix.convert.validate import BaseShape, check_adapter
from loramix.errors import UsageError
from loramix.paths import write_bytes, write_text

PARTS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")


def export_peft(content: bytes, base: BaseShape, out: Path, name: str) -> None:
    """Write a GGUF LoRA as PEFT's ``save_pretrained`` would have.

    Args:
        content: the whole GGUF file.
        base: shapes of the base's matrices.
        out: directory to make.
        name: of the adapter, for messages.

    Raises:
        UsageError: the directory is there already.
        InvalidArtifact, WrongBase: see `loramix.convert.validate.check_adapter`.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; name a directory that does not.")
    from safetensors.numpy import save

    info = check_adapter(content, base, name)
    file = read_gguf(content, name)
    modules = module_names(base)
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    ranks: dict[str, int] = {}
    for weight, rank in info.ranks.items():
        a, b = (tensor_values(content, file.tensors[f"{weight}.lora_{half}"]) for half in "ab")
        module = modules[weight]
        if module.endswith("q_proj"):
            b = unpermute(b, base.n_head)
        elif module.endswith("k_proj"):
            b = unpermute(b, base.n_head_kv)
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(a, np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(b, np.float32)
        ranks[module] = rank
    r = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != r},
        "lora_alpha": info.alpha,
        "target_modules": sorted(ranks),
        "alora_invocation_tokens": list(info.invocation) or None,
    }
    write_bytes(out / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    write_text(out / "adapter_config.json", json.dumps(config, indent=1) + "\n")


def module_names(base: BaseShape) -> dict[str, str]:
    """Hugging Face's module by GGUF tensor, of all matrices that an adapter may change."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, base.n_layer)
    found = {"output.weight": "lm_head"}
    for layer in range(base.n_layer):
        for part in PARTS:
            module = f"model.layers.{layer}.{part}_proj"
            found[f"{names.get_name(module)}.weight"] = module
    return found


def unpermute(b: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Undo `loramix.convert.adapter.permute`.

    Args:
        b: (out, R) float32, as llama.cpp holds it.
        heads: as given to ``permute``.
    """
    out, rank = b.shape
    paired = b.reshape(heads, out // heads // 2, 2, rank).swapaxes(1, 2)
    return np.ascontiguousarray(paired.reshape(out, rank))
