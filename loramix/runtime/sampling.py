"""From logits to a token, in NumPy: llama.cpp's sampler aborts the process on numbers it does not like."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from loramix.errors import UsageError

PARTIAL_SORT = 1024
"""Tokens that are sorted at first: what is drawn is nearly always among them."""


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
        presence_penalty: taken from the logits of tokens that the answer has already.
        frequency_penalty: the same, times how often it has them.
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
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_k", 0, 1_000_000),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repeat_penalty", 0.01, 100.0),
            ("repeat_last_n", 0, 1_000_000),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
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
        n_prompt: tokens of the prompt, which no penalty for presence or frequency counts.
    """

    def __init__(self, settings: Sampling, n_prompt: int = 0) -> None:
        self.settings, self._n_prompt = settings, n_prompt
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
        if (s.presence_penalty or s.frequency_penalty) and len(recent) > self._n_prompt:
            logits = logits.copy()
            answered, counts = np.unique(np.asarray(recent[self._n_prompt :], np.int64), return_counts=True)
            logits[answered] -= (s.presence_penalty + s.frequency_penalty * counts).astype(np.float32)
        if s.temperature == 0.0:
            return int(logits.argmax())
        if 0 < s.top_k < len(logits):
            kept = likeliest(logits, s.top_k)
            return int(kept[self._draw(logits[kept])])
        return self._draw(logits)

    def _draw(self, logits: npt.NDArray[np.float32]) -> int:
        """The place of what is drawn."""
        s = self.settings
        # 1 for the likeliest token
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
    """Ids of the likeliest tokens, those first; equal ones by id, so that a seed gives the same text everywhere.

    Args:
        logits: (V,) float32.
        count: how many, 1 to V.
    """
    if count < len(logits):
        ids = np.flatnonzero(logits >= np.partition(logits, -count)[-count])
    else:
        ids = np.arange(len(logits))
    return ids[np.argsort(-logits[ids], kind="stable")][:count]


def _draw_index(sums: npt.NDArray[np.float64], total: float, top_p: float, draw: float) -> int:
    """Which of the likeliest tokens is drawn; their number where it is none of them.

    Args:
        sums: odds of each and all before it.
        total: odds of all that may be drawn, before ``top_p``.
        top_p: see `Sampling`.
        draw: 0 to 1.
    """
    if top_p < 1:
        last = int(np.searchsorted(sums, top_p * total))
        if last == len(sums):
            return last
        total = float(sums[last])
    return int(np.searchsorted(sums, draw * total))


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
    top_logit = float(logits.max())
    total = top_logit + math.log(float(np.exp(logits.astype(np.float64) - top_logit).sum()))
    best = [int(i) for i in likeliest(logits, top)] if top else []
    pairs = [(i, float(logits[i]) - total) for i in best]
    return TokenScore(token, float(logits[token]) - total, pairs)
