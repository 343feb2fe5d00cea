"""From logits to a token, in NumPy: llama.cpp's sampler aborts the process on numbers it does not like."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from loramix.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is drawn; the defaults are greedy.

    Args:
        temperature: 0 takes the likeliest token; otherwise divides the logits.
        top_k: keep so many tokens at most; 0 keeps all.
        top_p: keep the likeliest tokens that reach this probability together (Holtzman et al. 2020).
        min_p: keep tokens at least so likely as this share of the likeliest (Nguyen et al. 2024).
        repeat_penalty: divides positive logits of recent tokens and multiplies negative ones (Keskar et al. 2019).
        repeat_last_n: how many tokens back count as recent.
        seed: of the random draws; None draws a new one.

    Raises:
        UsageError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_k", 0, 1_000_000),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repeat_penalty", 0.01, 100.0),
            ("repeat_last_n", 0, 1_000_000),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if value is None and name == "seed":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise UsageError(f"{name} is {value!r}; it must be a number from {low} to {high}.")
            if name in ("top_k", "repeat_last_n", "seed") and not float(value).is_integer():
                raise UsageError(f"{name} is {value!r}; it must be a whole number.")


class Picker(Protocol):
    """Whatever chooses an answer's next token."""

    def pick(self, logits: npt.NDArray[np.float32], recent: list[int]) -> int:
        """See `Sampler.pick`."""


class Sampler:
    """Draws tokens one after another.

    Args:
        settings: how.
    """

    def __init__(self, settings: Sampling) -> None:
        self.settings = settings
        self._random = np.random.default_rng(settings.seed)

    def pick(self, logits: npt.NDArray[np.float32], recent: list[int]) -> int:
        """Draw one token.

        Args:
            logits: (V,) float32, finite.
            recent: tokens of prompt and answer so far.

        Returns:
            A token id.
        """
        s = self.settings
        if s.repeat_penalty != 1.0 and s.repeat_last_n and recent:
            logits = logits.copy()
            seen = np.unique(np.asarray(recent[-s.repeat_last_n :], np.int64))
            values = logits[seen]
            logits[seen] = np.where(values > 0, values / s.repeat_penalty, values * s.repeat_penalty)
        if s.temperature == 0.0:
            return int(logits.argmax())
        keep = s.top_k if 0 < s.top_k < len(logits) else len(logits)
        chosen = np.argpartition(logits, -keep)[-keep:] if keep < len(logits) else np.arange(len(logits))
        # likeliest first; equal logits by token id, so that a seed gives the same text everywhere
        chosen = chosen[np.lexsort((chosen, -logits[chosen]))]
        scaled = (logits[chosen].astype(np.float64) - float(logits[chosen[0]])) / s.temperature
        p = np.exp(scaled)
        p /= p.sum()
        if s.min_p > 0:
            kept = p >= s.min_p * p[0]
            chosen, p = chosen[kept], p[kept] / p[kept].sum()
        if s.top_p < 1:
            reach = int(np.searchsorted(np.cumsum(p), s.top_p)) + 1
            chosen, p = chosen[:reach], p[:reach] / p[:reach].sum()
        return int(chosen[min(int(np.searchsorted(np.cumsum(p), self._random.random())), len(p) - 1)])


def log_probability(logits: npt.NDArray[np.float32], token: int) -> float:
    """Natural logarithm of a token's probability under (V,) logits."""
    top = float(logits.max())
    return float(logits[token]) - top - math.log(float(np.exp(logits.astype(np.float64) - top).sum()))


class TokenScore(NamedTuple):
    """How likely an answer's token was, and which ones were likeliest there; natural logarithms."""

    token: int
    log_probability: float
    top: list[tuple[int, float]]
    """Token ids, likeliest first."""


def score(logits: npt.NDArray[np.float32], token: int, top: int) -> TokenScore:
    """The log-probability of a token, and the ``top`` likeliest ones with theirs.

    Args:
        logits: (V,) float32, as the model gave them: no temperature, no grammar.
        token: the one that was chosen.
        top: how many others; 0 for none.
    """
    best = np.argpartition(logits, -top)[-top:] if top else np.zeros(0, np.intp)
    best = best[np.lexsort((best, -logits[best]))]
    pairs = [(int(i), log_probability(logits, int(i))) for i in best]
    return TokenScore(token, log_probability(logits, token), pairs)
