"""Validates bases and adapters before llama.cpp loads them.

Each rule covers a file that made llama.cpp abort, crash or compute wrong results: wrong value types,
three-dimensional or integer matrices, rank zero, adapted embeddings on tied models, NaN.
"""

from __future__ import annotations

import math
import mmap
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loramix.architectures import EMBEDDINGS, Architecture, architecture
from loramix.defaults import MAX_RANK
from loramix.errors import InvalidArtifact, NotFound, WrongBase
from loramix.formats.adapter_file import MAX_ADAPTER_BYTES, embedding_adapted, read_adapter_bytes
from loramix.formats.gguf_reader import (
    FLOAT32,
    MAX_KEPT,
    STRING,
    UINT32,
    ArrayInfo,
    GGUFFile,
    TensorInfo,
    read_gguf,
    tensor_values,
)
from loramix.formats.safetensors_reader import read_safetensors

__all__ = [
    "MAX_ADAPTER_BYTES",
    "AdapterInfo",
    "BaseShape",
    "check_adapter",
    "read_adapter_bytes",
    "read_base",
    "read_safetensors",
]

INVOCATION = "adapter.alora.invocation_tokens"
_ADAPTER_TYPES = ("F32", "F16", "BF16", "Q8_0")


@dataclass(frozen=True, slots=True)
class BaseShape:
    """The properties of a base that an adapter must match."""

    architecture: Architecture
    tensors: dict[str, tuple[int, int]] = field(repr=False)
    """Shape (out, in) of each matrix by GGUF name."""
    tied: bool
    """Whether the output head is the token embedding."""
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    context_length: int
    vocab_size: int
    tensor_types: frozenset[str]
    """Types of all tensors, e.g. Q8_0 and F32."""

    @property
    def is_quantized(self) -> bool:
        """Whether matrices are quantized, so that llama.cpp also rounds the activations."""
        return not self.tensor_types <= {"F32", "F16", "BF16"}


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A checked GGUF LoRA."""

    alpha: float | None
    """None if the file has no alpha; B·A is then not scaled."""
    ranks: dict[str, int]
    """Rank by adapted base tensor."""
    n_params: int
    metadata: dict[str, Any]
    invocation: tuple[int, ...] = ()
    """Invocation tokens; empty means always active."""


def read_base(
    path: Path, name: str = "", advice: str = "get or convert it again"
) -> tuple[GGUFFile, BaseShape]:
    """Check a GGUF base.

    Args:
        path: a regular file.
        name: name of the base for messages; by default the path.
        advice: fix for a damaged file, for messages.

    Raises:
        NotFound: the file does not exist.
        InvalidArtifact: the file is damaged, or not a base.
        Unsupported: Loramix does not support the architecture.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        raise NotFound(f"no base at {path}; get one with 'loramix pull'.") from None
    if not stat.S_ISREG(mode):  # opening a pipe would block
        raise InvalidArtifact(f"{path} is not a regular file; give a GGUF file.")
    if not path.stat().st_size:
        raise InvalidArtifact(f"{name or path} is empty (0 bytes); {advice}.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = read_gguf(data, name or str(path), advice)
    return found, _base_shape(found, advice)


def _base_shape(found: GGUFFile, advice: str) -> BaseShape:
    name = found.name
    if found.metadata.get("general.type") == "adapter":
        raise InvalidArtifact(f"{name} is an adapter, not a base; add it to a pack as a skill.")
    kind = architecture(_typed(found, "general.architecture", STRING), name)

    def number(key: str, default: int | None = None) -> int:
        whole = f"{kind.name}.{key}"
        if whole not in found.metadata and default is not None:
            return default
        value = _typed(found, whole, UINT32)
        if not 1 <= value <= 2**24:
            raise InvalidArtifact(f"{name}: {whole} is {value}; {advice}.")
        return int(value)

    n_head = number("attention.head_count")
    shape = BaseShape(
        architecture=kind,
        tensors={
            tensor.name: (tensor.shape[0], tensor.shape[1])
            for tensor in found.tensors.values()
            if len(tensor.shape) == 2 and tensor.name.endswith(".weight")
        },
        tied="output.weight" not in found.tensors,
        n_layer=number("block_count"),
        n_embd=number("embedding_length"),
        n_head=n_head,
        n_head_kv=number("attention.head_count_kv", n_head),
        context_length=number("context_length"),
        vocab_size=0,
        tensor_types=frozenset(tensor.type_name for tensor in found.tensors.values()),
    )
    tokens = found.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, ArrayInfo) or tokens.element_type != STRING or not tokens.length:
        raise InvalidArtifact(f"{name} has no tokenizer; get a base that has one.")
    embedding = shape.tensors.get("token_embd.weight")
    if embedding != (tokens.length, shape.n_embd):
        raise InvalidArtifact(
            f"{name}: token_embd.weight is {embedding}, the vocabulary has {tokens.length} tokens; {advice}."
        )
    missing = [i for i in range(shape.n_layer) if f"blk.{i}.attn_q.weight" not in shape.tensors]
    if missing:
        raise InvalidArtifact(f"{name} lacks layer {missing[0]} of {shape.n_layer}; {advice}.")
    return BaseShape(**{**{k: getattr(shape, k) for k in shape.__slots__}, "vocab_size": tokens.length})


def _typed(found: GGUFFile, key: str, kind: int) -> Any:
    """Return a value that must exist with a given type, because llama.cpp aborts otherwise."""
    if found.types.get(key) != kind:
        raise InvalidArtifact(
            f"{found.name}: {key} {'is missing' if key not in found.types else 'has a wrong type'}; "
            "get or convert the file again."
        )
    return found.metadata[key]


def check_adapter(data: bytes, base: BaseShape, name: str, base_sha256: str | None = None) -> AdapterInfo:
    """Check a GGUF LoRA against its base.

    Args:
        data: content of the file.
        base: shape of the base.
        name: name of the adapter, for messages.
        base_sha256: the base's SHA-256; an adapter with another one is rejected.

    Raises:
        InvalidArtifact: the file is not safe to load in llama.cpp.
        WrongBase: the adapter is for another base.
    """

    def bad(why: str) -> InvalidArtifact:
        return InvalidArtifact(
            f"adapter {name} is rejected: {why}; convert it again with 'loramix convert adapter'."
        )

    if len(data) > MAX_ADAPTER_BYTES:
        raise InvalidArtifact(
            f"adapter {name} has {len(data)} bytes, the limit is {MAX_ADAPTER_BYTES}; "
            "train one with a lower rank, or with fewer target_modules."
        )
    found = read_gguf(data, name)
    if found.metadata.get("general.type", "model") == "model":
        raise InvalidArtifact(f"{name} is a full model, not an adapter; give it as a base with --base.")
    if _typed(found, "general.type", STRING) != "adapter":
        raise bad("it is not an adapter")
    made_for_kind = _typed(found, "general.architecture", STRING)
    if made_for_kind != base.architecture.name:
        raise WrongBase(
            f"adapter {name} is for architecture {made_for_kind!r}, the base is {base.architecture.name!r}: "
            "use a base that the adapter was trained on, or train the adapter on this one."
        )
    if _typed(found, "adapter.type", STRING) != "lora":
        raise bad("it is not a LoRA")
    alpha = None
    if "adapter.lora.alpha" in found.metadata:  # optional, but llama.cpp aborts on any other type
        alpha = float(_typed(found, "adapter.lora.alpha", FLOAT32))
        if not math.isfinite(alpha) or not 0 < alpha < 1e6:
            raise bad(f"its alpha is {alpha}")
    made_for, which = found.metadata.get("loramix.base.sha256"), _base_of(found)
    if base_sha256 and made_for and made_for != base_sha256:
        raise WrongBase(
            f"adapter {name} was trained on {which} ({str(made_for)[:12]}), this base is {base_sha256[:12]}: "
            f"use that base, or train and convert the adapter for this one."
        )
    invocation: tuple[int, ...] = ()
    if INVOCATION in found.metadata:
        array = found.metadata[INVOCATION]
        invocation = array.values if isinstance(array, ArrayInfo) else ()
        if not invocation or max(invocation) >= base.vocab_size:
            raise bad(f"{INVOCATION} must have 1 to {MAX_KEPT} token ids as uint32")
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for tensor in found.tensors.values():
        target, _, half = tensor.name.rpartition(".")
        if half not in ("lora_a", "lora_b"):
            raise bad(f"tensor {tensor.name!r} is not a LoRA matrix")
        pairs.setdefault(target, {})[half] = tensor
    if not pairs:
        raise bad("it has no LoRA matrices")
    ranks = {target: _check_pair(target, pair, base, bad, which) for target, pair in pairs.items()}
    for tensor in found.tensors.values():
        if not np.isfinite(tensor_values(data, tensor)).all():
            raise bad(f"{tensor.name!r} has values that are not finite")
    plain = {key: value for key, value in found.metadata.items() if not isinstance(value, ArrayInfo)}
    count = sum(math.prod(tensor.shape) for tensor in found.tensors.values())
    return AdapterInfo(alpha, ranks, count, plain, invocation)


def _base_of(found: GGUFFile) -> str:
    """Return the base that an adapter names, in Loramix's key or in that of llama.cpp's converter."""
    for key in ("loramix.base.name", "general.base_model.0.name"):
        if isinstance(value := found.metadata.get(key), str):
            return value[:80]
    return "another base"


def _check_pair(target: str, pair: dict[str, TensorInfo], base: BaseShape, bad: Any, which: str) -> int:
    if set(pair) != {"lora_a", "lora_b"}:
        raise bad(f"{target!r} lacks one of its two matrices")
    a, b = pair["lora_a"], pair["lora_b"]
    for tensor in (a, b):
        if len(tensor.shape) != 2:
            raise bad(f"{tensor.name!r} has {len(tensor.shape)} dimensions, 2 are needed")
        if tensor.type_name not in _ADAPTER_TYPES:
            raise bad(f"{tensor.name!r} is {tensor.type_name}; one of {', '.join(_ADAPTER_TYPES)} is needed")
    if target == "output.weight" and b.shape[0] != base.vocab_size:
        raise WrongBase(
            f"the adapter's {target!r} has {b.shape[0]} tokens, the base's vocabulary {base.vocab_size}: "
            f"it is for {which}; use that base."
        )
    if target in EMBEDDINGS.values():
        raise InvalidArtifact(f"the adapter changes {embedding_adapted(target, base.tied)}")
    if target not in base.tensors:
        raise WrongBase(
            f"the base has no matrix {target!r}, which this adapter changes: it is for {which}; use that base."
        )
    rank = a.shape[0]
    if rank > MAX_RANK and b.shape[1] == rank:
        raise InvalidArtifact(f"{target!r} has rank {rank}, the limit is {MAX_RANK}; train with a lower r.")
    if not 1 <= rank <= MAX_RANK or b.shape[1] != rank:
        raise bad(f"{target!r} has ranks {rank} and {b.shape[1]}")
    if (b.shape[0], a.shape[1]) != base.tensors[target]:
        raise WrongBase(
            f"the adapter's {target!r} is {b.shape[0]} x {a.shape[1]}, the base's "
            f"{' x '.join(map(str, base.tensors[target]))}: it is for {which}; use that base."
        )
    return rank
