"""Prompt → features → gate → mix, with the reason in a sentence.

Knows the gate and the policies; asks for features through a function and never sees llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.defaults import BASE, POLICIES
from loramix.errors import InvalidArtifact, InvalidMix, UsageError
from loramix.formats.validate import BaseShape
from loramix.models import mixing
from loramix.models.gate_numpy import NumpyGate
from loramix.models.mixing import Mix
from loramix.pack.pack import Pack

MixLike = Mix | str | Mapping[str, float]


@dataclass(frozen=True)
class Route:
    """Which mix answers a prompt, and why."""

    mix: dict[str, float]
    """``{skill: scale}``; empty for the bare base. Where several mixes answer in turn, the first."""
    probabilities: dict[str, float]
    """The gate's probability per skill and for ``base``; empty where no gate was asked."""
    reason: str
    policy: str
    then: tuple[dict[str, float], ...] = ()
    """Mixes that answer after it, each on a line of its own."""
    timings: dict[str, float] = field(default_factory=dict, compare=False)
    """Seconds: ``features`` (a pass of the base over the prompt) and ``gate``."""

    @property
    def key(self) -> Mix:
        """The mix as the hashable value that contexts are kept by."""
        return Mix.of(self.mix)

    @property
    def steps(self) -> tuple[Mix, ...]:
        """All mixes that answer, in turn."""
        return (self.key, *map(Mix.of, self.then))

    @property
    def mix_text(self) -> str:
        """The mixes in words: ``summarize=1, then sentiment=1``."""
        return ", then ".join(map(str, self.steps))

    def to_json(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "mix": self.mix,
            "then": list(self.then),
            "probabilities": {name: round(p, 4) for name, p in self.probabilities.items()},
            "reason": self.reason,
            "policy": self.policy,
        }


class Router:
    """Chooses a mix per prompt.

    Args:
        skills: the pack's skills, in the manifest's order.
        gate: reads features; None where the pack has no gate.
    """

    def __init__(self, skills: Sequence[str], gate: NumpyGate | None) -> None:
        self.skills, self.gate = tuple(skills), gate

    @classmethod
    def of(cls, pack: Pack, shape: BaseShape) -> Router:
        """A router on a pack's gate.

        Args:
            pack: its skills and its gate, if it has one.
            shape: of the base.

        Raises:
            InvalidArtifact: the gate reads layers that the base does not have.
        """
        gate = pack.gate()
        if gate is not None:
            width = len(gate.info.layers) * len(gate.info.pooling.split("+")) * shape.n_embd
            if max(gate.info.layers) >= shape.n_layer or gate.n_features != width:
                raise InvalidArtifact(
                    f"the gate of {pack.name} reads layers {gate.info.layers} in {gate.n_features} numbers; the "
                    f"base has {shape.n_layer} layers of {shape.n_embd}: run 'loramix train gate'."
                )
        return cls([skill.name for skill in pack.skills], gate)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that the gate needs tapped."""
        return tuple(self.gate.info.layers) if self.gate else ()

    def fixed(self, mix: Mix) -> Route:
        """The route of a mix that the user chose."""
        named = f"the mix {mix} was asked for" if mix else "the bare base was asked for"
        return Route(mix.scales, {}, named, "fixed" if mix else BASE)

    def decide(self, features: npt.NDArray[np.float32], policy: str) -> Route:
        """Choose a mix from a prompt's features.

        Args:
            features: (D,) float32, as the gate was trained on.
            policy: ``each``, the default, the likeliest skill, and where a second one is likely too, it answers
                after that on a line of its own; ``top1``, the likeliest skill alone; ``blend``, the likely ones mixed
                in proportion; ``token``, two of them mixed as the gate reads each token.

        Raises:
            UsageError: an unknown policy.
        """
        if self.gate is None:
            raise InvalidArtifact(
                "the pack has no gate: name a skill with --mix, or run 'loramix train gate'."
            )
        probabilities = self.gate.probabilities(features)
        names, threshold = self.gate.info.skills, self.gate.info.threshold
        then: list[Mix] = []
        if policy == "top1":
            mix = mixing.top1(probabilities, names, threshold)
        elif policy in ("blend", "token"):
            top_k = mixing.GATE_TOP_K if policy == "blend" else 2
            mix = mixing.blend(probabilities, names, threshold=threshold, top_k=top_k)
        elif policy == "each":
            mix, *then = mixing.each(probabilities, names, threshold=threshold)
        else:
            raise UsageError(f"policy {policy!r} is unknown; use one of {', '.join(POLICIES)}.")
        table = dict(zip([*names, BASE], map(float, probabilities), strict=True))
        reason = _reason(mix, then, table, threshold)
        if policy == "token" and len(mix.scales) > 1:
            reason += " to begin with, then token by token"
        return Route(mix.scales, table, reason, policy, tuple(step.scales for step in then))


def _reason(mix: Mix, then: Sequence[Mix], table: dict[str, float], threshold: float) -> str:
    skills = {name: p for name, p in table.items() if name != BASE}
    best = max(skills, key=lambda name: skills[name], default="")
    if not mix and table[BASE] >= skills.get(best, 0.0):
        return f"no skill fits (base {table[BASE]:.0%}), so the bare base answers"
    if not mix:
        return (
            f"skills reach {1 - table[BASE]:.0%} of the {threshold:.0%} they need, so the bare base answers"
        )
    if then:
        parts = " and ".join(f"{name} ({skills[name]:.0%})" for step in (mix, *then) for name in step.scales)
        return f"{parts} fit, so each answers in turn"
    if len(mix.scales) == 1:
        rest = sorted((n for n in table if n not in mix.scales), key=lambda n: -table[n])[:1]
        other = f"; next is {rest[0]} with {table[rest[0]]:.0%}" if rest else ""
        (only,) = mix.scales
        return f"{only} fits with {table[only]:.0%}{other}"
    parts = " and ".join(f"{name} ({skills[name]:.0%})" for name in mix.scales)
    return f"{parts} fit, blended in that proportion"


def as_mix(mix: MixLike) -> Mix:
    """A mix from its text, from ``{skill: scale}``, or as it is.

    Raises:
        InvalidMix: a scale that is negative, NaN, huge or unreadable.
    """
    if isinstance(mix, Mix):
        return mix
    if isinstance(mix, str):
        return Mix.parse(mix)
    if isinstance(mix, Mapping):
        return Mix.of(dict(mix))
    raise InvalidMix(f"a mix cannot be made from {type(mix).__name__}; write 'sentiment=0.7,summarize=0.3'.")
