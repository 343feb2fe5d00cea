"""What Ollama's clients want to know of a model's file: family, size, quantization, lengths."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from loramix.formats.validate import read_base
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
        matrices = [t for t in file.tensors.values() if t.name.startswith("blk.") and len(t.shape) > 1]
        kinds = Counter(tensor.type_name for tensor in matrices)
        details = {
            "parent_model": name,
            "format": "gguf",
            "family": family,
            "families": [family],
            "parameter_size": f"{count / 1e6:.0f}M" if count < 1e9 else f"{count / 1e9:.1f}B",
            "quantization_level": kinds.most_common(1)[0][0],
        }
        info = {
            "general.architecture": family,
            "general.basename": name,
            "general.parameter_count": count,
            f"{family}.block_count": shape.n_layer,
            f"{family}.embedding_length": shape.n_embd,
            f"{family}.attention.head_count": shape.n_head,
            f"{family}.attention.head_count_kv": shape.n_head_kv,
            f"{family}.vocab_size": shape.vocab_size,
        }
        return cls(path.stat().st_size, details, info, str(file.metadata.get("tokenizer.chat_template", "")))
