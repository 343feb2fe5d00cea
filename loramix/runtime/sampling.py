"""Token sampling in NumPy, because llama.cpp's sampler aborts the process on unexpected values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from loramix.errors import UsageError

PARTIAL_SORT = 1024
"""Number of tokens sorted first; the sampled token is nearly always among them."""

BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_k": (0, 1_000_000),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repeat_penalty": (0.01, 100.0),
    "repeat_last_n": (0, 1_000_000),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "seed": (0, 2**63 - 1),
}
"""Least and greatest value of each setting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling settings; the defaults are greedy.

    Args:
        temperature: divides the logits; 0 selects the most probable token.
        top_k: maximum number of candidate tokens; 0 for all.
        top_p: keep the most probable tokens that together reach this probability (Holtzman et al. 2020).
        min_p: keep tokens with at least this fraction of the highest probability (Nguyen et al. 2024).
        repeat_penalty: divides positive logits of recent tokens and multiplies negative ones (Keskar et al. 2019).
        repeat_last_n: number of last tokens that count as recent.
        presence_penalty: subtracted from the logits of tokens that the answer contains.
        frequency_penalty: subtracted once for each occurrence in the answer.
        seed: random seed; None for a random one.

    Raises:
        UsageError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if value is None and name == "seed":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise UsageError(f"{name} is {value!r}; it must be a number from {low} to {high}.")
            if name in ("top_k", "repeat_last_n", "seed") and not float(value).is_integer():
                raise UsageError(f"{name} is {value!r}; it must be a whole number.")


class Picker(Protocol):
    """Chooses an answer's next token."""

    def pick(self, logits: npt.NDArray[np.float32], recent: list[int], n_prompt: int = 0) -> int:
        """See `Sampler.pick`."""


class Sampler:
    """Samples the tokens of one answer.

    Args:
        settings: sampling settings.
    """

    def __init__(self, settings: Sampling) -> None:
        self.settings = settings
        self._random = np.random.default_rng(settings.seed)

    def pick(self, logits: npt.NDArray[np.float32], recent: list[int], n_prompt: int = 0) -> int:
        """Sample one token.

        Args:
            logits: (V,) float32, finite.
            recent: ids of the prompt and of the answer so far.
            n_prompt: number of prompt tokens among them, which presence and frequency penalties ignore.

        Returns:
            A token id.
        """
        s = self.settings
        if s.repeat_penalty != 1.0 and s.repeat_last_n and recent:
            logits = logits.copy()
            seen = np.unique(np.asarray(recent[-s.repeat_last_n :], np.int64))
            values = logits[seen]
            logits[seen] = np.where(values > 0, values / s.repeat_penalty, values * s.repeat_penalty)
        if (s.presence_penalty or s.frequency_penalty) and len(recent) > n_prompt:
            logits = logits.copy()
            answered, counts = np.unique(np.asarray(recent[n_prompt:], np.int64), return_counts=True)
            logits[answered] -= (s.presence_penalty + s.frequency_penalty * counts).astype(np.float32)
        if s.temperature == 0.0:
            return int(logits.argmax())
        if 0 < s.top_k < len(logits):
            kept = likeliest(logits, s.top_k)
            return int(kept[self._draw(logits[kept])])
        return self._draw(logits)

    def _draw(self, logits: npt.NDArray[np.float32]) -> int:
        """Sample an index into ``logits``."""
        s = self.settings
        # relative to the most probable token
        odds = np.exp((logits.astype(np.float64) - float(logits.max())) / s.temperature)
        count = int(np.count_nonzero(odds >= s.min_p)) if s.min_p > 0 else len(odds)
        draw = self._random.random()
        # sorting all tokens takes as long as decoding one
        for n in (min(PARTIAL_SORT, count) if count == len(odds) else count, count):
            ids = likeliest(logits, n)
            sums = np.cumsum(odds[ids])
            index = _draw_index(sums, float(odds.sum() if n < count else sums[-1]), s.top_p, draw)
            if index < n:
                break
        return int(ids[min(index, n - 1)])


def likeliest(logits: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """Return the ids of the most probable tokens in descending order; ties by id, for reproducible seeds.

    Args:
        logits: (V,) float32.
        count: number of ids, 1 to V.
    """
    if count < len(logits):
        ids = np.flatnonzero(logits >= np.partition(logits, -count)[-count])
    else:
        ids = np.arange(len(logits))
    return ids[np.argsort(-logits[ids], kind="stable")][:count]


def _draw_index(sums: npt.NDArray[np.float64], total: float, top_p: float, draw: float) -> int:
    """Return the index of the sampled token among the sorted ones; ``len(sums)`` if it is not among them.

    Args:
        sums: cumulative odds of the sorted tokens.
        total: odds of all candidates, before ``top_p``.
        top_p: see `Sampling`.
        draw: uniform random number from 0 to 1.
    """
    if top_p < 1:
        last = int(np.searchsorted(sums, top_p * total))
        if last == len(sums):
            return last
        total = float(sums[last])
    return int(np.searchsorted(sums, draw * total))


class TokenScore(NamedTuple):
    """Log-probability (natural logarithm) of a token, and the most probable tokens at its position."""

    token: int
    log_probability: float
    top: list[tuple[int, float]]
    """Token ids with their log-probabilities, most probable first."""


def score(logits: npt.NDArray[np.float32], token: int, top: int) -> TokenScore:
    """Compute a token's log-probability and those of the ``top`` most probable tokens.

    Args:
        logits: (V,) float32 from the model, before temperature and grammar.
        token: id of the sampled token.
        top: number of most probable tokens; 0 for none.
    """
    top_logit = float(logits.max())
    total = top_logit + math.log(float(np.exp(logits.astype(np.float64) - top_logit).sum()))
    best = [int(i) for i in likeliest(logits, top)] if top else []
    pairs = [(i, float(logits[i]) - total) for i in best]
    return TokenScore(token, float(logits[token]) - total, pairs)
