"""The forward pass of a frozen GGUF base, where each group of sequences passes through its own adapter.

Covers the architectures llama and qwen2, in GGUF's order of rows. Knows nothing of slots, files of rows or training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
import torch
from torch.nn import functional

from . import JointError

SCALING = 2.0
"""alpha / rank of every adapter."""
ARCHITECTURES = ("llama", "qwen2")
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
"""GGUF names of the matrices of a layer that an adapter may change."""
Adapters: TypeAlias = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""A (S, R, in) and B (S, out, R) of S adapters, by GGUF name of the base's matrix."""


@dataclass(frozen=True)
class Shape:
    """The sizes and settings of a base."""

    architecture: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head: int
    """Width of an attention head."""
    n_ff: int
    epsilon: float
    """Of the norms."""
    rope_base: float

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Sizes (out, in) of a layer's matrices, by the names of `MATRICES`."""
        q, kv = self.n_head * self.head, self.n_head_kv * self.head
        sizes = [(q, self.n_embd), (kv, self.n_embd), (kv, self.n_embd), (self.n_embd, q)]
        sizes += [(self.n_ff, self.n_embd), (self.n_ff, self.n_embd), (self.n_embd, self.n_ff)]
        return dict(zip(MATRICES, sizes, strict=True))


def read_shape(fields: Mapping[str, Any]) -> Shape:
    """Read the settings of a base.

    Args:
        fields: ``fields`` of a ``gguf.GGUFReader``.

    Raises:
        JointError: another architecture, a missing setting, or a setting that this forward pass does not have.
    """

    def setting(key: str, default: Any = None) -> Any:
        field = fields.get(f"{name}.{key}")
        if field is None and default is None:
            raise JointError(f"the base lacks {name}.{key}; convert it again.")
        return default if field is None else field.contents()

    field = fields.get("general.architecture")
    name = field.contents() if field else None
    if name not in ARCHITECTURES:
        raise JointError(f"the base has architecture {name!r}; needs one of {', '.join(ARCHITECTURES)}.")
    n_embd, n_head = setting("embedding_length"), setting("attention.head_count")
    shape = Shape(
        architecture=name,
        n_layer=setting("block_count"),
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=setting("attention.head_count_kv", n_head),
        head=setting("attention.key_length", n_embd // n_head),
        n_ff=setting("feed_forward_length"),
        epsilon=setting("attention.layer_norm_rms_epsilon"),
        rope_base=setting("rope.freq_base", 10000.0),
    )
    if (kind := setting("rope.scaling.type", "none")) != "none":
        raise JointError(f"the base scales RoPE by {kind!r}, which is not supported; use another base.")
    if setting("rope.dimension_count", shape.head) != shape.head:
        raise JointError(
            "the base rotates only a part of each head, which is not supported; use another base."
        )
    return shape


def low_rank(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compute each adapter's change of a matrix product, for its own sequences alone.

    Args:
        x: (S * n, T, in), n consecutive sequences of each of S adapters.
        a: (S, R, in).
        b: (S, out, R).

    Returns:
        (S * n, T, out).
    """
    grouped = x.reshape(len(a), -1, x.shape[-1])
    change = torch.bmm(torch.bmm(grouped, a.transpose(1, 2)), b.transpose(1, 2))
    return (SCALING * change).reshape(*x.shape[:-1], -1)


def visible(segments: torch.Tensor) -> torch.Tensor:
    """Return which token sees which: those of its own row up to itself.

    Args:
        segments: (B, T) int, number of the row of each token; -1 for padding.

    Returns:
        (B, 1, T, T) bool.
    """
    size = segments.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=segments.device).tril()
    return ((segments[:, :, None] == segments[:, None, :]) & causal)[:, None]


class Base:
    """A frozen base.

    Args:
        path: a GGUF; its dequantized values are used.
        device: device of the weights.
        dtype: type of matrices and products; norms, embedding and the sum over layers stay float32.

    Raises:
        JointError: not a GGUF, or a base that this forward pass does not cover.
    """

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        try:
            reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:
            raise JointError(f"{path} cannot be read as a GGUF ({error}); give the base's GGUF.") from None
        self.shape = read_shape(reader.fields)
        self.dtype = dtype
        stored = {tensor.name for tensor in reader.tensors}
        needed = set(self._needed())
        optional = {"output.weight"} | {name.replace(".weight", ".bias") for name in needed if "blk." in name}
        if wrong := (needed - stored) | (stored - needed - optional):
            name = min(wrong)
            found = "has" if name in stored else "lacks"
            raise JointError(
                f"{path} {found} {name!r}, unlike a {self.shape.architecture} base; use another base."
            )
        with ThreadPoolExecutor() as pool:  # NumPy releases the lock while it dequantizes
            values = pool.map(
                lambda tensor: gguf.quants.dequantize(tensor.data, tensor.tensor_type), reader.tensors
            )
            self.weights = {
                tensor.name: self._placed(tensor.name, value, device)
                for tensor, value in zip(reader.tensors, values, strict=True)
            }
        self.embedding = self.weights["token_embd.weight"]
        self.head = self.weights.get("output.weight", self.embedding).to(dtype)
        pairs = torch.arange(0, self.shape.head, 2, device=device, dtype=torch.float32)
        self.frequencies = self.shape.rope_base ** -(pairs / self.shape.head)

    def _needed(self) -> Iterator[str]:
        """Yield the names of the tensors that every base has."""
        yield from ("token_embd.weight", "output_norm.weight")
        for layer in range(self.shape.n_layer):
            yield from (f"blk.{layer}.{name}.weight" for name in (*MATRICES, "attn_norm", "ffn_norm"))

    def _placed(self, name: str, value: Any, device: torch.device) -> torch.Tensor:
        tensor = torch.from_numpy(np.array(value, np.float32))
        full = "norm" in name or name == "token_embd.weight"
        return tensor.to(device, torch.float32 if full else self.dtype)

    def hidden(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        segments: torch.Tensor,
        adapters: Adapters | None = None,
    ) -> torch.Tensor:
        """Compute the last hidden states, which `logits` takes.

        Args:
            ids: (B, T) int64, B = S * n: n consecutive sequences of each of S adapters.
            positions: (B, T) int, position of each token in its row.
            segments: (B, T) int, see `visible`.
            adapters: matrices of the S adapters; None for the bare base.

        Returns:
            (B, T, D) of the base's dtype.
        """
        angles = positions[..., None].float() * self.frequencies
        rotation = angles.cos()[:, :, None].to(self.dtype), angles.sin()[:, :, None].to(self.dtype)
        mask = visible(segments)
        x = functional.embedding(ids, self.embedding)
        for layer in range(self.shape.n_layer):
            name, changes = f"blk.{layer}", adapters or {}
            x = x + self._attention(self._norm(x, f"{name}.attn_norm"), name, changes, rotation, mask)
            x = x + self._feed_forward(self._norm(x, f"{name}.ffn_norm"), name, changes)
        return self._norm(x, "output_norm")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (..., V) float32 of hidden states (..., D)."""
        return functional.linear(hidden, self.head).float()

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.weights[f"{name}.weight"]
        return functional.rms_norm(x, weight.shape, weight, self.shape.epsilon).to(self.dtype)

    def _project(self, x: torch.Tensor, name: str, adapters: Adapters) -> torch.Tensor:
        y = functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))
        pair = adapters.get(f"{name}.weight")
        return y if pair is None else y + low_rank(x, *pair)

    def _attention(
        self,
        x: torch.Tensor,
        name: str,
        adapters: Adapters,
        rotation: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        q, k, v = (self._project(x, f"{name}.attn_{part}", adapters) for part in "qkv")
        q, k, v = (part.unflatten(-1, (-1, self.shape.head)) for part in (q, k, v))  # (B, T, heads, head)
        q, k = self._rotate(q, *rotation), self._rotate(k, *rotation)
        # CUDA's fast attention takes a mask only with as many key-value heads as heads
        k, v = (part.repeat_interleave(self.shape.n_head // self.shape.n_head_kv, 2) for part in (k, v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self._project(mixed.transpose(1, 2).flatten(2), f"{name}.attn_output", adapters)

    def _rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotate pairs of features by position: neighbours in llama's order of rows, halves of a head in qwen2's."""
        if self.shape.architecture == "llama":
            a, b = x[..., 0::2], x[..., 1::2]
            return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def _feed_forward(self, x: torch.Tensor, name: str, adapters: Adapters) -> torch.Tensor:
        gate, up = (self._project(x, f"{name}.ffn_{part}", adapters) for part in ("gate", "up"))
        return self._project(functional.silu(gate) * up, f"{name}.ffn_down", adapters)
