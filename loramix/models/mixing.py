"""Computes a mix from the gate's probabilities: top-1, blend, several in turn, or none.

Pure NumPy, independent of prompts, packs and llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from loramix.defaults import BASE, POLICIES
from loramix.errors import InvalidMix
from loramix.paths import is_safe_name

RESERVED_NAMES = frozenset({*POLICIES, "none"})  # reserved words in place of a mix
STEPS = 64  # scales are multiples of 1/64, so that near-equal mixes share one KV cache
MAX_SCALE = 4.0
MAX_ACTIVE = 8
FLOOR = 0.15
SECOND = 0.3  # with it 3 % of prompts for one skill get two answers, by cross-validation over phrasings (docs/gate.md)
GATE_TOP_K = 4

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Mix:
    """An immutable, hashable mix ``{skill: scale}``, independent of order.

    Args:
        entries: pairs (skill, scale), scale in [0, 4]; rounded to 1/64, zeros dropped, sorted by name.

    Raises:
        InvalidMix: an invalid skill name, a repeated skill, a scale out of range, or too many skills.
    """

    EMPTY: ClassVar[Mix]
    entries: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.entries]
        for name in names:
            if not is_safe_name(name) or name in RESERVED_NAMES:
                raise InvalidMix(
                    f"{name[:80]!r} cannot be a skill in a mix: write 'sentiment=0.7,summarize=0.3', "
                    "or 'base' alone for no skill."
                )
            if names.count(name) > 1:
                raise InvalidMix(f"skill {name!r} is in the mix twice; name it once.")
        quantized = ((name, _quantize(name, scale)) for name, scale in self.entries)
        active = tuple(sorted((name, scale) for name, scale in quantized if scale))
        if len(active) > MAX_ACTIVE:
            raise InvalidMix(
                f"the mix has {len(active)} active skills; at most {MAX_ACTIVE} can act at once."
            )
        object.__setattr__(self, "entries", active)

    @classmethod
    def of(cls, scales: Mapping[str, float]) -> Mix:
        """Create a mix from ``{skill: scale}``.

        Raises:
            InvalidMix: see `Mix`.
        """
        return cls(tuple(scales.items()))

    @classmethod
    def base(cls) -> Mix:
        """The empty mix: the bare base model."""
        return cls.EMPTY

    @classmethod
    def parse(cls, text: str) -> Mix:
        """Parse a mix.

        Args:
            text: ``"sentiment=0.7,summarize=0.3"``;
                ``"sentiment"`` is scale 1; ``"base"`` and ``""`` are empty.

        Raises:
            InvalidMix: the text cannot be parsed; see also `Mix`.
        """
        if text.strip() in ("", BASE):
            return cls.EMPTY
        entries = []
        for part in text.split(","):
            name, equals, scale = (piece.strip() for piece in part.partition("="))
            entries.append((name, _read_scale(name, scale) if equals else 1.0))
        return cls(tuple(entries))

    def items(self) -> tuple[tuple[str, float], ...]:
        """Pairs (skill, scale), sorted by skill."""
        return self.entries

    @property
    def scales(self) -> dict[str, float]:
        """A new dict ``{skill: scale}``, sorted by skill."""
        return dict(self.entries)

    def to_json(self) -> dict[str, float]:
        """Return ``{skill: scale}``; every scale is exact in decimals."""
        return self.scales

    def __bool__(self) -> bool:
        return bool(self.entries)

    def __str__(self) -> str:
        # 8 digits hold any multiple of 1/64 up to 4 exactly, so parse() gives the same mix back
        return ",".join(f"{name}={scale:.8g}" for name, scale in self.entries) or BASE


Mix.EMPTY = Mix()


def decide(probabilities: npt.ArrayLike, *, threshold: float) -> npt.NDArray[np.intp]:
    """Choose one class per row, which may be the base.

    Args:
        probabilities: (B, K+1) floats, the last class being the base.
        threshold: minimum sum of the skills' probabilities, in [0, 1]; the sum, because a prompt may need two
            skills.

    Returns:
        (B,) indices of the most probable skill, the lowest index on ties; K if the sum is below the threshold.

    Raises:
        ValueError: not a (B, K+1) array of finite probabilities.
    """
    rows = _rows(probabilities)
    base = rows.shape[1] - 1
    if not base:
        return np.zeros(len(rows), np.intp)
    skills = rows[:, :base]
    reached = (skills.sum(axis=1) >= threshold) & (skills.max(axis=1) > 0)
    chosen: npt.NDArray[np.intp] = np.where(reached, skills.argmax(axis=1), base)
    return chosen


def top1(probabilities: npt.ArrayLike, skills: Sequence[str], threshold: float) -> Mix:
    """Return the mix of the most probable skill at scale 1, or the empty mix.

    Args:
        probabilities: (K+1,) floats, the last class being the base.
        skills: the K names, in the gate's order.
        threshold: least probability, in [0, 1], that the skills need together.

    Raises:
        ValueError: shapes that do not fit, or probabilities that are not finite.
    """
    row = _row(probabilities, skills)
    winner = int(decide(row, threshold=threshold)[0])
    return Mix(((skills[winner], 1.0),)) if winner < len(skills) else Mix.EMPTY


def blend(
    probabilities: npt.ArrayLike,
    skills: Sequence[str],
    *,
    threshold: float,
    floor: float = FLOOR,
    top_k: int = GATE_TOP_K,
) -> Mix:
    """Return the mix of the probable skills in proportion to their probabilities; see `blend_rows`.

    Args:
        probabilities: (K+1,) floats, the last class being the base.
        skills: the K names, in the gate's order.
        threshold: least probability, in [0, 1], that the skills need together.
        floor: skills with lower probabilities are dropped, except the most probable one.
        top_k: maximum number of skills.

    Returns:
        A mix whose scales sum to 1 before they are rounded to 1/64.

    Raises:
        ValueError: shapes that do not fit, or probabilities that are not finite.
    """
    row = _row(probabilities, skills)
    scales = blend_rows(row, threshold=threshold, floor=floor, top_k=top_k)[0]
    return Mix(tuple((name, float(scale)) for name, scale in zip(skills, scales, strict=True) if scale))


def each(probabilities: npt.ArrayLike, skills: Sequence[str], *, threshold: float) -> list[Mix]:
    """Return mixes that answer in turn: the most probable skill, then others with at least `SECOND`.

    Args:
        probabilities: (K+1,) floats, the last class being the base.
        skills: the K names, in the gate's order.
        threshold: least probability, in [0, 1], that the skills need together.

    Returns:
        One mix or more, each of one skill at scale 1; only the empty mix if no skill fits.

    Raises:
        ValueError: shapes that do not fit, or probabilities that are not finite.
    """
    found = blend(probabilities, skills, threshold=threshold, floor=SECOND).scales
    p = dict(zip(skills, np.asarray(probabilities, np.float64), strict=False))
    return [Mix(((name, 1.0),)) for name in sorted(found, key=lambda name: -p[name])] or [Mix.EMPTY]


def choose(policy: str, probabilities: npt.ArrayLike, skills: Sequence[str], threshold: float) -> list[Mix]:
    """Return the mixes that answer in turn under a policy that needs a gate; see `blend` for the arguments.

    Raises:
        ValueError: an unknown policy, shapes that do not fit, or probabilities that are not finite.
    """
    match policy:
        case "each":
            return each(probabilities, skills, threshold=threshold)
        case "top1":
            return [top1(probabilities, skills, threshold)]
        case "blend":
            return [blend(probabilities, skills, threshold=threshold)]
        case "token":  # until the gate reads the answer
            return [blend(probabilities, skills, threshold=threshold, top_k=2)]
    raise ValueError(f"policy {policy!r} is unknown")


def blend_rows(
    probabilities: npt.ArrayLike, *, threshold: float, floor: float = FLOOR, top_k: int = GATE_TOP_K
) -> Floats:
    """Compute the scales of the blend policy for a batch of prompts.

    Args:
        probabilities: (B, K+1) floats, the last class being the base.
        threshold: least probability, in [0, 1], that the skills need together.
        floor: skills with lower probabilities are dropped, except the most probable one.
        top_k: maximum number of skills; of equal probabilities the lower index is kept.

    Returns:
        (B, K) float64, each row summing to 1, or all zeros for the bare base.

    Raises:
        ValueError: not a (B, K+1) array of finite probabilities, or ``top_k`` below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    rows = _rows(probabilities)
    skills = rows[:, :-1]
    rank = np.argsort(np.argsort(-skills, axis=1, kind="stable"), axis=1, kind="stable")
    routed = decide(rows, threshold=threshold) < skills.shape[1]
    large = (skills >= floor) | (rank == 0)  # a routed prompt keeps at least one skill
    kept = np.where((rank < top_k) & large & routed[:, None], skills, 0.0)
    # normalize each row by its own sum, so that prompts do not affect each other
    total = kept.sum(axis=1, keepdims=True)
    scales: Floats = np.divide(kept, total, out=np.zeros_like(kept), where=total > 0)
    return scales


def _rows(probabilities: npt.ArrayLike) -> Floats:
    rows = np.ascontiguousarray(probabilities, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] < 1:
        raise ValueError(f"probabilities have shape {rows.shape}; they must be (B, K+1)")
    if not (np.isfinite(rows).all() and (rows >= 0).all()):
        raise ValueError("probabilities must be finite and not negative")
    return rows


def _row(probabilities: npt.ArrayLike, skills: Sequence[str]) -> Floats:
    row = np.asarray(probabilities, dtype=np.float64)
    if row.shape != (len(skills) + 1,):
        raise ValueError(
            f"probabilities have shape {row.shape}; {len(skills)} skills need ({len(skills) + 1},)"
        )
    return row[None, :]


def _read_scale(name: str, text: str) -> float:
    # float() would also accept '1_0' and digits of other scripts
    if text.isascii() and "_" not in text:
        try:
            return float(text)
        except ValueError:
            pass
    raise InvalidMix(f"scale {text[:40]!r} of {name[:80]!r} is not a number; write it as in 'sentiment=0.7'.")


def _quantize(name: str, scale: object) -> float:
    is_number = not isinstance(scale, bool) and isinstance(scale, Real)  # bool is a Real, but not a scale
    try:
        number = float(scale) if is_number else None  # type: ignore[arg-type]  # checked by is_number
    except OverflowError:  # an int out of float's range
        number = math.inf
    if number is not None and 0 <= number <= MAX_SCALE:  # false for NaN
        return round(number * STEPS) / STEPS
    found = type(scale).__name__ if number is None else f"{number:g}"
    raise InvalidMix(f"the scale of {name!r} is {found}; it must be a number from 0 to {MAX_SCALE:g}.")
