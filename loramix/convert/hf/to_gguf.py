"""Converts a Hugging Face checkpoint to a quantized GGUF base: reads, checks, writes and quantizes it."""

from __future__ import annotations

import math
import secrets
from pathlib import Path

from loramix.convert.hf.checkpoint import Checkpoint
from loramix.convert.hf.gguf_writer import size_of, write_gguf
from loramix.convert.hf.vocabulary import read_vocabulary
from loramix.convert.imatrix import importance
from loramix.convert.quantize import FILE_TYPES, quantize, quantized_size
from loramix.errors import UsageError
from loramix.formats.validate import read_base
from loramix.paths import need_space
from loramix.templates.chat_template import usable_template

QUANTS = ("F32", "F16", *FILE_TYPES)


def convert_base(
    source: Path,
    out: Path,
    quant: str,
    imatrix_text: Path | None = None,
    chat_template: str | None = None,
) -> None:
    """Convert a Hugging Face checkpoint.

    Args:
        source: directory in the format of transformers' ``save_pretrained``, as on the hub.
        out: GGUF file to write; not created on failure.
        quant: a name of `QUANTS`. A temporary unquantized file is written next to ``out``.
        imatrix_text: UTF-8 text for the importance matrix, for 4-bit types.
        chat_template: Jinja text instead of the checkpoint's own.

    Raises:
        NotFound, InvalidArtifact, Unsupported: the checkpoint cannot be converted; the message has the reason.
        NoSpace: the disk is full.
        NativeError: llama.cpp's quantizer fails.
        UsageError: ``out`` is a directory, or the type does not use an importance matrix.
    """
    if imatrix_text and not quant.startswith("Q4"):
        raise UsageError(f"{quant} does not use an importance matrix; leave --imatrix-text out.")
    if out.is_dir():
        raise UsageError(f"{out} is a directory; name the GGUF file to write with --out.")
    with Checkpoint(source) as checkpoint:
        vocabulary = read_vocabulary(source, checkpoint.config.vocab_size, chat_template)
        usable_template(vocabulary.chat_template, vocabulary.named_tokens, str(source))
        if quant not in FILE_TYPES:
            write_gguf(checkpoint, vocabulary, out, quant)
            read_base(out)
            return
        unquantized = out.with_name(f".{out.name[:80]}.{secrets.token_hex(4)}.full.gguf")
        columns = unquantized.with_suffix(".npz")
        out.parent.mkdir(parents=True, exist_ok=True)
        shapes = (entry.shape for entry in checkpoint.tensors.values())
        weights = sum(math.prod(shape) for shape in shapes)
        need_space(out, size_of(checkpoint, None) + quantized_size(weights, quant), out.name)
        try:
            write_gguf(checkpoint, vocabulary, unquantized, None)
            if imatrix_text:
                importance(unquantized, imatrix_text, columns)
            quantize(unquantized, out, quant, columns if imatrix_text else None)
        finally:
            unquantized.unlink(missing_ok=True)
            columns.unlink(missing_ok=True)
    read_base(out)
