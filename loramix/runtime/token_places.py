"""Where the tokens that a gate read are in the messages: byte spans, and characters of the last message."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from loramix.models.gate_window import original_span
from loramix.models.text_frame import Span

_EDGE = 16  # bytes by which the cut end of a long message is found


class Part(NamedTuple):
    """A part of a message in the text of consecutive tokens."""

    message: int
    """Number of the message."""
    offset: int
    """Its first byte in the message."""
    start: int
    end: int
    """Bytes in the text of the tokens."""


class Run(NamedTuple):
    """Consecutive tokens, and the parts of messages that are in their text."""

    tokens: slice
    pieces: list[bytes]
    parts: list[Part]


def runs_of(
    tokens: Sequence[int], first: int, contents: Sequence[str], piece: Callable[[int], bytes]
) -> Iterator[Run]:
    """Find the messages in the text of tokens; what the chat template adds is in no part.

    Args:
        tokens: the T ids that were read.
        first: tokens before the cut of a long prompt; T or more if nothing was cut.
        contents: texts of the messages that were read, oldest first.
        piece: returns a token's bytes.

    Yields:
        One run, or two if the prompt was cut.
    """
    texts = [content.encode("utf-8", "replace") for content in contents]
    pieces = [piece(token) for token in tokens]
    yield Run(slice(0, first), pieces[:first], list(_from_start(b"".join(pieces[:first]), texts)))
    if len(tokens) > first:
        yield Run(slice(first, None), pieces[first:], list(_from_end(b"".join(pieces[first:]), texts)))


def places_of(
    tokens: Sequence[int],
    first: int,
    contents: Sequence[str],
    piece: Callable[[int], bytes],
    message: str,
) -> list[Span | None]:
    """Find the characters of the last message for each token; arguments as for `runs_of`.

    Args:
        tokens: see `runs_of`.
        first: see `runs_of`.
        contents: see `runs_of`; the last one may lack its middle.
        piece: see `runs_of`.
        message: the whole last message.

    Returns:
        (T,) spans; a token with a part of a character has that character, one outside the message has None.
    """
    read = contents[-1]
    raw = read.encode("utf-8", "replace")
    characters = [i for i, one in enumerate(read) for _ in one.encode("utf-8", "replace")]
    found: list[Span | None] = []
    for run in runs_of(tokens, first, contents, piece):
        edges = list(accumulate(map(len, run.pieces), initial=0))
        part = next((one for one in run.parts if one.message == len(contents) - 1), Part(0, 0, 0, 0))
        shift = part.offset - part.start
        spoken = b"".join(run.pieces)[part.start : part.end]
        if part.offset < 0 or raw[part.offset : part.offset + len(spoken)] != spoken:
            part = Part(0, 0, 0, 0)  # the base writes the message in another way
        for begin, end in pairwise(edges):
            a, b = max(begin, part.start), min(end, part.end)
            if a >= b:
                found.append(None)
                continue
            span = characters[a + shift], characters[b - 1 + shift] + 1
            found.append(original_span(span, len(read), len(message)))
    return found


def _from_start(run: bytes, texts: Sequence[bytes]) -> Iterator[Part]:
    """Where the messages are in the text from its start on; the last one found may be cut."""
    at = 0
    for number, whole in enumerate(texts):
        text = whole.strip()
        if not text:
            continue
        offset, place = whole.index(text), run.find(text, at)
        if place < 0:
            place = run.find(text[:_EDGE], at)
            if place >= 0:
                yield Part(number, offset, place, len(run))
            return
        at = place + len(text)
        yield Part(number, offset, place, at)


def _from_end(run: bytes, texts: Sequence[bytes]) -> Iterator[Part]:
    """Where the messages are in the text from its end back; the last one found may be cut."""
    end = len(run)
    for number, whole in reversed(list(enumerate(texts))):
        text = whole.strip()
        if not text:
            continue
        offset, place = whole.index(text), run.rfind(text, 0, end)
        if place < 0:
            place = run.rfind(text[-_EDGE:], 0, end)
            if place >= 0:
                close = place + min(_EDGE, len(text))
                yield Part(number, offset + len(text) - close, 0, close)
            return
        yield Part(number, offset, place, place + len(text))
        end = place
