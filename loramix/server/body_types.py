"""Field types shared by the request bodies of both protocols, each with the rule shown to clients."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from loramix.runtime.options import MAX_STOPS, MAX_TOP_LOGPROBS
from loramix.runtime.sampling import BOUNDS
from loramix.server.fields import Body, invalid_field, must_be
from loramix.server.service import Name

NO_LIMIT = 2**31 - 1
"""Largest token limit that is accepted; the context bounds every answer."""
MAX_TEXTS = 256

MOST = int(BOUNDS["top_k"][1])
"""Largest number of tokens in `TopK` and `RepeatLast`."""


def number(setting: str) -> Any:
    """Declare the bounds of a `Sampling` setting."""
    low, high = BOUNDS[setting]
    return must_be(f"a number from {low:g} to {high:g}", ge=low, le=high, allow_inf_nan=False)


Model = Annotated[Name, must_be("a model's name, as /v1/models lists them")]
Flag = Annotated[bool, must_be("true or false")]
Text = Annotated[str, must_be("text")]
Share = Annotated[float, number("top_p")]
Penalty = Annotated[float, number("presence_penalty")]
RepeatPenalty = Annotated[float, number("repeat_penalty")]
TopK = Annotated[int, must_be(f"a whole number from 1 to {MOST}, or 0 or -1 for all tokens", ge=-1, le=MOST)]
RepeatLast = Annotated[
    int, must_be(f"a whole number from 0 to {MOST}, or -1 for the context", ge=-1, le=MOST)
]
Seed = Annotated[int, must_be("a whole number of 64 bits, or -1 for a random seed", ge=-(2**63), lt=2**63)]
TopLogprobs = Annotated[
    int, must_be(f"a whole number from 0 to {MAX_TOP_LOGPROBS}", ge=0, le=MAX_TOP_LOGPROBS)
]
Dimensions = Annotated[
    int, must_be("a whole number from 1 to the length of the base's vectors", ge=1, le=NO_LIMIT)
]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _stops(value: Any) -> Any:
    return [] if value == "" else _listed(value)


def _texts(value: Any) -> Any:
    if isinstance(value, list):
        for item in value:
            if isinstance(item, int | list):
                raise invalid_field("holds token ids of another tokenizer; send the text.")
    return _listed(value)


def _limit(value: int) -> int:
    if value == 0:
        raise ValueError
    return value


Limit = Annotated[
    int,
    AfterValidator(_limit),
    must_be(f"a whole number from 1 to {NO_LIMIT}, or -1 for no limit", ge=-1, le=NO_LIMIT),
]
NumPredict = Annotated[
    int, must_be(f"a whole number from -2 to {NO_LIMIT}, 0 and less for no limit", ge=-2, le=NO_LIMIT)
]
StopText = Annotated[str, must_be("a text of 1 to 256 characters", min_length=1, max_length=256)]
Stop = Annotated[
    list[StopText],
    BeforeValidator(_stops),
    must_be(f"a text or a list of at most {MAX_STOPS}, of 1 to 256 characters each", max_length=MAX_STOPS),
]
Texts = Annotated[
    list[str],
    BeforeValidator(_texts),
    must_be(f"a text or a list of 1 to {MAX_TEXTS}", min_length=1, max_length=MAX_TEXTS),
]


class SamplerSettings(Body):
    """Sampler settings with the same names and bounds in both protocols."""

    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repeat_penalty: RepeatPenalty | None = None
    repeat_last_n: RepeatLast | None = None


def sampling_of(body: SamplerSettings, choice: int = 0) -> dict[str, int | float]:
    """Return the `Sampling` settings of a body; absent fields keep their defaults (greedy).

    Args:
        body: request body; fields that it lacks are not set.
        choice: index of the choice, added to the seed so that choices differ.
    """
    found = {name: value for name in BOUNDS if (value := getattr(body, name, None)) is not None}
    if found.get("top_k") == -1:
        found["top_k"] = 0
    if found.get("repeat_last_n") == -1:
        found["repeat_last_n"] = MOST  # more than any context holds
    if found.get("seed") == -1:
        del found["seed"]
    elif "seed" in found:
        found["seed"] = (found["seed"] + choice) % 2**63
    return found


def limit_of(requested: int | None, n_ctx: int) -> int | None:
    """Return the longest answer in tokens; None means the skill's own limit.

    Args:
        requested: limit from the request; 0 or negative means up to the context's size.
        n_ctx: context size in tokens.
    """
    if requested is None:
        return None
    return min(requested, n_ctx) if requested > 0 else n_ctx
