"""In which order the steps of a request are carried out, where its words do not follow that order.

"Before you translate it, say whether it is positive": what is mentioned first comes second. Pure: knows where in a
message each skill is asked for, and a few English and French words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from loramix.models.text_frame import Span

Ask = tuple[str, Span]
"""A skill, and the characters of the message that ask for it."""

_BEFORE = re.compile(r"\b(?:before|prior to|avant)\b", re.IGNORECASE)
_AFTER = re.compile(r"\b(?:after|once|après)\b", re.IGNORECASE)
_UNTIL = re.compile(r"\b(?:until|till|unless)\b", re.IGNORECASE)
_BUT_FIRST = re.compile(r"\b(?:but|though|mais)\b(?=[^.!?\n:]{0,80}\b(?:first|d['’]abord)\b)", re.IGNORECASE)
_NOT = re.compile(r"\b(?:not|never|nothing|no|[a-z]+n['’]?t)\b", re.IGNORECASE)
_THAT = re.compile(
    r"\s+(?:(?:you|i|we)(?:['’]ve|\s+have)?\s+(?:do|does|done|did|start|begin)\s+|doing\s+|having\s+done\s+)?"
    r"(?:that|this|it|so|which|cela|ça)\b",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"[.!?\n]")


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
    for start, end in texts:
        message = message[:start] + "\n" * (end - start) + message[end:]
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
    for match in _BEFORE.finditer(message):
        that = _THAT.match(message, match.end())
        ahead, behind = _around(asks, message, match, any_sentence=bool(that))
        if that:  # "summarize it, but before that translate it"
            if ahead and behind:
                yield behind[0], ahead
        elif len(behind) > 1 and ahead in (None, behind[0]):  # "before you summarize it, translate it"
            yield behind[1], behind[0]
    for pattern in (_AFTER, _UNTIL, _BUT_FIRST):  # "translate it after summarizing it"
        for match in pattern.finditer(message):
            ahead, behind = _around(asks, message, match, any_sentence=pattern is _BUT_FIRST)
            if not ahead or not behind or _THAT.match(message, match.end()):
                continue
            if pattern is not _UNTIL or _NOT.search(_sentence(message, match.start())):
                yield behind[0], ahead


def _around(
    asks: Sequence[Ask], message: str, word: re.Match[str], any_sentence: bool = False
) -> tuple[str | None, list[str]]:
    """The last skill before a word in its sentence, or in the message, and the skills behind it.

    The words of an ask may reach over the word; they count as before it if some of them but one stand there.
    """
    begin = 0 if any_sentence else word.start() - len(_sentence(message, word.start()))
    ahead, behind = None, list[str]()
    for skill, (start, end) in asks:
        if len(message[start : word.start()].split()) > 1 or end <= word.start():
            ahead = skill if end > begin else None
        elif not behind or behind[-1] != skill:
            behind.append(skill)
    return ahead, behind


def _sentence(message: str, end: int) -> str:
    """What stands before a place in its sentence."""
    return _SENTENCE.split(message[:end])[-1]
