"""Where tokens are in the last message: exact characters, also of cut prompts, cut messages and split characters."""

from __future__ import annotations

from typing import Any

import pytest

from loramix.models.gate_window import GAP, LAST, original_span, window
from loramix.runtime.token_places import places_of


def places(pieces: list[bytes], contents: list[str], message: str, first: int = 999) -> list[Any]:
    return places_of(range(len(pieces)), first, contents, pieces.__getitem__, message)


def test_tokens_of_the_template_and_of_earlier_turns_are_nowhere() -> None:
    pieces = [b"<user>", b"hi", b"\n", b"<bot>", b"hi", b"<user>", b"say", b" hi", b"<bot>"]
    found = places(pieces, ["hi", "hi", "say hi"], "say hi")
    assert found == [None] * 6 + [(0, 3), (3, 6), None]


def test_a_token_with_a_part_of_a_character_has_that_character() -> None:
    raw = "né👍".encode()
    pieces = [b"\n", raw[:2], raw[2:4], raw[4:6], raw[6:], b"\n"]
    assert places(pieces, ["né👍"], "né👍") == [None, (0, 2), (1, 3), (2, 3), (2, 3), None]


def test_white_space_around_a_message_that_a_template_strips() -> None:
    assert places([b"u\n", b"a", b"\r\n", b"b", b"<end>"], ["  a\r\nb \n"], "  a\r\nb \n") == [
        None,
        (2, 3),
        (3, 5),
        (5, 6),
        None,
    ]


def test_both_ends_of_a_cut_prompt() -> None:
    message = " ".join(f"w{i:03}" for i in range(100))
    words = [message[max(0, 5 * i - 1) : 5 * i + 4].encode() for i in range(100)]
    pieces = [b"<u>", *words[:20], *words[70:], b"<bot>"]
    found = places(pieces, [message], message, first=21)
    assert found[0] is None and found[-1] is None
    for piece, span in zip(pieces[1:-1], found[1:-1], strict=True):
        assert message[slice(*span)].encode() == piece


def test_a_message_that_the_base_writes_in_another_way_is_nowhere() -> None:
    message = "the beginning is the same, but the end is not"
    pieces = [b"the beginning is the same, but", b" THE END", b"<bot>"]
    assert places(pieces, [message], message) == [None, None, None]


def test_a_message_whose_middle_the_window_leaves_out() -> None:
    message = "".join(chr(97 + i % 26) for i in range(900))
    turns = [("user", "hello"), ("assistant", "hi"), ("user", message)]
    (*_, last) = window([{"role": role, "content": text} for role, text in turns])
    read = last["content"]
    assert GAP in read and len(read) == sum(LAST) + len(GAP)
    pieces = [read[i : i + 7].encode() for i in range(0, len(read), 7)]
    found = places([b"hello", b"hi", *pieces], ["hello", "hi", read], message)[2:]
    for piece, span in zip(pieces, found, strict=True):
        if span is not None:
            assert message[slice(*span)] in piece.decode()
    assert sum(span is not None for span in found) >= len(found) - 1


@pytest.mark.parametrize(
    ("span", "wanted"),
    [((0, 5), (0, 5)), ((198, 202), (198, 200)), ((201, 202), None), ((202, 206), (740, 743))],
)
def test_spans_in_a_cut_message(span: tuple[int, int], wanted: tuple[int, int] | None) -> None:
    assert original_span(span, sum(LAST) + len(GAP), 900) == wanted
    assert original_span(span, 900, 900) == span
