"""Reads a message as words that ask for skills, connecting words, and one text, from the tags of its words.

Pure: knows probabilities and the message, but not how a gate reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from loramix.defaults import BASE
from loramix.models.message_units import Units
from loramix.models.step_order import Ask
from loramix.models.tag_path import best_path
from loramix.models.text_frame import Span, cuts_quotation, only_quotation, unframed

OTHER, TEXT, ANSWER = "other", "text", "answer"
"""Tags that are no class: connecting words, the text, and words for the answer of the step before."""
NO_SKILL = (OTHER, TEXT, ANSWER, BASE)
SURE, LIKELY = 0.3, 0.2
"""Least mean probability of a tag over the words that ask for a skill, and least probability of the skill's class."""
CLEAR = 0.6
"""The same of a tag that needs no other word for it."""
SURE_TEXT = 0.5
"""Least mean probability of the text's tag over its words."""
SURE_AROUND = 0.7
"""The same of words around the message's only quotation: below it they are an instruction, and the quotation is all.
"""
TOGETHER = 0.25
"""A skill is also asked for where the first of the two, times the root of the second, is at least this."""
HINTED = 0.1
"""Least mean probability of a skill's tag over a clause that asks for it by itself."""
LOST_WORDS, GAP_WORDS = 5, 2
"""Expected number of words outside the text that belong to it, and number of consecutive words in it that rather do
not, above which the message is not split."""
SHORTEST = 3
"""Fewest characters that ask for a skill: "or" is no request."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive units of one tag."""

    name: str
    first: int
    last: int
    chance: float
    """Mean probability of the tag over its words."""

    def characters(self, units: Units) -> Span:
        """Where it is in the message."""
        return units.spans[self.first][0], units.spans[self.last][1]


@dataclass(frozen=True, slots=True)
class MessageReading:
    """A message as words around a text."""

    message: str
    units: Units
    names: Sequence[str]
    """The tags."""
    runs: list[Run]
    texts: list[Span]
    """Where the text is, without its frame; twice where it is repeated."""
    is_whole: bool
    """Whether the text is sure, and nothing is lost."""

    def holds(self, words: Span) -> bool:
        """Whether most of some words are part of the text."""
        first, last = words
        return any(2 * (min(last, end) - max(first, start)) > last - first for start, end in self.texts)

    def asks(self, classes: Mapping[str, float]) -> list[Ask]:
        """Which skills are surely asked for by the words around the text, and where."""
        places = [(run, run.characters(self.units)) for run in self.runs if run.name not in NO_SKILL]
        outside = [(run, words) for run, words in places if not self.holds(words)]
        asked = {run.name for run, _ in outside if _is_asked(run, classes)}
        return [(run.name, words) for run, words in outside if run.name in asked]

    def is_clear(self, asks: Sequence[Ask], classes: Mapping[str, float]) -> bool:
        """Whether the tags alone are sure of each skill that is asked for, in one place each."""
        names, chances = {name for name, _ in asks}, {run.name: run.chance for run in self.runs}
        return len(names) == len(asks) and all(
            chances[name] >= CLEAR and classes.get(name, 0.0) >= LIKELY for name in names
        )

    def hints_at(self, ask: Ask) -> bool:
        """Whether the tags of some words say at least a little that they ask for a skill: background has none."""
        skill, words = ask
        return self.units.chance_within(self.names.index(skill), words) >= HINTED


def read_message(units: Units, names: Sequence[str], message: str, blocks: int) -> MessageReading | None:
    """Find the most probable reading of a message with the text in so many places.

    Args:
        units: its words with their tags.
        names: the tags.
        message: the message.
        blocks: how often the text stands there, 1 or 2.

    Returns:
        The reading; None if there is no such text, one that cuts a quotation, or two texts that differ.
    """
    if not units.spans:
        return None
    runs = _runs(units, names, blocks)
    parts = [_with_doubtful(runs, place) for place, run in enumerate(runs) if run.name == TEXT]
    if len(parts) != blocks:
        return None
    texts = [unframed(message, (units.spans[first][0], units.spans[last][1])) for first, last in parts]
    if blocks == 1:
        texts = [_with_quotation(units, list(names).index(TEXT), message, texts[0])]
    if len({" ".join(message[a:b].split()) for a, b in texts}) > 1 or texts[0][0] >= texts[0][1]:
        return None
    if blocks == 1 and cuts_quotation(message, texts[0]):
        return None
    return MessageReading(message, units, names, runs, texts, _is_whole(units, names, runs))


def _with_quotation(units: Units, text: int, message: str, span: Span) -> Span:
    """A text with the rest of the quotation that it cuts; or without the words around it that rather are no text."""
    quotation = only_quotation(message)
    if quotation is None or span[1] <= quotation[0] or quotation[1] <= span[0]:
        return span
    around = (span[0], quotation[0]), (quotation[1], span[1])
    if all(units.chance_within(text, part) < SURE_AROUND for part in around):
        return quotation
    return min(span[0], quotation[0]), max(span[1], quotation[1])


def _runs(units: Units, names: Sequence[str], blocks: int) -> list[Run]:
    """The most probable reading with the text in so many places."""
    path = best_path(units.rows, units.weights, units.known, units.turns, list(names).index(TEXT), blocks)
    runs, at = [], 0
    for tag, group in groupby(path.tolist()):
        last = at + len(list(group)) - 1
        tiny = names[tag] not in NO_SKILL and units.spans[last][1] - units.spans[at][0] < SHORTEST
        runs.append(Run(names[tag], at, last, 0.0 if tiny else units.chance(tag, at, last)))
        at = last + 1
    return runs


def _with_doubtful(runs: Sequence[Run], place: int) -> Span:
    """First and last unit of a text, with words next to it that may ask for something: no part of it may be lost."""
    first = last = place
    while first and _is_doubtful(runs[first - 1]):
        first -= 1
    while last + 1 < len(runs) and _is_doubtful(runs[last + 1]):
        last += 1
    return runs[first].first, runs[last].last


def _is_doubtful(run: Run) -> bool:
    return run.name not in (OTHER, TEXT) and 0 < run.chance < SURE


def _is_whole(units: Units, names: Sequence[str], runs: Sequence[Run]) -> bool:
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


def _is_asked(run: Run, classes: Mapping[str, float]) -> bool:
    """Whether tags and class tell together that a skill is asked for."""
    likely = classes.get(run.name, 0.0)
    return run.chance >= SURE and (likely >= LIKELY or run.chance * likely**0.5 >= TOGETHER)
