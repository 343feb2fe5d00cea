"""Writes a Hugging Face checkpoint as GGUF, one tensor in memory at a time.

Follows llama.cpp's converter (conversion/llama.py, conversion/qwen.py) in names, the order of rows of Q and K, and
the tensor of RoPE factors. Uses ``gguf`` to write the format.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.convert.adapter import permute
from loramix.convert.hf.checkpoint import Checkpoint
from loramix.convert.hf.config import rope_factors
from loramix.convert.hf.vocabulary import Vocabulary
from loramix.errors import Unsupported
from loramix.formats.gguf_output import gguf_output
from loramix.formats.safetensors_reader import widened
from loramix.paths import atomic_path, need_space

KINDS = ("F32", "F16", "BF16")
_STORED: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def write_gguf(checkpoint: Checkpoint, vocabulary: Vocabulary, out: Path, kind: str | None) -> None:
    """Write a checkpoint as a GGUF base atomically.

    Args:
        checkpoint: the checkpoint.
        vocabulary: its vocabulary, with as many tokens as the embedding has rows.
        out: file to write.
        kind: ``F32`` or ``F16`` for all matrices; None keeps the stored type, for quantization afterwards.

    Raises:
        NoSpace: the disk is full.
        InvalidArtifact: a value is not finite.
        Unsupported: a value is out of the range of float16.
    """
    import gguf

    plan = _plan(checkpoint, kind)
    factors = rope_factors(checkpoint.config)
    with atomic_path(out) as temporary:
        need_space(out, size_of(checkpoint, kind), out.name)
        with gguf_output(temporary, checkpoint.config.model.name, name=str(out)) as writer:
            _add_settings(writer, checkpoint, {k for *_, k in plan})
            vocabulary.add_to(writer)
            if factors is not None:
                writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
            for name, _, shape, stored in plan:
                dtype = np.dtype(_STORED[stored])
                nbytes = math.prod(shape) * dtype.itemsize
                writer.add_tensor_info(name, shape, dtype, nbytes, gguf.GGMLQuantizationType[stored])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors)
            for name, source, shape, stored in plan:
                values = _values(checkpoint, source, name, shape, stored)
                writer.write_tensor_data(values)
                del values


def write_vocabulary(vocabulary: Vocabulary, out: Path) -> None:
    """Write a GGUF without tensors, for tokenization in llama.cpp.

    Args:
        vocabulary: the vocabulary.
        out: file to write.

    Raises:
        NoSpace: the disk is full.
    """
    with gguf_output(out, "llama", fix="free some space, or set TMPDIR to another disk.") as writer:
        writer.add_type("model")
        vocabulary.add_to(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()


def size_of(checkpoint: Checkpoint, kind: str | None) -> int:
    """Return the size in bytes of the tensors that `write_gguf` writes."""
    return sum(math.prod(shape) * np.dtype(_STORED[k]).itemsize for _, _, shape, k in _plan(checkpoint, kind))


def _plan(checkpoint: Checkpoint, kind: str | None) -> list[tuple[str, str, tuple[int, ...], str]]:
    """Return (GGUF name, source name, shape, kind) of each tensor, in file order."""
    import gguf

    kinds = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    config = checkpoint.config
    names = gguf.get_tensor_name_map(kinds[config.model.name], config.num_hidden_layers)
    plan = []
    for source, entry in checkpoint.tensors.items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        stored = kind or (entry.dtype if entry.dtype in KINDS else "F32")
        # one-dimensional tensors are float32 in every GGUF
        plan.append((str(name), source, entry.shape, stored if len(entry.shape) > 1 else "F32"))
    return plan


def _values(
    checkpoint: Checkpoint, source: str, name: str, shape: tuple[int, ...], kind: str
) -> npt.NDArray[Any]:
    """Read a tensor's values in the type and row order of the GGUF."""
    dtype = checkpoint.tensors[source].dtype
    values = np.empty(math.prod(shape), _STORED[kind])
    at = 0
    for raw in checkpoint.chunks(source):
        part = values[at : at + len(raw)]
        at += len(raw)
        if dtype == kind:
            part[:] = raw
            continue
        with np.errstate(over="ignore"):
            part[:] = widened(raw, dtype)
        if not np.isfinite(part).all():
            fix = "use another checkpoint" if kind == "F32" else "convert with --quant F32"
            raise Unsupported(f"{source} has values out of the range of {kind}; {fix}.")
    values = values.reshape(shape)
    config = checkpoint.config
    if heads := config.model.heads(name, config.num_attention_heads, config.n_head_kv):
        values = permute(values, heads)
    return values


def _add_settings(writer: Any, checkpoint: Checkpoint, kinds: set[str]) -> None:
    import gguf

    config, rope = checkpoint.config, checkpoint.config.rope
    writer.add_type("model")
    writer.add_name(checkpoint.directory.resolve().name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.n_head_kv)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(rope.rope_theta)
    if rope.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    matrices = "BF16" if "BF16" in kinds else "F16" if "F16" in kinds else "F32"
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if matrices == "F32" else f"MOSTLY_{matrices}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
