"""The gate of format 1 in NumPy: probabilities per skill and for the base from a prompt's features; and its file.

Independent of prompts and packs, and never imports torch. A gate file is untrusted: it is validated before use,
and nothing in it is evaluated or unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from loramix.defaults import MAX_SKILLS
from loramix.errors import NativeError, NotFound
from loramix.formats.npz import npz_bytes, read_described
from loramix.models.head_info import (
    MAX_GATE_BYTES,
    check_names,
    check_shapes,
    decode_info,
    encode_info,
    refused,
)
from loramix.paths import write_bytes

_GELU = np.float32(math.sqrt(2 / math.pi))
_CUBIC = np.float32(0.044715)
_HALF = np.float32(0.5)
_ONE = np.float32(1.0)

Floats = npt.NDArray[np.float32]
Width = Annotated[int, Meta(ge=1, le=65536)]


class GateInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a gate decides between, what it reads, and how it was calibrated."""

    format: Literal[1] = 1
    skills: Annotated[list[str], Meta(max_length=MAX_SKILLS)]
    """Names of the K skills, in the order of the classes; those after them are the base."""
    base_classes: Annotated[int, Meta(ge=1, le=257)] = 1
    """Classes whose probabilities are the base's together: its own, and one for each skill that was taken out."""
    threshold: Annotated[float, Meta(ge=0, le=1)]
    """Least probability that the skills need together; below it the answer is the base."""
    layers: Annotated[list[int], Meta(max_length=256)]
    """Layers of the base whose hidden states are the features, in the order they are concatenated."""
    pooling: Annotated[str, Meta(max_length=64)]
    """How the tokens' hidden states become one vector."""
    base_sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    """SHA-256 of the base GGUF whose hidden states the gate was trained on."""
    gate_temperature: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    """Divides the logits, so that probabilities are calibrated."""
    hidden: Annotated[list[Width], Meta(max_length=8)] = msgspec.field(default_factory=lambda: [128])
    """Widths of the hidden layers."""
    members: Annotated[int, Meta(ge=1, le=64)] = 1
    """Members M of the ensemble, whose probabilities are averaged."""
    metrics: dict[str, float] = msgspec.field(default_factory=dict)
    """What training measured, for people to read."""

    @classmethod
    def from_json(cls, data: bytes, name: str) -> GateInfo:
        """Read and check the JSON form.

        Args:
            data: UTF-8 JSON.
            name: the file, for messages.

        Raises:
            InvalidArtifact: not JSON, an unknown key, a wrong type or value.
        """
        info = decode_info(data, cls, name)
        check_names(info.skills, name)
        return info

    def to_json(self) -> bytes:
        """JSON form; see `encode_info`."""
        return encode_info(self)

    def shapes(self, n_features: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every array of a gate that reads ``n_features`` features (D)."""
        widths = [n_features, *self.hidden, len(self.skills) + self.base_classes]
        shapes: dict[str, tuple[int, ...]] = {"mean": (n_features,), "std": (n_features,)}
        for i, (rows, columns) in enumerate(pairwise(widths)):
            shapes[f"w{i}"] = (self.members, rows, columns)
            shapes[f"b{i}"] = (self.members, columns)
        return shapes


class NumpyGate:
    """A gate ready to decide: standardize, Linear, tanh-GELU, …, Linear, softmax, mean over members.

    Args:
        info: what the classes mean.
        arrays: float32: ``mean`` (D,), ``std`` (D,), ``w0`` (M, D, H), ``b0`` (M, H), … to a column per class.
        name: the file, for messages.

    Raises:
        InvalidArtifact: arrays missing, unknown, not float32, not finite, or of shapes that do not fit.
    """

    def __init__(
        self, info: GateInfo, arrays: Mapping[str, npt.NDArray[Any]], name: str = "the gate"
    ) -> None:
        check_arrays(info, arrays, name)
        self.info = info
        # column by column a matrix that is in no cache is multiplied by one vector in half the time
        self.arrays: dict[str, Floats] = {
            key: np.ascontiguousarray(arrays[key].swapaxes(1, 2)).swapaxes(1, 2)
            if key.startswith("w")
            else np.ascontiguousarray(arrays[key])
            for key in sorted(arrays)
        }
        self._mean, self._std = self.arrays["mean"], self.arrays["std"]
        self._layers = [(self.arrays[f"w{i}"], self.arrays[f"b{i}"]) for i in range(len(info.hidden) + 1)]
        self._temperature = np.float32(info.gate_temperature)

    @property
    def n_features(self) -> int:
        """Length D of the feature vector."""
        return int(self._mean.shape[0])

    @classmethod
    def load(cls, path: Path) -> NumpyGate:
        """Read and check a gate.npz.

        Raises:
            NotFound: there is no such file.
            InvalidArtifact: not a gate that `save` could have written.
        """
        if not path.is_file():
            raise NotFound(f"no gate at {path}; make one with 'loramix train gate'.")
        with path.open("rb") as file:
            return cls.from_bytes(file.read(MAX_GATE_BYTES + 1), str(path))

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "gate.npz") -> NumpyGate:
        """Read and check the content of a gate.npz.

        Raises:
            InvalidArtifact: not a gate that `save` could have written.
        """
        info, arrays = read_described(data, MAX_GATE_BYTES, partial(refused, name))
        return cls(GateInfo.from_json(info, name), arrays, name)

    def without(self, skill: str) -> NumpyGate:
        """The gate without one of its skills: what that would have answered is the base's, all else is as it was."""
        place, last = self.info.skills.index(skill), len(self.info.hidden)
        order = [*range(place), *range(place + 1, self.arrays[f"b{last}"].shape[1]), place]
        moved = {key: self.arrays[key][..., order] for key in (f"w{last}", f"b{last}")}
        info = msgspec.structs.replace(
            self.info,
            skills=[name for name in self.info.skills if name != skill],
            base_classes=self.info.base_classes + 1,
        )
        return NumpyGate(info, {**self.arrays, **moved})

    def to_bytes(self) -> bytes:
        """Content of a gate.npz; the same gate gives the same bytes."""
        info = np.frombuffer(self.info.to_json(), np.uint8)
        return npz_bytes({"info": info, **self.arrays})

    def save(self, path: Path) -> None:
        """Write gate.npz to ``path``, whole or not at all."""
        write_bytes(path, self.to_bytes())

    def probabilities(self, features: npt.ArrayLike) -> Floats:
        """Probability of each skill and of the base.

        Args:
            features: (D,) or (B, D) floats.

        Returns:
            (K+1,) or (B, K+1) float32, each row summing to 1; the last class is the base.

        Raises:
            NativeError: features that are not finite, or so large that the result is not.
            ValueError: features of another width than D.
        """
        x = np.asarray(features, dtype=np.float32)
        if x.ndim not in (1, 2) or x.shape[-1] != self.n_features:
            raise ValueError(f"features have shape {x.shape}; this gate needs (B, {self.n_features})")
        with np.errstate(all="ignore"):  # the check below answers for every overflow
            h = (np.atleast_2d(x) - self._mean) / self._std  # (B, D)
            for i, (w, b) in enumerate(self._layers):
                if i:
                    h = _HALF * h * (_ONE + np.tanh(_GELU * (h + _CUBIC * h * h * h)))
                h = h @ w + b[:, None, :]  # (M, B, columns)
            logits = h / self._temperature
            odds = np.exp(logits - logits.max(axis=2, keepdims=True))
            classes = (odds / odds.sum(axis=2, keepdims=True)).mean(axis=0)
        k = len(self.info.skills)
        result: Floats = np.concatenate([classes[:, :k], classes[:, k:].sum(1, keepdims=True)], 1)
        if not (np.isfinite(x).all() and np.isfinite(result).all()):
            raise NativeError("the base gave features that are NaN, infinite or huge; check the base's file.")
        return result[0] if x.ndim == 1 else result


def check_arrays(info: GateInfo, arrays: Mapping[str, npt.NDArray[Any]], name: str) -> None:
    """Check that the arrays are exactly those of the gate that ``info`` describes.

    Args:
        info: what the gate decides between, and its widths.
        arrays: by name, as `NumpyGate` takes them.
        name: the file, for messages.

    Raises:
        InvalidArtifact: missing or unknown arrays, another dtype than float32, wrong shapes, not finite.
    """
    mean = arrays.get("mean")
    if mean is None or mean.ndim != 1 or not 1 <= mean.size <= 65536:
        raise refused(name, "it has no 'mean' of shape (D,)")
    check_shapes(arrays, info.shapes(mean.size), name)
