"""A pack's feature bank: compressed pooled vectors of training prompts, to add a skill without the old data.

The vectors (768 numbers per prompt) are standardized, projected on the directions of the last linear map and
on their principal components, and rounded to bytes. `loramix.train.gate_extend` fits a new class on them.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loramix.defaults import BASE
from loramix.errors import InvalidArtifact

COMPONENTS = 144  # more would not fit the default pack, see docs/gate.md
LIMIT = 2_000_000  # rows or numbers a row that a bank may claim
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Projection:
    """Features (D,) -> components (P,): ``((x - mean) / std) @ matrix``.

    Not whitened: components of little variance are noise, which whitening would amplify.
    """

    mean: Floats
    """(D,) float32."""
    std: Floats
    """(D,) float32, positive."""
    matrix: Floats
    """(D, P) float32, exact in float16."""

    @classmethod
    def of(cls, features: Floats, components: int = COMPONENTS, keep: Floats | None = None) -> Projection:
        """Principal components of standardized features, or some directions and components of the rest.

        Args:
            features: (N, D) float32.
            components: how many; fewer where N or D is smaller.
            keep: (D, K) float32; products of features with these columns survive the projection.
        """
        mean = features.mean(0)
        std = np.maximum(features.std(0), 1e-3).astype(np.float32)
        standard = (features - mean) / std
        count = min(components, len(features), features.shape[1])
        kept = np.zeros((features.shape[1], 0), np.float32)
        if keep is not None:
            kept = np.linalg.qr(keep[:, : count // 2] * std[:, None])[0].astype(np.float32)
            standard = standard - standard @ kept @ kept.T
        values, vectors = np.linalg.eigh(standard.T @ standard / len(standard))
        top = np.argsort(values)[::-1][: count - kept.shape[1]]
        matrix = np.concatenate([kept, vectors[:, top]], 1)
        return cls(mean, std, matrix.astype(np.float16).astype(np.float32))

    def apply(self, features: Floats) -> Floats:
        """Components (N, P) float32 of features (N, D)."""
        return np.asarray(((features - self.mean) / self.std) @ self.matrix, np.float32)


@dataclass(frozen=True, slots=True)
class Bank:
    """Prompts as the gate sees them, with their targets and no text."""

    projection: Projection
    codes: npt.NDArray[np.int8]
    """(N, P): components in steps of `scale`."""
    scale: Floats
    """(P,) float32."""
    classes: tuple[str, ...]
    """Skills, and ``base`` last."""
    targets: Floats
    """(N, K+1) float32, rows sum to 1."""
    groups: npt.NDArray[np.int32]
    """(N,): prompts of one phrasing share a number."""

    @classmethod
    def of(
        cls,
        features: Floats,
        targets: Floats,
        groups: npt.NDArray[np.int32],
        classes: Sequence[str],
        projection: Projection | None = None,
        keep: Floats | None = None,
    ) -> Bank:
        """Make a bank.

        Args:
            features: (N, D) float32.
            targets: (N, K+1) float32.
            groups: (N,) int32.
            classes: names of the targets' columns.
            projection: by default, the features' own.
            keep: see `Projection.of`.
        """
        projection = projection or Projection.of(features, keep=keep)
        components = projection.apply(features)
        scale: Floats = (np.abs(components).max(0) / 127).clip(1e-6).astype(np.float32)
        codes = np.rint(components / scale).astype(np.int8)
        return cls(projection, codes, scale, tuple(classes), targets.astype(np.float32), groups)

    def extended(
        self, features: Floats, targets: Floats, groups: npt.NDArray[np.int32], classes: Sequence[str]
    ) -> Bank:
        """The bank with more prompts, projected in the same way.

        Args:
            features: (N2, D) float32.
            targets: (N2, K2+1) float32.
            groups: (N2,) int32, numbered on their own.
            classes: names of the targets' columns; every class of the bank is among them.
        """
        codes = np.rint(self.projection.apply(features) / self.scale).clip(-127, 127).astype(np.int8)
        old = np.zeros((len(self.codes), len(classes)), np.float32)
        old[:, [list(classes).index(name) for name in self.classes]] = self.targets
        first = int(self.groups.max(initial=-1)) + 1
        return Bank(
            self.projection,
            np.concatenate([self.codes, codes]),
            self.scale,
            tuple(classes),
            np.concatenate([old, targets.astype(np.float32)]),
            np.concatenate([self.groups, groups + np.int32(first)]),
        )

    def without(self, skill: str) -> Bank:
        """The bank without a skill: its prompts belong to the base, or to their other skill if they have one."""
        targets = np.delete(self.targets, self.classes.index(skill), axis=1)
        left = targets.sum(1, keepdims=True)
        targets = targets / left.clip(1e-6)
        targets[left[:, 0] < 1e-6, -1] = 1.0
        classes = tuple(name for name in self.classes if name != skill)
        return Bank(self.projection, self.codes, self.scale, classes, targets, self.groups)

    def of_rows(self, keep: npt.NDArray[np.bool_]) -> Bank:
        """The bank with some of its prompts."""
        return Bank(
            self.projection, self.codes[keep], self.scale, self.classes, self.targets[keep], self.groups[keep]
        )

    @property
    def components(self) -> Floats:
        """(N, P) float32."""
        return self.codes * self.scale

    def to_bytes(self) -> bytes:
        """Content of gate-features.npz."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            mean=self.projection.mean,
            std=self.projection.std,
            matrix=self.projection.matrix.astype(np.float16),
            codes=self.codes,
            scale=self.scale,
            targets=self.targets.astype(np.float16),
            groups=self.groups,
            classes=np.frombuffer(json.dumps(self.classes).encode(), np.uint8),
        )
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "gate-features.npz") -> Bank:
        """Read what `to_bytes` wrote.

        Raises:
            InvalidArtifact: anything else.
        """
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if sum(part.file_size for part in archive.infolist()) > 2**30:
                    raise ValueError("it unpacks to more than 1 GB")
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
            mean, std = _floats(arrays, "mean", 1), _floats(arrays, "std", 1)
            matrix, scale = _floats(arrays, "matrix", 2), _floats(arrays, "scale", 1)
            targets = _floats(arrays, "targets", 2)
            codes, groups = arrays["codes"], arrays["groups"]
            classes = json.loads(arrays["classes"].tobytes())
            rows, width = codes.shape
            fits = (
                codes.dtype == np.int8
                and groups.dtype == np.int32
                and groups.shape == (rows,)
                and mean.shape == std.shape == (len(matrix),)
                and matrix.shape[1] == width == len(scale)
                and targets.shape == (rows, len(classes))
                and all(isinstance(text, str) for text in classes)
                and classes[-1] == BASE
                and bool((std > 0).all())
                and max(rows, width, len(mean)) <= LIMIT
            )
            if not fits:
                raise ValueError("its arrays do not fit each other")
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OSError,
            EOFError,
            zipfile.BadZipFile,
        ) as error:
            raise InvalidArtifact(
                f"{name} is no usable feature bank ({error}); run 'loramix train gate'."
            ) from None
        sums = targets.sum(1, keepdims=True)
        return cls(
            Projection(mean, std, matrix), codes, scale, tuple(classes), targets / sums.clip(1e-6), groups
        )


def _floats(arrays: dict[str, npt.NDArray[np.generic]], key: str, ndim: int) -> Floats:
    array = arrays[key]
    if array.dtype.kind != "f" or array.ndim != ndim or not np.isfinite(array).all():
        raise ValueError(f"{key!r} is not a finite float array of {ndim} dimensions")
    return array.astype(np.float32)
