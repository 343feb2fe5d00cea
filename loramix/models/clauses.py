"""Reads a request clause by clause: each one is put to the gate with the text, as a request of its own.

A gate's tags overlook skills in long-winded requests; its classes for "and give it a title" with the text do not.
Pure: knows where the text is, and asks for a message's classes, but not how they are found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from loramix.models.step_order import Ask
from loramix.models.text_frame import Span

Read = Callable[[str], Mapping[str, float]]
"""The gate's probability by skill for a message of its own."""

SURE_CLAUSE, LIKELY_CLAUSE = 0.8, 0.3
"""Least probability of a skill that a clause asks for, and of one that tags have already found."""
MOST_CLAUSES = 10
TEXT_WORDS = 16
"""Words of the text that are read with each clause."""

# each white space is matched from its beginning alone, so that long ones cost no more than short ones
_CUT = re.compile(
    r"(?<=[.;:?!,)|&+])\s+"
    r"|(?<!\s)\s+(?=(?:and|then|but|before|after|plus|also|once|(?:(?:along|together)\s+)?with|as\s+well\s+as|without"
    r"|et|puis|sans|und|ohne|&|\+)(?!\w))"
    r"|(?<!\s)\s+[—–|-]+\s+|(?<!\s)\s*\n\s*",
    re.IGNORECASE,
)
_LEADING = re.compile(
    r"\A(?:[\s,;:.!?)—–\"'”|&+-]+|(?:and|then|but|also|plus|et|puis|first|second|secondly|next|finally)\b)+",
    re.IGNORECASE,
)
_REFUSED = re.compile(
    r"\A(?:(?:so|but|please)\s+)*(?:no|without|sans|ohne|kein\w*|pas\s+(?:de|besoin)|needn['’]?t)\b"
    r"|\b(?:do|does|did)(?:n['’]?t|\s+not)\s+(?:\w+\s+)?(?:need|want|require|care|bother|translate|summari[sz]e|shorten"
    r"|list|name|give|add|write)\b"
    r"|\bnot\s+(?:what|after|interested|necessary|needed|required|asking)\b",
    re.IGNORECASE,
)
_UNTIL = re.compile(r"\b(?:until|till|unless|before)\b", re.IGNORECASE)
_WORD = re.compile(r"\w{2}")


@dataclass(frozen=True, slots=True)
class Clause:
    """A clause, or two that follow each other, and what the gate says of it."""

    span: Span
    classes: Mapping[str, float]

    def asks_for(self, likely: Collection[str]) -> str | None:
        """The skill that it surely asks for, among likely ones."""
        skill = max(self.classes, key=self.classes.__getitem__)
        return skill if skill in likely and self.classes[skill] >= SURE_CLAUSE else None


def spans_of(message: str, texts: Sequence[Span]) -> list[Span]:
    """Cut what stands around a text at marks, new lines and joining words.

    Args:
        message: the message.
        texts: where the text is, in the message's order.

    Returns:
        Characters of each clause; what has no word of two letters belongs to the clause before.
    """
    found, at = list[Span](), 0
    for start, end in [*texts, (len(message), len(message))]:
        part, first = message[at:start], len(found)
        places = [0, *(match.end() for match in _CUT.finditer(part)), len(part)]
        for a, b in pairwise(places):
            if _WORD.search(_LEADING.sub("", part[a:b])):
                found.append((at + a, at + b))
            elif len(found) > first:
                found[-1] = found[-1][0], at + b
        at = end
    return found


def is_refused(clause: str) -> bool:
    """Whether words of a request, in English, French or German, say what is not wanted: "no translation needed"."""
    words = _LEADING.sub("", clause)
    return bool(_REFUSED.search(words)) and not _UNTIL.search(words)


def with_text(clause: str, text: str) -> str:
    """A clause with the first words of the text, as a request of its own."""
    return f"{_LEADING.sub('', clause)}\n\n{' '.join(text.split()[:TEXT_WORDS])}".strip()


def read_clauses(
    message: str, texts: Sequence[Span], likely: Collection[str], read: Read
) -> tuple[list[Clause], list[Ask]]:
    """Read each clause with the text, and two together where neither is clear by itself.

    Args:
        message: the message.
        texts: where the text is.
        likely: skills that may be asked for.
        read: says what a message asks for.

    Returns:
        What was read, and the surest clause of each skill that is asked for, in the message's order; nothing of a
        request of one clause or very many. Clauses that say what is not wanted are left out.
    """
    every = spans_of(message, texts)
    spans = [span for span in every if not is_refused(message[slice(*span)])]
    if not (spans and 1 < len(every) <= MOST_CLAUSES):
        return [], []
    text = message[slice(*texts[0])]

    def clause(first: int, last: int) -> Clause:
        words = " ".join(message[slice(*span)].strip() for span in spans[first : last + 1])
        return Clause((spans[first][0], spans[last][1]), read(with_text(words, text)))

    single = [clause(i, i) for i in range(len(spans))]
    pairs = [
        clause(i, i + 1)
        for i, (one, following) in enumerate(pairwise(single))
        if not (one.asks_for(likely) or following.asks_for(likely))
    ]
    clauses = [*single, *pairs]
    surest: dict[str, Clause] = {}
    for one in clauses:
        if (skill := one.asks_for(likely)) and (
            skill not in surest or one.classes[skill] > surest[skill].classes[skill]
        ):
            surest[skill] = one
    return clauses, sorted(((skill, one.span) for skill, one in surest.items()), key=lambda ask: ask[1])


def asked_somewhere(skill: str, clauses: Sequence[Clause]) -> bool:
    """Whether some clause may ask for a skill; true of all skills where no clause was read."""
    return not clauses or any(one.classes.get(skill, 0.0) >= LIKELY_CLAUSE for one in clauses)
