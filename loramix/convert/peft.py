"""Converts a GGUF LoRA to a PEFT LoRA directory, the inverse of `loramix.convert.adapter`.

Used to continue training, or to compare with PyTorch, when only a pack is available.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loramix.convert.mlx import is_mlx, read_mlx
from loramix.convert.peft_reader import Floats, read_peft
from loramix.errors import UsageError
from loramix.formats.validate import BaseShape, check_adapter
from loramix.models.fuse import read_pairs
from loramix.paths import atomic_directory, write_bytes, write_text


def export_peft(content: bytes, base: BaseShape, out: Path, name: str) -> None:
    """Write a GGUF LoRA in the format of PEFT's ``save_pretrained``.

    Args:
        content: content of the GGUF file.
        base: shapes of the base's matrices.
        out: directory to create.
        name: name of the adapter, for messages.

    Raises:
        UsageError: the directory already exists.
        InvalidArtifact, WrongBase: see `loramix.formats.validate.check_adapter`.
    """
    info = check_adapter(content, base, name)
    modules = module_names(base)
    pairs: dict[str, tuple[Floats, Floats]] = {}
    alphas: dict[str, float] = {}
    for weight, (a, b, _) in read_pairs(content).items():
        module = modules[weight]
        if heads := base.architecture.heads(weight, base.n_head, base.n_head_kv):
            b = unpermute(b, heads)
        pairs[module] = a, b
        alphas[module] = a.shape[0] if info.alpha is None else info.alpha
    write_peft(out, pairs, alphas, info.invocation)


def write_peft(
    out: Path,
    pairs: Mapping[str, tuple[Floats, Floats]],
    alphas: Mapping[str, float],
    invocation: tuple[int, ...] = (),
) -> None:
    """Write a PEFT LoRA directory atomically.

    Args:
        out: directory to create.
        pairs: A (R, in) and B (out, R) by module.
        alphas: ``lora_alpha`` by module.
        invocation: invocation tokens; empty means always active.

    Raises:
        UsageError: the directory already exists.
    """
    if out.exists():
        raise UsageError(f"{out} exists already; name a directory that does not.")
    from safetensors.numpy import save

    ranks = {module: a.shape[0] for module, (a, _) in pairs.items()}
    r = max(ranks.values())
    alpha, _ = Counter(alphas.values()).most_common(1)[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != r},
        "lora_alpha": alpha,
        "alpha_pattern": {module: own for module, own in alphas.items() if own != alpha},
        "target_modules": sorted(ranks),
        "alora_invocation_tokens": list(invocation) or None,
    }
    tensors = {
        f"base_model.model.{module}.lora_{half}.weight": np.ascontiguousarray(values, np.float32)
        for module, pair in pairs.items()
        for half, values in zip("AB", pair, strict=True)
    }
    with atomic_directory(out) as temporary:
        write_bytes(temporary / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
        write_text(temporary / "adapter_config.json", json.dumps(config, indent=1) + "\n")


@contextmanager
def as_peft(source: Path) -> Iterator[Path]:
    """Yield a LoRA directory that PEFT can read: the source, or a temporary directory with plain names.

    Args:
        source: PEFT or mlx-lm directory; tensor names may contain wrappers, and the configuration may
            begin with a byte-order mark.
    """
    if not source.is_dir():  # PEFT reports the error
        yield source
        return
    adapter = read_mlx(source) if is_mlx(source) else read_peft(source)
    if adapter.as_saved and not is_mlx(source):
        yield source
        return
    alphas = {module: adapter.scaling[module] * a.shape[0] for module, (a, _) in adapter.pairs.items()}
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "peft"
        write_peft(out, adapter.pairs, alphas, adapter.invocation)
        yield out


def module_names(base: BaseShape) -> dict[str, str]:
    """Map GGUF tensors to Hugging Face modules, for all matrices that an adapter may change."""
    modules = base.architecture.modules(base.n_layer)
    return {"output.weight": "lm_head"} | {tensor: module for module, tensor in modules.items()}


def unpermute(b: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Undo `loramix.convert.adapter.permute`.

    Args:
        b: (out, R) float32, in llama.cpp's row order.
        heads: number of heads, as for ``permute``.
    """
    out, rank = b.shape
    paired = b.reshape(heads, out // heads // 2, 2, rank).swapaxes(1, 2)
    return np.ascontiguousarray(paired.reshape(out, rank))
