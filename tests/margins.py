"""How far prompts are from another answer: from what routing compares them with, and from another greedy token.

Kernels for other instruction sets round otherwise. What is shown, recorded or tested must not depend on that.
"""

from __future__ import annotations

import math
import shlex
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

from loramix import Engine
from loramix.cli import main
from loramix.defaults import BASE, DEFAULT_PACK, DEFAULT_POLICY
from loramix.models import clauses, message_reading
from loramix.models import plan as plans
from loramix.models.mixing import FLOOR, SECOND
from loramix.runtime.router import Route
from loramix.runtime.sampling import Sampler

COMMANDS = ("run", "route")
ROUTE_MARGIN = 0.1
"""Least distance of a probability from a threshold or a floor."""
RIVAL_MARGIN = 0.05
"""Least distance between the two likeliest skills, where the order of the answers depends on it."""
TOKEN_MARGIN = 0.5
"""Least distance in logits of a greedy token from the second one; kernels were seen to move it by up to 0.3."""
PLAN_THRESHOLDS = {
    message_reading: ("SURE", "LIKELY", "TOGETHER", "SURE_TEXT", "SURE_AROUND", "CLEAR"),
    plans: ("SURE", "TOGETHER"),
    clauses: ("SURE_CLAUSE", "LIKELY_CLAUSE"),
}
"""What plans are decided by, where it is compared."""
SCALE_TOLERANCE = 0.1
"""How far kernels may move a blend's scales, and a probability, before a test calls it another one."""


@dataclass(frozen=True)
class Asked:
    """A prompt as the default pack is asked it.

    Args:
        where: file and name, for messages.
        prompt: text or messages.
        options: of `Engine.stream`.
        answered: False where it is routed only.
    """

    where: str
    prompt: Any
    options: dict[str, Any] = field(default_factory=dict)
    answered: bool = True


def route_margins(route: Route, threshold: float) -> list[tuple[str, float, float]]:
    """What decided a route, how far apart it was, and how far it must be.

    Args:
        route: of `Engine.route`.
        threshold: of the gate.

    Returns:
        (comparison, distance, least distance) of each comparison; none where no gate was asked.
    """
    if not route.probabilities:
        return []
    base = route.probabilities[BASE]
    ranked = sorted(((p, name) for name, p in route.probabilities.items() if name != BASE), reverse=True)
    (best, first), *others = ranked
    together = 1 - base
    found = [
        (f"all skills at {together:.3f}, threshold {threshold:g}", abs(together - threshold), ROUTE_MARGIN)
    ]
    if len(route.plan) > 1:  # see `plan_margins`
        return []
    if not route.mix:  # the reason says which is larger
        return [*found, (f"base at {base:.3f}, {first} at {best:.3f}", abs(base - best), RIVAL_MARGIN)]
    if route.policy in ("each", "top1") and others:
        second, other = others[0]
        found.append((f"{first} at {best:.3f}, {other} at {second:.3f}", best - second, RIVAL_MARGIN))
    floor = {"blend": FLOOR, "token": FLOOR, "each": SECOND}.get(route.policy)
    if floor is not None:
        found += [(f"{name} at {p:.3f}, floor {floor:g}", abs(p - floor), ROUTE_MARGIN) for p, name in others]
    return found


def plan_margins(engine: Engine, asked: Asked, route: Route) -> list[str]:
    """What a plan's thresholds, moved by `ROUTE_MARGIN`, would make of a prompt's steps; empty where they stay.

    Args:
        engine: of the pack.
        asked: the prompt.
        route: its route.
    """
    found = []
    for shift in (-ROUTE_MARGIN, ROUTE_MARGIN):
        with ExitStack() as stack:
            for module, names in PLAN_THRESHOLDS.items():
                moved = {name: getattr(module, name) + shift for name in names}
                stack.enter_context(patch.multiple(module, **moved))
            other = engine.route(asked.prompt, policy=route.policy).plan
        if other != route.plan:
            found.append(f"{len(route.plan)} steps, with thresholds moved by {shift:g} {len(other)}")
    return found


def token_margins(engine: Engine, asked: Asked) -> tuple[str, list[tuple[int, float]]]:
    """The answer to a prompt, and by how many logits each of its tokens, or its label, won; its end included.

    Args:
        engine: of the pack.
        asked: a greedy prompt.
    """
    found: list[tuple[int, float]] = []
    pick = Sampler.pick

    def noting(sampler: Sampler, logits: npt.NDArray[np.float32], recent: list[int], n_prompt: int) -> int:
        second, first = np.partition(logits, -2)[-2:]
        token = pick(sampler, logits, recent, n_prompt)
        found.append((token, float(first - second)))
        return token

    with patch.object(Sampler, "pick", noting):
        answer = engine.generate(asked.prompt, **asked.options)
    for labels in answer.step_labels:  # chosen without the sampler
        if len(labels) > 1:
            first, second, *_ = sorted(labels.values(), reverse=True)
            found.append((answer.tokens[0], math.log(first / max(second, 1e-9))))
    return answer.text, found


def offences(engine: Engine, asked: Asked) -> list[str]:
    """What lies too close, in a sentence each; empty where a prompt is safe.

    Args:
        engine: of the pack.
        asked: a prompt.
    """
    gate = engine.router.gate
    assert gate is not None
    policy, mix = asked.options.get("policy", DEFAULT_POLICY), asked.options.get("mix")
    route = engine.route(asked.prompt, policy=policy, mix=mix)
    found = [
        f"{asked.where}: {what}: {distance:.3f} apart, {least:g} needed"
        for what, distance, least in route_margins(route, gate.info.threshold)
        if distance < least
    ]
    if route.policy == "each" and route.probabilities:
        found += [f"{asked.where}: {line}" for line in plan_margins(engine, asked, route)]
    if asked.answered:
        text, tokens = token_margins(engine, asked)
        found += [
            f"{asked.where}: token {number} ({engine.model.text(token)!r}) of {text!r} wins by {margin:.2f} logits, "
            f"{TOKEN_MARGIN:g} needed"
            for number, (token, margin) in enumerate(tokens, 1)
            if margin < TOKEN_MARGIN
        ]
    return found


def asked_by(command: str) -> Asked | None:
    """What a command of a transcript asks the default pack; None where it asks nothing.

    Args:
        command: as it stands behind ``$``.

    Raises:
        ValueError: it cannot be known what is asked, as of a pipe or of another pack.
    """
    words = shlex.split(command)
    if words[0] != "loramix" or words[1] not in COMMANDS:
        if any(f"loramix {name}" in command for name in COMMANDS):
            raise ValueError(
                f"the margins of {command!r} cannot be measured: begin with 'loramix run' or 'route'"
            )
        return None
    context = main.commands[words[1]].make_context(words[1], words[2:])
    given = context.params
    greedy = not given.get("temperature") and given.get("repeat_penalty", 1.0) == 1.0
    if given["pack"] != DEFAULT_PACK or not greedy:
        raise ValueError(f"the margins of {command!r} cannot be measured: another pack, or not greedy")
    options = {name: given[name] for name in ("policy", "mix", "max_tokens") if given.get(name) is not None}
    return Asked(command, " ".join(given["prompt"]), options, answered=words[1] == "run")
