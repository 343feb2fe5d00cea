"""In which order the steps of a request are carried out, where its words do not follow that order.

"Before you translate it, say whether it is positive": what is mentioned first comes second. Pure: knows where in a
message each skill is asked for, and a few English and French words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice

from loramix.models.text_frame import Span, without_texts

Ask = tuple[str, Span]
"""A skill, and the characters of the message that ask for it."""

_BEFORE = re.compile(r"\b(?:before|prior to|avant)\b", re.IGNORECASE)
_AFTER = re.compile(r"\b(?:after|once(?!\s+(?:again|more)\b)|(?<!-)après)\b", re.IGNORECASE)
_UNTIL = re.compile(r"\b(?:until|till|unless)\b", re.IGNORECASE)
_BUT_FIRST = re.compile(
    r"\b(?:but|though|mais)\b(?=[^.!?\n:]{0,80}\b(?:first(?!\s+(?:names?|of|one|\w+s)\b)|d['’]abord)\b)",
    re.IGNORECASE,
)
_NOT = re.compile(r"\b(?:not|never|nothing|no|[a-z]+n['’]?t)\b", re.IGNORECASE)
_THAT = re.compile(
    r"\s+(?:(?:you|i|we)(?:['’]ve|\s+have)?\s+(?:do|does|done|did|start|begin)\s+|doing\s+|having\s+done\s+)?"
    r"(?:that|this|it|so|which|cela|ça)\b",
    re.IGNORECASE,
)
_MOST_WORDS = 20
"""Words of each kind that are looked at in a message."""
_SENTENCE = re.compile(r"[.!?\n]")
CLAUSE_END = re.compile(r"[,.;:!?\n]|\b(?:and|then|but|et|puis|mais)\b", re.IGNORECASE)
"""What ends a clause."""
_OTHER_EVENT = re.compile(
    r"\s+(?:(?:any|every)thing\s+else|lunch|dinner|breakfast|noon|midnight|tomorrow|tonight|\w+day|\d"
    r"|(?:you|i|we)\s+(?:reply|answer|respond|leave|go|decide|sign|buy|send|post|meet))\b",
    re.IGNORECASE,
)


def in_order(
    asks: Sequence[Ask], message: str, texts: Sequence[Span], mentions: Sequence[Ask] = ()
) -> list[str]:
    """Return the skills in the order in which they are to be carried out.

    Args:
        asks: what is asked for where, in the message's order; a skill may be mentioned more than once.
        message: the message.
        texts: where the text is, whose words say nothing about the order.
        mentions: where exactly these skills are mentioned, if known; "before" and the like go by them.

    Returns:
        Each skill once: as first mentioned, but for words such as "before", "not until" and "but first".
    """
    message = without_texts(message, texts)
    found = list(dict.fromkeys(skill for skill, _ in asks))
    exact = {skill for skill, _ in mentions}
    places = [ask for ask in mentions if ask[0] in found] + [ask for ask in asks if ask[0] not in exact]
    for earlier, later in _exceptions(sorted(places, key=lambda ask: ask[1]), message):
        i, j = found.index(earlier), found.index(later)
        if i > j:
            found.insert(j, found.pop(i))
    return found


def _exceptions(asks: Sequence[Ask], message: str) -> Iterator[tuple[str, str]]:
    """Pairs of skills of which the first one comes earlier, although it is not mentioned first."""
    for match in islice(_BEFORE.finditer(message), _MOST_WORDS):
        that = _THAT.match(message, match.end())
        ahead, behind = _around(asks, message, match, any_sentence=bool(that))
        if that:  # "summarize it, but before that translate it"
            if ahead and behind:
                yield behind[0], ahead
        elif len(behind) > 1 and ahead in (None, behind[0]):  # "before you summarize it, translate it"
            yield behind[1], behind[0]
    for pattern in (_AFTER, _UNTIL, _BUT_FIRST):  # "translate it after summarizing it"
        for match in islice(pattern.finditer(message), _MOST_WORDS):
            ahead, behind = _around(asks, message, match, any_sentence=pattern is _BUT_FIRST)
            if not ahead or not behind or _THAT.match(message, match.end()):
                continue
            if pattern is not _UNTIL or _NOT.search(_sentence(message, match.start())):
                yield behind[0], ahead


def _around(
    asks: Sequence[Ask], message: str, word: re.Match[str], any_sentence: bool = False
) -> tuple[str | None, list[str]]:
    """The last skill before a word and the skills behind it, in its sentence or in the message.

    The words of an ask may reach over the word; they count as before it if some of them but one stand there. Nothing
    is behind a word that is about something else: "before 5 pm", "after the dinner and …".
    """
    begin = 0 if any_sentence else word.start() - len(_sentence(message, word.start()))
    end = _SENTENCE.search(message, word.end())
    last = len(message) if any_sentence or not end else end.start()
    ahead, behind = None, list[str]()
    for skill, (start, stop) in asks:
        if len(message[start : word.start()].split()) > 1 or stop <= word.start():
            ahead = skill if stop > begin else None
        elif start < last and (not behind or behind[-1] != skill):
            if not behind and not any_sentence and not _is_about(message, word, (start, stop)):
                return ahead, []
            behind.append(skill)
    return ahead, behind


def _is_about(message: str, word: re.Match[str], ask: Span) -> bool:
    """Whether "before" and the like speak of an ask: most of its words stand before the clause ends."""
    if _OTHER_EVENT.match(message, word.end()):
        return False
    end = CLAUSE_END.search(message, word.end())
    limit = end.start() if end else len(message)
    first = max(ask[0], word.end())
    inside, words = len(message[first : min(limit, ask[1])].split()), len(message[first : ask[1]].split())
    return first < limit and 2 * inside > words


def _sentence(message: str, end: int) -> str:
    """What stands before a place in its sentence."""
    return message[1 + max(message.rfind(mark, 0, end) for mark in ".!?\n") : end]
