"""Words and marks of a message with the gate's probabilities of their tags, for `plan`.

Pure: knows tokens by their places in the message only.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import numpy.typing as npt

from loramix.models.tag_path import Floats
from loramix.models.text_frame import Span

MARK = 0.3
"""Weight of a punctuation mark; a word has 1."""

LINE, EDGE, INSIDE = 1.0, 3.0, 7.0
"""Cost, as negative log-probability, of a beginning or end of the text at a new line, at a mark, and elsewhere."""

_BREAK = re.compile(r"[:?!.>)<\]\"“”„«»`'’*|-]")
_APOSTROPHE = re.compile(r"(?<=\w)['’](?=\w)")
_MARKS = r"!-/:-@\[-`{-~«»‘-‟、-〟！-／：-＠"
_IDEOGRAPHS = r"⺀-⿟぀-鿿가-힣"
_UNIT = re.compile(rf"([{_MARKS}])|[{_IDEOGRAPHS}]|[^\s{_MARKS}{_IDEOGRAPHS}]+")


@dataclass(frozen=True, slots=True)
class Units:
    """Words, marks and parts that the gate did not read, in the message's order."""

    spans: list[Span]
    rows: Floats
    """(U, N) probabilities of the tags."""
    weights: Floats
    """(U,): 1 for a word, `MARK` for a mark."""
    known: npt.NDArray[np.bool_]
    """(U,): whether the gate read it."""
    turns: Floats
    """(U + 1,) cost of a beginning or end of the text before each of them, and behind the last one."""

    def chance(self, tag: int, first: int, last: int) -> float:
        """Mean probability of a tag over the words from ``first`` to ``last``; 0 without words."""
        words = (self.weights[first : last + 1] == 1) & self.known[first : last + 1]
        return float(self.rows[first : last + 1, tag][words].mean()) if words.any() else 0.0

    def chance_within(self, tag: int, part: Span) -> float:
        """Mean probability of a tag over the words between two places of the message; 0 without words."""
        start, end = part
        inside = [i for i, (first, last) in enumerate(self.spans) if start <= first and last <= end]
        return self.chance(tag, inside[0], inside[-1]) if inside else 0.0

    def longest_gap(self, tag: int, first: int, last: int) -> int:
        """Most consecutive words from ``first`` to ``last`` that rather have another tag."""
        part = slice(first, last + 1)
        words = self.rows[part, tag][(self.weights[part] == 1) & self.known[part]] >= 0.5
        return max((len(list(group)) for fits, group in groupby(words.tolist()) if not fits), default=0)


def units_of(tags: Floats, places: Sequence[Span | None], message: str) -> Units:
    """Words and marks with the mean of their tokens' probabilities; neighbours that were not read become one."""
    found = list(_UNIT.finditer(message))
    starts = [match.start() for match in found]
    sums, overlaps = np.zeros((len(found), tags.shape[1])), np.zeros(len(found))
    for row, place in zip(tags, places, strict=True):
        if place is None:
            continue
        i = max(0, bisect_right(starts, place[0]) - 1)
        while i < len(found) and starts[i] < place[1]:
            overlap = min(place[1], found[i].end()) - max(place[0], starts[i])
            if overlap > 0:
                sums[i] += overlap * row
                overlaps[i] += overlap
            i += 1
    spans, kept = list[Span](), list[int]()
    for i, match in enumerate(found):
        if kept and not overlaps[i] and not overlaps[kept[-1]]:
            spans[-1] = (spans[-1][0], match.end())
            continue
        spans.append(match.span())
        kept.append(i)
    known = overlaps[kept] > 0
    rows = sums[kept] / np.where(known, overlaps[kept], 1)[:, None]
    weights = np.asarray([MARK if found[i][1] else 1.0 for i in kept])
    return Units(spans, rows, weights, known, _turns(message, spans))


def _turns(message: str, spans: Sequence[Span]) -> Floats:
    """How unlikely it is that a text begins or ends between two units: least at a new line."""
    costs, within = [EDGE], {match.start() for match in _APOSTROPHE.finditer(message)}
    for (_, end), (following, _) in pairwise(spans):
        beside = _BREAK.search(message[end - 1] + message[following])
        if "\n" in message[end:following]:
            costs.append(LINE)
        elif beside and not within & {end - 1, following}:
            costs.append(EDGE)
        else:
            costs.append(INSIDE)
    return np.asarray([*costs, EDGE])
