"""What stands around a text in a message: quotation marks, dashes, code fences, angle brackets; words that name it."""

from __future__ import annotations

import re
from collections.abc import Sequence

Span = tuple[int, int]
_QUOTES = {'"': '"', "“": "”", "„": "“", "«": "»", "‹": "›", "‘": "’", "'": "'", "`": "`", "「": "」"}
_FENCE = re.compile(
    r"(`{3,}|~{3,})[ \t]*[\w+-]*[ \t]*\r?\n|([-=*_#~]{3,}|<{3,}|\|{2,})[ \t]*\r?(?:\n|(?<=[<|])[ \t]*)"
)
_TAIL = re.compile(r"[:;,.?!)\]*=>-]+(?=\s)")  # of the word before
_END = re.compile(r"[.!?…。！？]+")
_OPENING = re.compile(r"<([A-Za-z][\w-]*)>")

_QUOTATIONS = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r'(?<![^\s(:—–-])"(?P<inside>[^"]*)"(?!\w)',
        "[“„«](?P<inside>[^“”„«»]*)[”“»]",
        r"(?<![^\s(:—–-])['‘](?=\S)(?P<inside>(?:[^'’]|(?<=\w)['’](?=\w)|(?<=s)['’](?=\s\w))*+)(?<=\S)['’](?!\w)",
    )
]
_QUOTED_WORDS = 3
_JOINING = re.compile(r"(?:[\s,;]+(?:and|then|also|et|puis))+\Z", re.IGNORECASE)  # "... and translate it"
_JOINING_CHARACTERS = 40
_NAMES_TEXT = re.compile(
    r"\b(?:texte?|original|whole|full|entire|everything|all|both|article|review|message|comment|passage|paragraph|post"
    r"|letter|e-?mail|mail|note|story|document|tout|entier|entière)s?\b",
    re.IGNORECASE,
)

_NAMES_ANSWER = re.compile(
    r"\b(?:of|in|from|for|about|on|with)\s+(?:(?:the|that|this|your|its)\s+(?:\w+\s+)?"
    r"(?:summary|gist|tl;?dr|translation|version|result|answer|output)|(?:the|that|your)\s+(?:French|translated|shortened)"
    r"\s+(?:text|one)|(?:that|your)\s+(?:sentence|line|headline|title))"
    r"\b|\b(?:du|de\s+ce|dans\s+(?:le|ce|votre))\s+(?:résumé|résultat)\b"
    r"|\b(?:de|dans)\s+(?:la|cette|votre)\s+(?:traduction|version|phrase)\b",
    re.IGNORECASE,
)


def names_answer(ask: str) -> bool:
    """Whether words of a request, in English or French, say that they are about an answer: "in that summary"."""
    rest = _NAMES_ANSWER.sub("", ask)
    return rest != ask and not names_text(rest)


def names_text(ask: str) -> bool:
    """Whether words of a request, in English or French, say that they are about the text."""
    return bool(_NAMES_TEXT.search(ask))


def without_texts(message: str, texts: Sequence[Span]) -> str:
    """A message with new lines in place of its texts: what stands around them keeps its place."""
    for start, end in texts:
        message = message[:start] + "\n" * (end - start) + message[end:]
    return message


def unframed(message: str, span: Span) -> Span:
    """The part of a message that is the text itself.

    Args:
        message: the whole message.
        span: where the text probably is; half of a frame may be outside.

    Returns:
        The span without white space and marks around it, without a last "and" before more of the message, and with
        the full stop right behind it; a mark is dropped only where its partner is there too.
    """
    last = span[0] + len(message[slice(*span)].rstrip())
    between, more = message[last:], message[last:].lstrip()
    if more and "\n" not in between[: -len(more)]:
        first = max(span[0], last - _JOINING_CHARACTERS)
        if joining := _JOINING.search(message[first:last]):
            span = span[0], first + joining.start()
    if end_marks := _END.match(message, span[1]):
        span = span[0], end_marks.end()
    while True:
        start, end = _stripped(message, span)
        found = _stripped(message, _without(message, start, end))
        if found == (start, end) or found[0] >= found[1]:
            return start, end
        span = found


def cuts_quotation(message: str, span: Span) -> bool:
    """Whether a quotation begins in a text and ends outside it, or reaches beyond it: its other words would be lost.

    Args:
        message: the whole message.
        span: of the text, without its frame.
    """
    before, text, after = message[: span[0]], message[slice(*span)], message[span[1] :]
    odd = [part.count('"') % 2 for part in (before, text, after)]
    if odd[1]:
        return bool(odd[0] or odd[2])
    if not (odd[0] and odd[2]):
        return False
    between = before.rpartition('"')[2].strip() + after.partition('"')[0].strip(" \t\r\n.,;:!?…")
    return bool(between)


def only_quotation(message: str) -> Span | None:
    """Return where the message's only quotation of some length is, without its marks; None if there is none or more."""
    for mark in _QUOTATIONS:
        found = [match.span("inside") for match in mark.finditer(message)]
        if len(found) == 1 and len(message[slice(*found[0])].split()) >= _QUOTED_WORDS:
            return _stripped(message, found[0])
    return None


def _stripped(message: str, span: Span) -> Span:
    text = message[slice(*span)]
    start = span[0] + len(text) - len(text.lstrip())
    return start, max(start, span[0] + len(text.rstrip()))


def _without(message: str, start: int, end: int) -> Span:
    """One frame less, if there is one."""
    text = message[start:end]
    if not text:
        return start, end
    if start and not message[start - 1].isspace() and (tail := _TAIL.match(text)):
        return start + tail.end(), end
    before, after = message[:start].rstrip(" \t")[-1:], message[end:].lstrip(" \t")[:1]
    close = _QUOTES.get(text[0])
    if close and len(text) > 1 and text[-1] == close and _is_nested(text[1:-1], text[0]):
        return start + 1, end - 1
    if close and len(text) > 1 and after == close and not any(mark in text[1:] for mark in (close, text[0])):
        return start + 1, end
    if text[-1] in _QUOTES.values():
        opening = {o for o, c in _QUOTES.items() if c == text[-1]}
        if before in opening and not any(mark in text[:-1] for mark in {*opening, text[-1]}):
            return start, end - 1
    if found := _FENCE.match(text):
        mark = (found[1] or found[2])[:3]
        closing = {"<<<": ">>>"}.get(mark, mark)
        rest = text[found.end() :]
        if (line := re.search(rf"(?:\A|\n|[ \t]){re.escape(closing)}\S*[ \t]*\Z", rest)) is not None:
            return start + found.end(), start + found.end() + line.start()
        if message[end:].lstrip().startswith(closing):
            return start + found.end(), end
    if found := _OPENING.match(text):
        closing = f"</{found[1]}>"
        if text.endswith(closing):
            return start + found.end(), end - len(closing)
    return start, end


def _is_nested(inner: str, mark: str) -> bool:
    """Whether quotation marks in a quotation belong to it: the first of them opens another one."""
    place = inner.find(_QUOTES[mark])
    if mark != _QUOTES[mark]:
        return place < 0 or 0 <= inner.find(mark) < place
    return place < 0 or (place > 0 and inner[place - 1].isspace())
