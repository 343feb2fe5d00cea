"""The options of one request, validated once for the CLI, the server and Python callers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from loramix.defaults import DEFAULT_POLICY, POLICIES
from loramix.errors import UsageError
from loramix.models.mixing import Mix
from loramix.runtime.router import MixLike, as_mix
from loramix.runtime.sampling import Sampling

MAX_STOPS, MAX_TOP_LOGPROBS = 16, 20
GREEDY = Sampling()


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options for routing, sampling and stopping; plain values that can be sent to another process.

    Args:
        policy: ``base``, or see `Router.decide`.
        mix: a mix that overrides the gate.
        max_tokens: maximum tokens of the answer; None for the limits of the skills that answer.
        stop: stop strings, which are not part of the answer.
        sampling: sampling settings.
        grammar: GBNF grammar of the answer; a single mix answers then.
        json_schema: JSON schema of the answer; a single mix answers then.
        top_logprobs: number of most probable tokens to report with each token's log-probability; None for none.
        labels: answer with one of the skill's labels where a single label skill answers.

    Raises:
        UsageError: a value out of its range.
    """

    policy: str = DEFAULT_POLICY
    mix: Mix | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    sampling: Sampling = GREEDY
    grammar: str | None = None
    json_schema: dict[str, Any] | bool | None = None
    top_logprobs: int | None = None
    labels: bool = True

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError(f"policy {self.policy!r} is unknown; use one of {', '.join(POLICIES)}.")
        if len(self.stop) > MAX_STOPS or not all(isinstance(text, str) and text for text in self.stop):
            raise UsageError(f"stop must be at most {MAX_STOPS} non-empty texts.")
        if self.max_tokens is not None:
            check_range("max_tokens", self.max_tokens, 1, 1_000_000)
        if self.top_logprobs is not None:
            check_range("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)

    @property
    def plans(self) -> bool:
        """Whether a prompt for several things may be split: under the policy ``each``, unless something is fixed."""
        return (
            self.policy == "each" and self.mix is None and self.grammar is None and self.json_schema is None
        )

    @classmethod
    def of(
        cls, *, mix: MixLike | None = None, stop: str | Sequence[str] = (), **values: Any
    ) -> GenerationOptions:
        """Create options from plain keyword arguments.

        Args:
            mix: a `Mix`, its text form, or ``{skill: scale}``.
            stop: one stop string or several.
            **values: fields of `GenerationOptions` and settings of `Sampling`.

        Raises:
            UsageError: an unknown keyword, or a value out of its range.
            InvalidMix: see `as_mix`.
        """
        own_names = {field.name for field in fields(cls)} - {"sampling"}
        sampling_names = {field.name for field in fields(Sampling)}
        if unknown := sorted(set(values) - own_names - sampling_names):
            raise UsageError(f"unknown option {unknown}; there are {sorted(own_names | sampling_names)}.")
        sampling = Sampling(**{name: value for name, value in values.items() if name in sampling_names})
        texts = (stop,) if isinstance(stop, str) else tuple(stop)
        rest = {name: value for name, value in values.items() if name in own_names}
        return cls(mix=None if mix is None else as_mix(mix), stop=texts, sampling=sampling, **rest)


def check_range(name: str, value: object, low: int, high: int) -> None:
    """Check that a value is an integer within bounds.

    Raises:
        UsageError: it is not; the message names ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} is {value!r}; it must be a whole number from {low} to {high}.")
