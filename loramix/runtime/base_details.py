"""What Ollama's clients want to know of a model's file: family, size, quantization, lengths."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from loramix.convert.gguf_reader import UINT32, GGUFFile
from loramix.convert.validate import read_base
from loramix.models import bases


@dataclass(frozen=True)
class BaseDetails:
    """Of a base.

    Args:
        size: bytes of the file.
        details: as ``/api/tags`` has them.
        info: the GGUF's numbers and names, as ``/api/show`` has them.
        template: the chat template.
    """

    size: int = 0
    details: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    template: str = ""

    @classmethod
    def of(cls, name: str) -> BaseDetails:
        """Read them from a base's header; what is not known stays empty.

        Args:
            name: as the pack names it.

        Raises:
            InvalidArtifact: the file is no usable base.
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
    """A number of weights as Ollama writes it, e.g. ``494.03M`` or ``1.2B`` (format/format.go)."""
    if count >= 1e9:
        return f"{count / 1e9:.0f}B" if count % 10**9 == 0 else f"{count / 1e9:.1f}B"
    if count >= 1e6:
        return f"{count / 1e6:.0f}M" if count % 10**6 == 0 else f"{count / 1e6:.2f}M"
    return f"{count / 1e3:.0f}K" if count >= 1e3 else str(count)


def _quantization(file: GGUFFile) -> str:
    """The name of a file's mix of types, e.g. ``Q4_K_M``; where it names none, the type of most matrices."""
    import gguf

    if file.types.get("general.file_type") == UINT32:
        with suppress(ValueError):  # newer than the library
            name = str(gguf.LlamaFileType(file.metadata["general.file_type"]).name)
            if name != "GUESSED":
                return name.removeprefix("MOSTLY_").removeprefix("ALL_")
    matrices = [t for t in file.tensors.values() if t.name.startswith("blk.") and len(t.shape) > 1]
    return Counter(tensor.type_name for tensor in matrices).most_common(1)[0][0]
