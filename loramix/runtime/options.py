"""What one request asks of an answer, validated once, wherever the request comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from loramix.defaults import DEFAULT_POLICY, POLICIES
from loramix.errors import UsageError
from loramix.models.mixing import Mix
from loramix.runtime.router import MixLike, as_mix
from loramix.runtime.sampling import Sampling

MAX_STOPS = 16
GREEDY = Sampling()


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How a prompt is routed, sampled and ended; plain values that cross a process boundary.

    Args:
        policy: see `Router.decide`; or ``base``.
        mix: a mix that overrides the gate.
        max_tokens: longest answer in tokens; None for what each skill that answers says.
        stop: texts that end the answer and are not part of it.
        sampling: how tokens are drawn.
        grammar: GBNF that the answer follows; one mix alone answers then.
        json_schema: JSON schema that the answer follows; one mix alone answers then.
        top_logprobs: keep each token's log-probability and those of so many likeliest ones; None keeps none.

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

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise UsageError(f"policy {self.policy!r} is unknown; use one of {', '.join(POLICIES)}.")
        if len(self.stop) > MAX_STOPS or not all(isinstance(text, str) and text for text in self.stop):
            raise UsageError(f"stop must be at most {MAX_STOPS} non-empty texts.")
        if self.max_tokens is not None:
            check_range("max_tokens", self.max_tokens, 1, 1_000_000)
        if self.top_logprobs is not None:
            check_range("top_logprobs", self.top_logprobs, 0, 20)

    @classmethod
    def of(
        cls, *, mix: MixLike | None = None, stop: str | Sequence[str] = (), **values: Any
    ) -> GenerationOptions:
        """Options from plain keywords, as the CLI, the server and Python callers have them.

        Args:
            mix: a `Mix`, its text form, or ``{skill: scale}``.
            stop: one text or several.
            **values: fields of `GenerationOptions` and settings of `Sampling`.

        Raises:
            UsageError: an unknown keyword, or a value out of its range.
            InvalidMix: see `as_mix`.
        """
        own_names, sampling_names = (
            {field.name for field in fields(cls)} - {"sampling"},
            set(Sampling.__dataclass_fields__),
        )
        if unknown := sorted(set(values) - own_names - sampling_names):
            raise UsageError(f"unknown option {unknown}; there are {sorted(own_names | sampling_names)}.")
        sampling = Sampling(**{name: value for name, value in values.items() if name in sampling_names})
        texts = (stop,) if isinstance(stop, str) else tuple(stop)
        rest = {name: value for name, value in values.items() if name in own_names}
        return cls(mix=None if mix is None else as_mix(mix), stop=texts, sampling=sampling, **rest)


def check_range(name: str, value: object, low: int, high: int) -> None:
    """Refuse what is no whole number within bounds.

    Raises:
        UsageError: named by ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} is {value!r}; it must be a whole number from {low} to {high}.")
