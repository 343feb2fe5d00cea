"""The early head in NumPy: states of all tokens of one or more layers in, logits and token tags out.

A linear map per token, two learned position embeddings (from the start and from the end), pre-norm transformer
layers, and pooling by attention, by the last token and by the mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from loramix.errors import InvalidArtifact

Floats = npt.NDArray[np.float32]
BUCKETS = 48
CLIP = 8.0
EPSILON = 1e-5


class HeadInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``config.json`` of a head."""

    skills: list[str]
    """Classes but the last one, which is the base."""
    layers: list[int]
    """Layers whose inputs it reads; 0 is the token embeddings."""
    width: int
    """Of the base's states."""
    d: int
    """Of the head."""
    depth: int
    heads: int = 4
    first: int = 112
    last: int = 80
    """Tokens of a prompt that are read: so many from its start and so many from its end."""
    temperature: float = 1.0
    threshold: float = 0.5
    """Least probability of a skill that answers."""
    tags: list[str] = []
    """Names of the token tags; empty: it has none."""
    base_sha256: str = ""
    metrics: dict[str, float] = {}


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """What a head says of a prompt."""

    logits: Floats
    """(K + 1,); the last one is the base."""
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


def expected(info: HeadInfo) -> dict[str, tuple[int, ...]]:
    """Shapes of a head's arrays by name; linear weights are (in, out)."""
    d, classes = info.d, len(info.skills) + 1
    shapes: dict[str, tuple[int, ...]] = {
        "mean": (info.width * len(info.layers),),
        "std": (info.width * len(info.layers),),
        "project.weight": (info.width * len(info.layers), d),
        "project.bias": (d,),
        "start": (BUCKETS, d),
        "end": (BUCKETS, d),
        "norm.weight": (d,),
        "norm.bias": (d,),
        "query.weight": (d, 4),
        "query.bias": (4,),
        "out.weight": (6 * d, classes),
        "out.bias": (classes,),
    }
    for i in range(info.depth):
        for name, (rows, columns) in {
            "qkv": (d, 3 * d),
            "o": (d, d),
            "f1": (d, 2 * d),
            "f2": (2 * d, d),
        }.items():
            shapes[f"{i}.{name}.weight"], shapes[f"{i}.{name}.bias"] = (rows, columns), (columns,)
        for name in ("norm1", "norm2"):
            shapes[f"{i}.{name}.weight"] = shapes[f"{i}.{name}.bias"] = (d,)
    if info.tags:
        shapes["tag.weight"], shapes["tag.bias"] = (d, len(info.tags)), (len(info.tags),)
    return shapes


class EarlyHead:
    """A head ready to decide.

    Args:
        info: what it reads and decides between.
        arrays: float32, of the names and shapes of `expected`.

    Raises:
        InvalidArtifact: an array is missing, of another shape or not finite; or the sizes do not fit together.
    """

    def __init__(self, info: HeadInfo, arrays: Mapping[str, npt.NDArray[np.floating]]) -> None:
        if min(info.d, info.depth, info.heads, info.width, info.first, info.last) < 1 or info.d % info.heads:
            raise InvalidArtifact("the head's config names impossible sizes; train it again.")
        if not info.layers or not 0 < info.threshold < 1 or not 0 < info.temperature < 100:
            raise InvalidArtifact(
                "the head's config needs layers, a threshold and a temperature; train it again."
            )
        for name, shape in expected(info).items():
            found = arrays.get(name)
            if found is None or found.shape != shape or not np.isfinite(found).all():
                what = (
                    "missing"
                    if found is None
                    else f"of shape {found.shape}"
                    if found.shape != shape
                    else "not finite"
                )
                raise InvalidArtifact(f"the head's {name!r} is {what}; needs {shape}. Train it again.")
        self.info = info
        self._a = {name: np.ascontiguousarray(arrays[name], np.float32) for name in expected(info)}
        scale = 1.0 / np.maximum(self._a["std"], 1e-6)
        self._shift, self._scale = self._a["mean"], scale.astype(np.float32)
        steps = np.arange(info.first + info.last, dtype=np.int64)
        self._start = self._a["start"][bucket(steps)]
        self._end = self._a["end"][bucket(steps)]

    @classmethod
    def load(cls, directory: Path) -> EarlyHead:
        """Read ``config.json`` and ``head.safetensors``.

        Raises:
            InvalidArtifact: a file is missing or damaged.
        """
        from safetensors.numpy import load

        try:
            info = msgspec.json.decode((directory / "config.json").read_bytes(), type=HeadInfo)
            arrays = load((directory / "head.safetensors").read_bytes())
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise InvalidArtifact(f"{directory}: {error}; train the head again.") from None
        except Exception as error:  # safetensors' own error is private to it
            raise InvalidArtifact(
                f"{directory / 'head.safetensors'}: {error}; train the head again."
            ) from None
        return cls(info, arrays)

    def window(self, ids: Sequence[int]) -> list[int]:
        """The tokens of a prompt that the base has to read for this head."""
        first, last = self.info.first, self.info.last
        return list(ids) if len(ids) <= first + last else [*ids[:first], *ids[-last:]]

    def __call__(self, states: Floats) -> HeadOutput:
        """Decide.

        Args:
            states: (T, width x layers) float32 of the tokens in `window`, layers side by side.
        """
        a, d, n, length = self._a, self.info.d, self.info.heads, len(states)
        x = np.clip((states - self._shift) * self._scale, -CLIP, CLIP)
        h = x @ a["project.weight"] + a["project.bias"] + self._start[:length] + self._end[:length][::-1]
        for i in range(self.info.depth):
            qkv = (
                _norm(h, a[f"{i}.norm1.weight"], a[f"{i}.norm1.bias"]) @ a[f"{i}.qkv.weight"]
                + a[f"{i}.qkv.bias"]
            )
            q, k, v = qkv.reshape(length, 3, n, d // n).transpose(1, 2, 0, 3)
            weight = _softmax((q @ k.transpose(0, 2, 1)) * np.float32(1 / math.sqrt(d // n)), -1)
            mixed = (weight @ v).transpose(1, 0, 2).reshape(length, d)
            h = h + mixed @ a[f"{i}.o.weight"] + a[f"{i}.o.bias"]
            inner = (
                _norm(h, a[f"{i}.norm2.weight"], a[f"{i}.norm2.bias"]) @ a[f"{i}.f1.weight"]
                + a[f"{i}.f1.bias"]
            )
            h = h + _gelu(inner) @ a[f"{i}.f2.weight"] + a[f"{i}.f2.bias"]
        h = _norm(h, a["norm.weight"], a["norm.bias"])
        weight = _softmax(h @ a["query.weight"] + a["query.bias"], 0)
        pooled = np.concatenate([(weight.T @ h).reshape(-1), h[-1], h.mean(0)])
        tags = h @ a["tag.weight"] + a["tag.bias"] if self.info.tags else np.zeros((length, 0), np.float32)
        return HeadOutput(pooled @ a["out.weight"] + a["out.bias"], tags, weight.mean(1), pooled)

    def probabilities(self, logits: Floats) -> Floats:
        """Calibrated probabilities (K + 1,) of logits."""
        return _softmax(logits / np.float32(self.info.temperature), -1)


def _norm(x: Floats, weight: Floats, bias: Floats) -> Floats:
    centred = x - x.mean(-1, keepdims=True)
    found: Floats = (
        centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + np.float32(EPSILON)) * weight + bias
    )
    return found


def _softmax(x: Floats, axis: int) -> Floats:
    odds = np.exp(x - x.max(axis, keepdims=True))
    found: Floats = odds / odds.sum(axis, keepdims=True)
    return found


def _gelu(x: Floats) -> Floats:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    found: Floats = np.float32(0.5) * x * (1 + np.tanh(inner))
    return found
