"""Splits a request for several things into steps, from the gate's tags of its tokens.

Pure: knows probabilities and the message, but not how a gate reads, nor how a step is answered. A message is read as
words that ask for skills, connecting words, and one text; what does not fit this form is not split.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.defaults import BASE
from loramix.models.message_units import Units, units_of
from loramix.models.step_order import in_order
from loramix.models.tag_path import best_path
from loramix.models.text_frame import Span, cuts_quotation, names_text, unframed

OTHER, TEXT, ANSWER = "other", "text", "answer"
"""Tags that are no class: connecting words, the text, and words for the answer of the step before."""
_NO_SKILL = (OTHER, TEXT, ANSWER, BASE)
MAX_STEPS = 3
SURE, LIKELY = 0.3, 0.2
"""Least mean probability of a tag over the words that ask for a skill, and least probability of the skill's class."""
SURE_TEXT = 0.5
"""Least mean probability of the text's tag over its words."""
TOGETHER = 0.25
"""A skill is also asked for where the first of the two, times the root of the second, is at least this."""
LOST_WORDS, GAP_WORDS = 5, 2
"""Expected number of words outside the text that belong to it, and number of consecutive words in it that rather do
not, above which the message is not split."""
SHORTEST = 3
"""Fewest characters that ask for a skill: "or" is no request."""


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a request that one skill answers."""

    skill: str
    text: str = ""
    """An exact part of the message; a step on an answer falls back to it if that answer is empty."""
    span: Span = (0, 0)
    """Where it is in the message, in characters."""
    on_answer: bool = False
    """Whether it works on the answer of the step before."""

    def to_json(self) -> dict[str, Any]:
        """Return its JSON form: the skill, and whether it works on the text, at which characters, or on an answer."""
        if self.on_answer:
            return {"skill": self.skill, "on": "answer"}
        return {"skill": self.skill, "on": "text", "text": list(self.span)}


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive units of one tag."""

    name: str
    first: int
    last: int
    chance: float
    """Mean probability of the tag over its words."""

    def characters(self, units: Units) -> Span:
        """Where it is in the message."""
        return units.spans[self.first][0], units.spans[self.last][1]


def may_be_split(names: Sequence[str], classes: Mapping[str, float]) -> bool:
    """Whether two skills are likely enough for a plan: a cheap test before `find_plan`.

    Args:
        names: the gate's tags.
        classes: the gate's probability by skill.
    """
    return (
        TEXT in names
        and sum(p >= TOGETHER**2 for name, p in classes.items() if name in names and name not in _NO_SKILL)
        >= 2
    )


def find_plan(
    tags: npt.ArrayLike,
    names: Sequence[str],
    places: Sequence[Span | None],
    message: str,
    classes: Mapping[str, float],
    free: Collection[str],
    follows: Mapping[str, Collection[str]] | None = None,
) -> tuple[Step, ...]:
    """Split a message into steps.

    Args:
        tags: (T, N) probabilities of the tags of each token that the gate read.
        names: the N tags.
        places: for each token its characters in the message; None for tokens outside it.
        message: the last message of the user.
        classes: the gate's probability by skill.
        free: skills that answer in free text: another step can work on their answers.
        follows: for each skill those on whose answer it works if it is asked for right after them.

    Returns:
        Two or three steps in the order in which they are carried out; empty if the message is answered as one.
    """
    if not may_be_split(names, classes):
        return ()
    units = units_of(np.asarray(tags, np.float64), places, message)
    if not units.spans:
        return ()
    for blocks in (1, 2):
        runs = _runs(units, names, blocks)
        texts = [_with_doubtful(runs, place) for place, run in enumerate(runs) if run.name == TEXT]
        if len(texts) != blocks or not _is_whole(units, names, runs):
            continue
        spans = [unframed(message, (units.spans[first][0], units.spans[last][1])) for first, last in texts]
        if blocks == 1 and cuts_quotation(message, spans[0]):
            continue
        if len({" ".join(message[a:b].split()) for a, b in spans}) == 1 and spans[0][0] < spans[0][1]:
            steps = _steps(runs, units, message, spans, classes, free)
            return _following(steps, _asks(runs, units, message), free, follows or {})
    return ()


def _runs(units: Units, names: Sequence[str], blocks: int) -> list[_Run]:
    """The most probable reading with the text in so many places."""
    path = best_path(units.rows, units.weights, units.known, units.turns, list(names).index(TEXT), blocks)
    runs, at = [], 0
    for tag, group in groupby(path.tolist()):
        last = at + len(list(group)) - 1
        tiny = names[tag] not in _NO_SKILL and units.spans[last][1] - units.spans[at][0] < SHORTEST
        runs.append(_Run(names[tag], at, last, 0.0 if tiny else units.chance(tag, at, last)))
        at = last + 1
    return runs


def _with_doubtful(runs: Sequence[_Run], place: int) -> Span:
    """First and last unit of a text, with words next to it that may ask for something: no part of it may be lost."""
    first = last = place
    while first and _is_doubtful(runs[first - 1]):
        first -= 1
    while last + 1 < len(runs) and _is_doubtful(runs[last + 1]):
        last += 1
    return runs[first].first, runs[last].last


def _is_doubtful(run: _Run) -> bool:
    return run.name not in (OTHER, TEXT) and 0 < run.chance < SURE


def _is_whole(units: Units, names: Sequence[str], runs: Sequence[_Run]) -> bool:
    """Whether the text is sure, and nothing of the message is lost that is not an instruction."""
    text, outside = list(names).index(TEXT), np.ones(len(units.spans), bool)
    for run in runs:
        if run.name == BASE and run.chance >= SURE:  # something that no skill serves
            return False
        if run.name == TEXT:
            outside[run.first : run.last + 1] = False
            if run.chance < SURE_TEXT or not (units.known[run.first] and units.known[run.last]):
                return False
            if units.longest_gap(text, run.first, run.last) > GAP_WORDS:
                return False
    return float((units.rows[:, text] * outside * (units.weights == 1)).sum()) <= LOST_WORDS


def _steps(
    runs: Sequence[_Run],
    units: Units,
    message: str,
    texts: Sequence[Span],
    classes: Mapping[str, float],
    free: Collection[str],
) -> tuple[Step, ...]:
    """The steps of the skills that are surely asked for, in order."""
    asked = {run.name for run in runs if run.name not in _NO_SKILL and _is_asked(run, classes)}
    if not 2 <= len(asked) <= MAX_STEPS:
        return ()
    asks = [(run.name, run.characters(units)) for run in runs if run.name in asked]
    steps = [Step(name, message[slice(*texts[0])], texts[0]) for name in in_order(asks, message, texts)]
    for place, run in enumerate(runs):
        if run.name == ANSWER and run.chance >= SURE:
            _let_follow(steps, _owner(runs, place, asked), free)
    return tuple(steps)


def _is_asked(run: _Run, classes: Mapping[str, float]) -> bool:
    """Whether tags and class tell together that a skill is asked for."""
    likely = classes.get(run.name, 0.0)
    return run.chance >= SURE and (likely >= LIKELY or run.chance * likely**0.5 >= TOGETHER)


def _owner(runs: Sequence[_Run], place: int, asked: Collection[str]) -> str:
    """The skill of the step that words for an answer belong to.

    Of two neighbours the later one; without a neighbour the next one on this side of the text, or the one before.
    """
    if beside := [run.name for run in runs[max(0, place - 1) : place + 2] if run.name in asked]:
        return beside[-1]
    before = [run.name for run in runs[:place] if run.name in asked]
    behind = [run.name for run in runs[place:] if run.name in asked or run.name == TEXT]
    if behind and behind[0] != TEXT:
        return behind[0]
    return before[-1] if before else behind[1]


def _let_follow(steps: list[Step], skill: str, free: Collection[str]) -> None:
    """Let a skill's step work on the answer before it; if it is mentioned first, the next one is carried out first."""
    place = next(i for i, step in enumerate(steps) if step.skill == skill)
    source = 1 if place == 0 else place - 1
    if steps[source].skill not in free:
        return  # a label is no text: the words stand for the text after all
    if place == 0:
        steps[0], steps[1], place = steps[1], steps[0], 1
    steps[place] = replace(steps[place], on_answer=True)


def _asks(runs: Sequence[_Run], units: Units, message: str) -> dict[str, str]:
    """The words of each tag."""
    found: dict[str, str] = {}
    for run in runs:
        words = message[slice(*run.characters(units))]
        found[run.name] = f"{found.get(run.name, '')} {words}"
    return found


def _following(
    steps: Sequence[Step],
    asks: Mapping[str, str],
    free: Collection[str],
    follows: Mapping[str, Collection[str]],
) -> tuple[Step, ...]:
    """Let steps work on the answer before if their skill does so by itself: "summarize, then put it in French"."""
    found = list(steps)
    for i, (before, step) in enumerate(pairwise(steps), 1):
        if before.skill in follows.get(step.skill, ()) and before.skill in free:
            found[i] = replace(step, on_answer=step.on_answer or not names_text(asks[step.skill]))
    return tuple(found)
