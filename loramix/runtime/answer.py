"""A finished answer: text, tokens, route, usage and timings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from loramix.models.mixing import Mix
from loramix.runtime.router import Route
from loramix.runtime.sampling import TokenScore

ScoredToken: TypeAlias = tuple[bytes, float, list[tuple[bytes, float]]]
"""A token's bytes, its log-probability, and the most likely tokens with their log-probabilities."""


@dataclass(frozen=True)
class Answer:
    """A finished answer."""

    text: str
    route: Route
    usage: dict[str, int]
    """``prompt_tokens``, ``cached_tokens`` (prompt tokens found in the cache), ``completion_tokens``; of a plan, the
    tokens of all steps' prompts."""
    timings: dict[str, float]
    """Seconds: ``features``, ``gate``, ``first_token`` (since the start of the request), ``total``."""
    finish_reason: str
    """``stop`` (the model or a stop string ended it) or ``length``."""
    tokens: list[int] = field(default_factory=list, repr=False)
    """Token ids of the answer."""
    mixes: list[Mix] = field(default_factory=list, repr=False)
    """The mix that chose each token; it changes only under the policies ``each`` and ``token``."""
    scores: list[TokenScore] = field(default_factory=list, repr=False)
    """Log-probabilities of the tokens, if they were requested."""
    step_labels: list[dict[str, float]] = field(default_factory=list, repr=False)
    """Probabilities of the labels for each mix that answered; empty for a mix that answers in free text."""
    parts: list[str] = field(default_factory=list, repr=False)
    """Text of each mix that answered."""
    prompts: list[list[int]] = field(default_factory=list, repr=False)
    """Token ids of the prompt of each mix that answered."""

    @property
    def labels(self) -> dict[str, float]:
        """Probability by label, in descending order, of the first label skill that answered; else empty."""
        return next(filter(None, self.step_labels), {})
