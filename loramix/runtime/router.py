"""Chooses a mix from the gate's probabilities under a policy, with a one-sentence reason.

Independent of llama.cpp, and of how a gate reads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.defaults import BASE
from loramix.errors import InvalidArtifact, InvalidMix
from loramix.formats.validate import BaseShape
from loramix.models import mixing
from loramix.models.gate_file import OLD_FORMAT, Gate, check_fits
from loramix.models.mixing import Mix
from loramix.models.old_gate import NumpyGate
from loramix.models.plan import Step
from loramix.pack.pack import Pack

NO_GATE = "the pack has no gate: name a skill with --mix, or run 'loramix train gate'."
_log = logging.getLogger(__name__)
MixLike = Mix | str | Mapping[str, float]


@dataclass(frozen=True)
class Route:
    """The mix that answers a prompt, and the reason."""

    mix: dict[str, float]
    """``{skill: scale}``; empty for the bare base. If several mixes answer in turn, the first of them."""
    probabilities: dict[str, float]
    """The gate's probability per skill and for ``base``; empty if no gate was used."""
    reason: str
    policy: str
    then: tuple[dict[str, float], ...] = ()
    """Mixes that answer after the first, each on its own line."""
    plan: tuple[Step, ...] = ()
    """The steps that the mixes carry out, each with a prompt of its own; empty: all answer the whole prompt."""
    words: tuple[tuple[str, float], ...] = ()
    """Words that the gate looked at most, with their share of its attention; empty if no gate was used."""
    timings: dict[str, float] = field(default_factory=dict, compare=False)
    """Seconds: ``features`` (the base's pass over the prompt) and ``gate``."""

    @property
    def key(self) -> Mix:
        """The first mix as a hashable key."""
        return Mix.of(self.mix)

    @property
    def steps(self) -> tuple[Mix, ...]:
        """All mixes in the order in which they answer."""
        return (self.key, *map(Mix.of, self.then))

    @property
    def named(self) -> str:
        """The mixes as text: ``summarize=1, then sentiment=1``."""
        return ", then ".join(map(str, self.steps))

    @property
    def looked_at(self) -> str:
        """The words as text: ``Summarize (74%), this (3%)``; empty if there are none."""
        return ", ".join(f"{word} ({weight:.0%})" for word, weight in self.words)

    @property
    def step_lines(self) -> list[str]:
        """The steps of the plan as lines of text: ``1. summarize on the text: "The soup … rude" (37 characters)``."""
        found = []
        for number, step in enumerate(self.plan, 1):
            text = "".join(filter(str.isprintable, " ".join(step.text.split())))
            shown = text if len(text) <= 60 else f"{text[:35]} … {text[-20:]}"
            on = (
                f"answer {number - 1}"
                if step.on_answer
                else f'the text: "{shown}" ({len(step.text)} characters)'
            )
            found.append(f"{number}. {step.skill} on {on}")
        return found

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-serializable form."""
        return {
            "mix": self.mix,
            "then": list(self.then),
            "steps": [step.to_json() for step in self.plan],
            "probabilities": {name: round(p, 4) for name, p in self.probabilities.items()},
            "words": [{"word": word, "weight": round(weight, 4)} for word, weight in self.words],
            "reason": self.reason,
            "policy": self.policy,
        }


class Router:
    """Chooses a mix per prompt.

    Args:
        skills: the pack's skills, in the manifest's order.
        gate: the pack's gate, if it has one.
    """

    def __init__(self, skills: Sequence[str], gate: Gate | None) -> None:
        self.skills, self.gate = tuple(skills), gate

    @classmethod
    def of(cls, pack: Pack, shape: BaseShape) -> Router:
        """Create the router of a pack.

        Args:
            pack: the pack, with or without a gate.
            shape: shape of the base.

        Raises:
            InvalidArtifact: the gate does not fit the base's layers.
        """
        gate = pack.gate()
        if gate is not None:
            check_fits(gate, shape, pack.name)
            if isinstance(gate, NumpyGate) and not pack.is_shipped:
                _log.warning("%s.", OLD_FORMAT.format(pack=pack.name))
        return cls([skill.name for skill in pack.skills], gate)

    @property
    def names(self) -> list[str]:
        """Skills in the order of the gate's classes; empty without a gate."""
        return list(self.gate.info.skills) if self.gate else []

    def table(self, probabilities: npt.NDArray[np.float32]) -> dict[str, float]:
        """Return the gate's probability by skill, and of the base.

        Args:
            probabilities: (K + 1,) float32: the skills in the gate's order, then the base.
        """
        return dict(zip([*self.names, BASE], map(float, probabilities), strict=True))

    def fixed(self, mix: Mix) -> Route:
        """Return the route of a mix that the user chose."""
        named = f"the mix {mix} was asked for" if mix else "the bare base was asked for"
        return Route(mix.scales, {}, named, "fixed" if mix else BASE)

    def planned(self, probabilities: npt.NDArray[np.float32], plan: Sequence[Step]) -> Route:
        """Return the route of a plan; each step is answered by its skill at scale 1.

        Args:
            probabilities: (K + 1,) float32: the skills in the gate's order, then the base.
            plan: two steps or more.
        """
        table = self.table(probabilities)
        first, *then = ({step.skill: 1.0} for step in plan)
        parts = [f"{step.skill} on {'that answer' if step.on_answer else 'the text'}" for step in plan]
        reason = f"the request asks for {len(plan)} things: {', then '.join(parts)}"
        return Route(first, table, reason, "each", tuple(then), tuple(plan))

    def decide(self, probabilities: npt.NDArray[np.float32], policy: str) -> Route:
        """Choose a mix from the gate's probabilities for a prompt.

        Args:
            probabilities: (K + 1,) float32: the skills in the gate's order, then the base.
            policy: one of `loramix.defaults.POLICIES` except ``base``; see `loramix.models.mixing.choose`.

        Raises:
            InvalidArtifact: the pack has no gate.
            ValueError: an unknown policy.
        """
        if self.gate is None:
            raise InvalidArtifact(NO_GATE)
        names, threshold = self.gate.info.skills, self.gate.info.threshold
        mix, *then = mixing.choose(policy, probabilities, names, threshold)
        table = self.table(probabilities)
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
    """Convert text or ``{skill: scale}`` to a mix; return a `Mix` unchanged.

    Raises:
        InvalidMix: a scale is negative, NaN, too large or not a number.
    """
    if isinstance(mix, Mix):
        return mix
    if isinstance(mix, str):
        return Mix.parse(mix)
    if isinstance(mix, Mapping):
        return Mix.of(dict(mix))
    raise InvalidMix(f"a mix cannot be made from {type(mix).__name__}; write 'sentiment=0.7,summarize=0.3'.")
