"""Converts a PEFT or mlx-lm LoRA directory to a GGUF LoRA with the same results in llama.cpp.

llama.cpp computes ``scale * alpha / rank`` from one alpha and each tensor's rank. Other scalings of PEFT (rsLoRA,
alpha and rank patterns) are folded into B, which is otherwise unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.architectures import ARCHITECTURES, EMBEDDINGS
from loramix.convert.embeddings import check_copies
from loramix.convert.mlx import is_mlx, read_mlx
from loramix.convert.peft_reader import PeftAdapter, read_peft
from loramix.errors import InvalidArtifact, NotFound, SelfCheckFailed, Unsupported, WrongBase
from loramix.formats.adapter_file import embedding_adapted
from loramix.formats.gguf_output import gguf_output
from loramix.formats.validate import INVOCATION, BaseShape, check_adapter, read_base
from loramix.paths import atomic_path


def read_adapter(directory: Path) -> PeftAdapter:
    """Read a LoRA directory, PEFT's or mlx-lm's.

    Raises:
        NotFound, InvalidArtifact, Unsupported: see `read_peft` and `read_mlx`.
    """
    if directory.is_file():
        raise NotFound(
            f"{directory} is a file: give the directory that contains it and adapter_config.json "
            "(a GGUF LoRA needs no conversion; 'loramix pack add' takes it)."
        )
    return read_mlx(directory) if is_mlx(directory) else read_peft(directory)


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
    """Convert a PEFT or mlx-lm LoRA into a GGUF LoRA.

    Args:
        source: PEFT or mlx-lm directory.
        base: the GGUF base that it was trained on.
        out: file to write.
        name: skill name for the metadata; by default the directory's name.
        base_name: the base's name for the metadata.
        base_sha256: the base's SHA-256; an adapter that has it is rejected on any other base.
        outtype: ``f16`` or ``f32``.

    Raises:
        NotFound, InvalidArtifact, Unsupported: see `read_adapter`.
        WrongBase: the adapter's shapes do not match the base's.
    """
    adapter = read_adapter(source)
    header, shape = read_base(base)
    check_copies(adapter, base, header)
    tensors, alpha = to_gguf(adapter, shape)
    write_adapter(
        out,
        tensors,
        alpha,
        shape,
        types=dict.fromkeys(tensors, outtype.upper()),
        name=name or adapter.name,
        base_name=base_name,
        base_sha256=base_sha256,
        invocation=adapter.invocation,
    )


def write_adapter(
    out: Path,
    tensors: Mapping[str, npt.NDArray[np.float32]],
    alpha: float,
    base: BaseShape,
    *,
    types: Mapping[str, str],
    name: str,
    base_name: str | None = None,
    base_sha256: str | None = None,
    invocation: tuple[int, ...] = (),
) -> None:
    """Write a GGUF LoRA, and check it like a file from elsewhere.

    Args:
        out: file to write.
        tensors: matrices by GGUF name, ``.lora_a`` (R, in) and ``.lora_b`` (out, R).
        alpha: alpha for all of them.
        base: shape of the base.
        types: GGUF type of each tensor: ``F32``, ``F16`` or ``Q8_0``.
        name: skill name for the metadata.
        base_name: the base's name for the metadata.
        base_sha256: the base's SHA-256; an adapter that has it is rejected on any other base.
        invocation: invocation tokens of an activated LoRA; empty means always active.

    Raises:
        Unsupported: a value is too large for float16.
        InvalidArtifact, WrongBase: see `check_adapter`.
    """
    import gguf

    with atomic_path(out) as temporary:
        with gguf_output(temporary, base.architecture.name, name=str(out)) as writer:
            writer.add_type("adapter")
            writer.add_name(name)
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", alpha)
            writer.add_string("adapter.lora.task_name", name)
            if invocation:
                array, uint32 = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
                writer.add_key_value(INVOCATION, list(invocation), array, sub_type=uint32)
            if base_name:
                writer.add_string("loramix.base.name", base_name)
            if base_sha256:
                writer.add_string("loramix.base.sha256", base_sha256)
            for key in sorted(tensors):
                kind = gguf.GGMLQuantizationType[types[key]]
                data = gguf.quants.quantize(tensors[key], kind)
                if not np.isfinite(data).all():
                    raise Unsupported(f"{key} does not fit float16; convert with --outtype f32.")
                writer.add_tensor(key, data, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        check_adapter(temporary.read_bytes(), base, str(out), base_sha256=base_sha256)


def to_gguf(adapter: PeftAdapter, base: BaseShape) -> tuple[dict[str, npt.NDArray[np.float32]], float]:
    """Rename, permute and fold a PEFT adapter's matrices; the runtime pads them (`loramix.models.fuse`).

    Args:
        adapter: the adapter, from `read_adapter`.
        base: shapes of the base's matrices.

    Returns:
        Tensors by GGUF name, ``.lora_a`` (R, in) and ``.lora_b`` (out, R) float32, and the alpha to write.

    Raises:
        InvalidArtifact, Unsupported, WrongBase: a module that the base or llama.cpp does not have.
    """
    targets = base.architecture.modules(base.n_layer)
    first = next(iter(adapter.pairs))
    alpha = float(np.float32(adapter.scaling[first] * adapter.pairs[first][0].shape[0]))
    origin = _origin(adapter, base)
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for module, (a, b) in adapter.pairs.items():
        weight = EMBEDDINGS.get(module, targets.get(module, ""))
        if module in EMBEDDINGS:
            _refuse_embedding(weight, module, b.shape[0], base, origin)
        if weight not in base.tensors:
            if inner := next((name for name in targets if module.endswith(f".{name}")), ""):
                raise InvalidArtifact(
                    f"the adapter's tensors have {module.removesuffix(inner)[:80]!r} before {inner!r}, which no known "
                    "wrapper adds: rename them, or save the adapter of the unwrapped model."
                )
            if "vision" in module:
                raise Unsupported(
                    f"this adapter changes {module[:100]!r} of an image encoder, and the base is a text model; train "
                    "again with target_modules of the language model only."
                )
            raise WrongBase(f"the base has no matrix for {module!r}: {origin}.")
        rows, columns = base.tensors[weight]
        if (b.shape[0], a.shape[1]) != (rows, columns):
            raise WrongBase(
                f"{module!r} adapts a matrix of {b.shape[0]} x {a.shape[1]}, the base's is {rows} x {columns}: "
                f"{origin}."
            )
        if heads := base.architecture.heads(weight, base.n_head, base.n_head_kv):
            b = permute(b, heads)
        factor = adapter.scaling[module] * a.shape[0] / alpha
        if not math.isclose(factor, 1.0, rel_tol=1e-7):
            b = b * np.float32(factor)
        tensors[f"{weight}.lora_a"] = a
        tensors[f"{weight}.lora_b"] = b
    return tensors, alpha


def _origin(adapter: PeftAdapter, base: BaseShape) -> str:
    """Describe the adapter's base and this base, as a clause for an error message.

    Raises:
        WrongBase: the adapter names a model class of another architecture.
    """
    named = f" ({adapter.base[:80]!r})" if adapter.base else ""
    model = base.architecture
    for other in ARCHITECTURES.values():
        if other is not model and adapter.model_class in other.classes:
            raise WrongBase(
                f"this adapter is for architecture {other.name!r}{named}, the base is {model.name!r}: use a base that "
                "it was trained on, or train it on this one."
            )
    return f"this adapter is for another base{named}, this base has architecture {model.name!r}; use the adapter's base"


def _refuse_embedding(weight: str, module: str, n_tokens: int, base: BaseShape, origin: str) -> None:
    """Reject an adapter for another vocabulary, or one on an embedding, which llama.cpp cannot run.

    Raises:
        WrongBase: the adapter has another number of tokens than the base.
        Unsupported: the adapter changes an embedding.
    """
    if weight == "output.weight" and n_tokens != base.vocab_size:
        raise WrongBase(
            f"{module!r} has {n_tokens} tokens, the base's vocabulary has {base.vocab_size}: {origin}."
        )
    raise Unsupported(f"this adapter changes {embedding_adapted(weight, base.tied)}")


def permute(b: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Reorder rows as llama.cpp's converter reorders Q and K (conversion/llama.py): halves interleaved.

    Args:
        b: (out, R) or a bias (out,), out a multiple of ``2 * heads``.
        heads: attention heads of Q, or key-value heads of K.

    Raises:
        SelfCheckFailed: the number of rows is not a multiple of ``2 * heads``.
    """
    out = b.shape[0]
    if out % (2 * heads):
        raise SelfCheckFailed(f"{out} rows do not divide into {heads} heads of two halves.")
    paired = b.reshape(heads, 2, out // heads // 2, *b.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(paired.reshape(b.shape))
