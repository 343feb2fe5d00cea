"""Hugging Face checkpoint → quantized GGUF base: read, check, write, quantize."""

from __future__ import annotations

import secrets
from pathlib import Path

from loramix.convert.hf import Checkpoint
from loramix.convert.hf_gguf import write_gguf
from loramix.convert.hf_vocab import read_vocabulary
from loramix.convert.quantize import FILE_TYPES, quantize
from loramix.convert.validate import read_base
from loramix.errors import UsageError

QUANTS = ("F32", "F16", *FILE_TYPES)


def convert_base(source: Path, out: Path, quant: str) -> None:
    """Convert a checkpoint of the Llama architecture.

    Args:
        source: directory as transformers' ``save_pretrained`` writes it, or as the hub holds it.
        out: GGUF file to write; nothing is left there if anything fails.
        quant: a name of `QUANTS`. Between, a file of the weights as they are stored lies beside ``out``.

    Raises:
        NotFound, InvalidArtifact, Unsupported: the checkpoint cannot be converted, and why.
        NoSpace: the disk is full.
        NativeError: llama.cpp's quantizer fails.
        UsageError: ``out`` is the checkpoint's directory.
    """
    if out.is_dir():
        raise UsageError(f"{out} is a directory; name the GGUF file to write with --out.")
    with Checkpoint(source) as checkpoint:
        vocabulary = read_vocabulary(source, checkpoint.config.vocab_size)
        if quant not in FILE_TYPES:
            write_gguf(checkpoint, vocabulary, out, quant)
            read_base(out)
            return
        between = out.with_name(f".{out.name[:80]}.{secrets.token_hex(4)}.full.gguf")
        try:
            write_gguf(checkpoint, vocabulary, between, None)
            quantize(between, out, quant)
        finally:
            between.unlink(missing_ok=True)
    read_base(out)
