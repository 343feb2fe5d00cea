"""Details of a base file for Ollama's clients: family, size, quantization, context length."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from loramix.formats.gguf_reader import UINT32, GGUFFile
from loramix.formats.validate import read_base
from loramix.models import bases


@dataclass(frozen=True)
class BaseDetails:
    """Details of a base.

    Args:
        size: file size in bytes.
        details: ``details`` object of ``/api/tags``.
        info: ``model_info`` object of ``/api/show``, from the GGUF header.
        template: the chat template.
    """

    size: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    template: str = ""

    @classmethod
    def of(cls, name: str) -> BaseDetails:
        """Read the details from a base's header; all fields are empty if the base is not on this machine.

        Args:
            name: name of the base, as in the pack's manifest.

        Raises:
            InvalidArtifact: the file is not a usable base.
        """
        path = bases.find(name)
        if path is None:
            return cls()
        file, shape = read_base(path)
        family = shape.architecture.name
        count = sum(math.prod(tensor.shape) for tensor in file.tensors.values())
        details = {
            "parent_model": name,
            "format": "gguf",
            "family": family,
            "families": [family],
            "parameter_size": human_number(count),
            "quantization_level": _quantization(file),
        }
        info = {
            "general.architecture": family,
            "general.basename": name,
            "general.parameter_count": count,
            f"{family}.block_count": shape.n_layer,
            f"{family}.context_length": shape.context_length,
            f"{family}.embedding_length": shape.n_embd,
            f"{family}.attention.head_count": shape.n_head,
            f"{family}.attention.head_count_kv": shape.n_head_kv,
            f"{family}.vocab_size": shape.vocab_size,
        }
        return cls(path.stat().st_size, details, info, str(file.metadata.get("tokenizer.chat_template", "")))


def human_number(count: int) -> str:
    """Format a parameter count as Ollama does, e.g. ``494.03M`` or ``1.2B`` (format/format.go)."""
    if count >= 1e9:
        return f"{count / 1e9:.0f}B" if count % 10**9 == 0 else f"{count / 1e9:.1f}B"
    if count >= 1e6:
        return f"{count / 1e6:.0f}M" if count % 10**6 == 0 else f"{count / 1e6:.2f}M"
    return f"{count / 1e3:.0f}K" if count >= 1e3 else str(count)


def _quantization(file: GGUFFile) -> str:
    """Return the quantization name, e.g. ``Q4_K_M``; without one, the type of most matrices."""
    import gguf

    if file.types.get("general.file_type") == UINT32:
        with suppress(ValueError):  # a type newer than the gguf library
            name = str(gguf.LlamaFileType(file.metadata["general.file_type"]).name)
            if name != "GUESSED":
                return name.removeprefix("MOSTLY_").removeprefix("ALL_")
    matrices = [t for t in file.tensors.values() if t.name.startswith("blk.") and len(t.shape) > 1]
    return Counter(tensor.type_name for tensor in matrices).most_common(1)[0][0]
