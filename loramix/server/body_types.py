"""Field types shared by the request bodies of both protocols, each with the rule shown to clients."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from loramix.server.fields import Body, invalid_field, must_be
from loramix.server.service import Name

NO_LIMIT = 2**31 - 1
"""Largest token limit that is accepted; the context bounds every answer."""
MAX_TEXTS = 256

Model = Annotated[Name, must_be("a model's name, as /v1/models lists them")]
Flag = Annotated[bool, must_be("true or false")]
Text = Annotated[str, must_be("text")]
Share = Annotated[float, must_be("a number from 0 to 1", ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, must_be("a number from -2 to 2", ge=-2, le=2, allow_inf_nan=False)]
RepeatPenalty = Annotated[float, must_be("a number from 0.01 to 100", ge=0.01, le=100, allow_inf_nan=False)]
TopK = Annotated[
    int, must_be("a whole number from 1 to 1000000, or 0 or -1 for all tokens", ge=-1, le=1_000_000)
]
RepeatLast = Annotated[
    int, must_be("a whole number from 0 to 1000000, or -1 for the context", ge=-1, le=1_000_000)
]
Seed = Annotated[int, must_be("a whole number of 64 bits, or -1 for a random seed", ge=-(2**63), lt=2**63)]
TopLogprobs = Annotated[int, must_be("a whole number from 0 to 20", ge=0, le=20)]
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
    must_be("a text or a list of at most 16, of 1 to 256 characters each", max_length=16),
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
    names = (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repeat_penalty",
        "repeat_last_n",
        "presence_penalty",
        "frequency_penalty",
        "seed",
    )
    found = {name: value for name in names if (value := getattr(body, name, None)) is not None}
    if found.get("top_k") == -1:
        found["top_k"] = 0
    if found.get("repeat_last_n") == -1:
        found["repeat_last_n"] = 1_000_000  # more than any context holds
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
