"""Splits a request for several things into steps, from the gate's tags of its tokens.

Pure: knows probabilities and the message, but not how a gate reads, nor how a step is answered. A message that does
not fit the form of `message_reading` is not split.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.models.clauses import Read, asked_somewhere, is_refused, read_clauses, spans_of
from loramix.models.message_reading import (
    ANSWER,
    NO_SKILL,
    SURE,
    TEXT,
    TOGETHER,
    MessageReading,
    read_message,
)
from loramix.models.message_units import units_of
from loramix.models.step_order import CLAUSE_END, Ask, in_order
from loramix.models.text_frame import Span, names_answer, names_text, without_texts

MAX_STEPS = 3
CLAUSE_CHARACTERS = 80
"""Of a clause that are looked at around words that ask for a skill."""


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


def may_be_split(names: Sequence[str], classes: Mapping[str, float]) -> bool:
    """Whether two skills are likely enough for a plan: a cheap test before `find_plan`.

    Args:
        names: the gate's tags.
        classes: the gate's probability by skill.
    """
    return TEXT in names and len(_possible(names, classes)) >= 2


def _possible(names: Sequence[str], classes: Mapping[str, float]) -> list[str]:
    """The skills that are likely enough for a step."""
    return [
        name for name, p in classes.items() if name in names and name not in NO_SKILL and p >= TOGETHER**2
    ]


def find_plan(
    tags: npt.ArrayLike,
    names: Sequence[str],
    places: Sequence[Span | None],
    message: str,
    classes: Mapping[str, float],
    free: Collection[str],
    follows: Mapping[str, Collection[str]] | None = None,
    read: Read | None = None,
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
        read: says what a message of its own asks for. With it the clauses of a message decide: which skills are asked
            for where the tags do not tell, and whether those that the tags tell are.

    Returns:
        Two or three steps in the order in which they are carried out; empty if the message is answered as one.
    """
    if not may_be_split(names, classes):
        return ()
    units = units_of(np.asarray(tags, np.float64), places, message)
    readings = [one for blocks in (1, 2) if (one := read_message(units, names, message, blocks))]
    if not readings:
        return ()
    tagged, by_tags = list[Ask](), tuple[Step, ...]()
    if whole := next((one for one in readings if one.is_whole), None):
        tagged = whole.asks(classes)
        by_tags = _steps(whole, tagged, in_order(tagged, message, whole.texts), free, follows or {})
    if read is None or (whole and by_tags and whole.is_clear(tagged, classes) and not _refused(whole)):
        return by_tags
    clauses, asks = read_clauses(message, readings[-1].texts, _possible(names, classes), read)
    asks = [ask for ask in asks if readings[-1].hints_at(ask)]
    order = in_order(asks, message, readings[-1].texts, tagged)
    if len(order) > MAX_STEPS:
        return ()
    by_clauses = _steps(readings[-1], asks, order, free, follows or {})
    is_confirmed = bool(by_tags) and all(asked_somewhere(step.skill, clauses) for step in by_tags)
    if is_confirmed and {step.skill for step in by_tags} != {step.skill for step in by_clauses}:
        return by_tags
    return by_clauses


def _steps(
    reading: MessageReading,
    asks: Sequence[Ask],
    order: Sequence[str],
    free: Collection[str],
    follows: Mapping[str, Collection[str]],
) -> tuple[Step, ...]:
    """The steps of the skills that are asked for; none of too few or too many."""
    if not 2 <= len(order) <= MAX_STEPS:
        return ()
    message, span = reading.message, reading.texts[0]
    steps = [Step(name, message[slice(*span)], span) for name in order]
    answers = [
        run.characters(reading.units) for run in reading.runs if run.name == ANSWER and run.chance >= SURE
    ]
    refused = _refused(reading) if answers else []
    for words in answers:
        if not any(start <= words[0] < end for start, end in refused):
            _let_follow(steps, _owner(reading, asks, words), free, is_moved=order[0] != asks[0][0])
    return _following(steps, _words(asks, message, reading.texts), free, follows)


def _refused(reading: MessageReading) -> list[Span]:
    """The clauses that say what is not wanted."""
    return [
        part for part in spans_of(reading.message, reading.texts) if is_refused(reading.message[slice(*part)])
    ]


def _owner(reading: MessageReading, asks: Sequence[Ask], words: Span) -> str:
    """The skill of the step that words for an answer belong to.

    Of skills whose words are around or next to them the later one; else the next one on this side of the text, or the
    one before.
    """
    message, (first, last) = reading.message, words
    if beside := [
        skill
        for skill, (start, end) in asks
        if not (message[end:first].strip() or message[last:start].strip())
    ]:
        return beside[-1]
    before = [skill for skill, (_, end) in asks if end <= first]
    behind = [(start, skill) for skill, (start, _) in asks if start >= last]
    ends = min((start for start, _ in reading.texts if start >= last), default=len(message))
    if behind and (behind[0][0] < ends or not before):
        return behind[0][1]
    return before[-1]


def _let_follow(steps: list[Step], skill: str, free: Collection[str], is_moved: bool) -> None:
    """Let a skill's step work on the answer before it; if it is mentioned first, the next one is carried out first.

    ``is_moved`` says that the words for the order have already put another skill first.
    """
    place = next(i for i, step in enumerate(steps) if step.skill == skill)
    source = 1 if place == 0 else place - 1
    if steps[source].skill not in free:
        return  # a label is no text: the words stand for the text after all
    if place == 0:
        if is_moved or steps[1].on_answer:
            return
        steps[0], steps[1], place = steps[1], steps[0], 1
    steps[place] = replace(steps[place], on_answer=True)


def _words(asks: Sequence[Ask], message: str, texts: Sequence[Span]) -> dict[str, str]:
    """The words that ask for each skill, to the ends of their clauses."""
    message = without_texts(message, texts)
    found: dict[str, str] = {}
    for skill, (start, end) in asks:
        before = re.split(CLAUSE_END, message[max(0, start - CLAUSE_CHARACTERS) : start])[-1]
        behind = re.split(CLAUSE_END, message[end : end + CLAUSE_CHARACTERS])[0]
        found[skill] = f"{found.get(skill, '')} {before}{message[start:end]}{behind}"
    return found


def _following(
    steps: Sequence[Step],
    asks: Mapping[str, str],
    free: Collection[str],
    follows: Mapping[str, Collection[str]],
) -> tuple[Step, ...]:
    """Let steps work on the answer before if their words say so, or their skill does so by itself.

    "Summarize it and list the names in the summary"; "summarize, then put it in French".
    """
    found = list(steps)
    for i, (before, step) in enumerate(pairwise(steps), 1):
        if before.skill in free:
            words = asks[step.skill]
            own = before.skill in follows.get(step.skill, ()) and not names_text(words)
            found[i] = replace(step, on_answer=step.on_answer or own or names_answer(words))
    return tuple(found)
