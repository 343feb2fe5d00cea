"""The gate: a small transformer in NumPy over the states of all tokens at low layers; and its file, gate.npz.

A linear map per token, two learned position embeddings (from the start and from the end), pre-norm transformer
layers, and pooling by attention, by the last token and by the mean. Independent of prompts and packs, and never
imports torch. A gate file is untrusted: it is validated before use, and nothing in it is evaluated or unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from loramix.formats.npz import npz_bytes, read_described
from loramix.models.gate_window import cut_tokens
from loramix.models.head_info import BUCKETS, MAX_GATE_BYTES, HeadInfo, check_shapes, expected, refused

Floats = npt.NDArray[np.float32]
CLIP = 8.0
EPSILON = 1e-5


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """What a head says of a prompt."""

    logits: Floats
    """(K + base_classes,); those after the K skills are the base."""
    tags: Floats
    """(T, tags) logits; (T, 0) where the head has none."""
    attention: Floats
    """(T,) weight of each token in the pooled vector; sums to 1."""
    pooled: Floats
    """(6 d,): what the last linear map reads."""


def bucket(distance: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Distance in tokens to one of 48 buckets: exact up to 16, then logarithmic."""
    far = 16 + 4 * np.log2(np.maximum(distance, 1) / 16)
    found: npt.NDArray[np.int64] = np.clip(np.where(distance < 16, distance, far), 0, BUCKETS - 1).astype(
        np.int64
    )
    return found


class EarlyHead:
    """A gate ready to decide.

    Args:
        info: what it reads and decides between.
        arrays: float32, of the names and shapes of `expected`.
        name: the file, for messages.

    Raises:
        InvalidArtifact: arrays missing, unknown, not float32, not finite, or of shapes that do not fit.
    """

    def __init__(
        self, info: HeadInfo, arrays: Mapping[str, npt.NDArray[Any]], name: str = "the gate"
    ) -> None:
        shapes = expected(info)
        check_shapes(arrays, shapes, name)
        self.info, self._name = info, name
        self.arrays: dict[str, Floats] = {key: np.ascontiguousarray(arrays[key]) for key in shapes}
        self._a = self.arrays
        scale = 1.0 / np.maximum(self._a["std"], 1e-6)
        self._shift, self._scale = self._a["mean"], scale.astype(np.float32)
        steps = np.arange(info.first + info.last, dtype=np.int64)
        self._start = self._a["start"][bucket(steps)]
        self._end = self._a["end"][bucket(steps)]

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "gate.npz") -> EarlyHead:
        """Read and check the content of a gate.npz of this format.

        Raises:
            InvalidArtifact: not a gate that `to_bytes` could have made.
        """
        info, arrays = read_described(data, MAX_GATE_BYTES, partial(refused, name))
        return cls(HeadInfo.from_json(info, name), arrays, name)

    def to_bytes(self) -> bytes:
        """Content of a gate.npz; the same gate gives the same bytes."""
        info = np.frombuffer(self.info.to_json(), np.uint8)
        return npz_bytes({"info": info, **self.arrays})

    def without(self, skill: str) -> EarlyHead:
        """The gate without one of its skills: the base answers what that skill would have answered."""
        place, classes = self.info.skills.index(skill), self.arrays["out.bias"].shape[0]
        order = [*range(place), *range(place + 1, classes), place]
        moved = {key: self.arrays[key][..., order] for key in ("out.weight", "out.bias")}
        info = msgspec.structs.replace(
            self.info,
            skills=[name for name in self.info.skills if name != skill],
            base_classes=self.info.base_classes + 1,
        )
        return EarlyHead(info, {**self.arrays, **moved}, self._name)

    def window(self, ids: Sequence[int]) -> list[int]:
        """The tokens of a prompt that the base has to read for this head."""
        return cut_tokens(ids, self.info.first, self.info.last)

    def __call__(self, states: Floats) -> HeadOutput:
        """Decide.

        Args:
            states: (T, width x layers) float32 of the tokens in `window`, layers side by side; T is at least 1.
        """
        with np.errstate(all="ignore"):  # `probabilities` reports numbers that are not finite
            return self._forward(states)

    def _forward(self, states: Floats) -> HeadOutput:
        a, d, n, length = self._a, self.info.d, self.info.heads, len(states)
        x: Floats = states - self._shift
        x *= self._scale
        np.clip(x, -CLIP, CLIP, out=x)
        h: Floats = x @ a["project.weight"]
        h += a["project.bias"] + self._start[:length] + self._end[:length][::-1]
        for i in range(self.info.depth):
            qkv: Floats = _norm(h, a[f"{i}.norm1.weight"], a[f"{i}.norm1.bias"]) @ a[f"{i}.qkv.weight"]
            qkv += a[f"{i}.qkv.bias"]
            q, k, v = qkv.reshape(length, 3, n, d // n).transpose(1, 2, 0, 3)
            h += _attend(q, k, v).transpose(1, 0, 2).reshape(length, d) @ a[f"{i}.o.weight"]
            h += a[f"{i}.o.bias"]
            inner: Floats = _norm(h, a[f"{i}.norm2.weight"], a[f"{i}.norm2.bias"]) @ a[f"{i}.f1.weight"]
            inner += a[f"{i}.f1.bias"]
            h += _gelu(inner) @ a[f"{i}.f2.weight"]
            h += a[f"{i}.f2.bias"]
        h = _norm(h, a["norm.weight"], a["norm.bias"])
        weight = _softmax(h @ a["query.weight"] + a["query.bias"], 0)
        pooled = np.concatenate([(weight.T @ h).reshape(-1), h[-1], h.mean(0)])
        tags = h @ a["tag.weight"] + a["tag.bias"] if self.info.tags else np.zeros((length, 0), np.float32)
        return HeadOutput(pooled @ a["out.weight"] + a["out.bias"], tags, weight.mean(1), pooled)

    def probabilities(self, logits: Floats) -> Floats:
        """Calibrated probabilities of logits.

        Args:
            logits: (K + base_classes,) float32.

        Returns:
            (K + 1,) float32: the K skills, then the base.

        Raises:
            InvalidArtifact: they are not finite, because the gate's numbers are huge.
        """
        with np.errstate(all="ignore"):  # the check below reports every overflow
            classes = _softmax(logits / np.float32(self.info.temperature), -1)
        if not np.isfinite(classes).all():
            raise refused(self._name, "its numbers are so large that probabilities are not finite")
        k = len(self.info.skills)
        return np.append(classes[:k], classes[k:].sum())


def _norm(x: Floats, weight: Floats, bias: Floats) -> Floats:
    centred: Floats = x - x.mean(-1, keepdims=True)
    scale = 1 / np.sqrt(np.square(centred).mean(-1, keepdims=True) + np.float32(EPSILON))
    centred *= scale
    centred *= weight
    centred += bias
    return centred


def _attend(q: Floats, k: Floats, v: Floats) -> Floats:
    """Attention of heads, (n, T, d / n) each.

    All in place, and divided after the last product: fresh arrays of (n, T, T) numbers cost more than the products.
    """
    scaled: Floats = q * np.float32(1 / math.sqrt(q.shape[-1]))
    odds: Floats = scaled @ k.transpose(0, 2, 1)
    np.subtract(odds, odds.max(-1, keepdims=True), out=odds)
    np.exp(odds, out=odds)
    mixed: Floats = odds @ v
    np.divide(mixed, odds.sum(-1, keepdims=True), out=mixed)
    return mixed


def _softmax(x: Floats, axis: int) -> Floats:
    odds = np.exp(x - x.max(axis, keepdims=True))
    found: Floats = odds / odds.sum(axis, keepdims=True)
    return found


def _gelu(x: Floats) -> Floats:
    scale = math.sqrt(2 / math.pi)
    inner: Floats = x * x
    inner *= np.float32(0.044715 * scale)
    inner += np.float32(scale)
    inner *= x
    np.tanh(inner, out=inner)
    inner += np.float32(1)
    inner *= x
    inner *= np.float32(0.5)
    return inner
