"""Requests for several things are split by the tags of their words; nothing of a message is lost in silence."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from loramix.models.plan import Step, find_plan, may_be_split
from loramix.models.text_frame import cuts_quotation, unframed

NAMES = ["other", "text", "answer", "sentiment", "summarize", "translate_fr", "entities", "spam", "base"]
SHORT = {
    "o": "other",
    "t": "text",
    "a": "answer",
    "s": "sentiment",
    "m": "summarize",
    "f": "translate_fr",
} | {
    "e": "entities",
    "p": "spam",
    "b": "base",
}
FREE = ["summarize", "translate_fr", "entities"]
LIKELY = dict.fromkeys(NAMES[3:-1], 0.3)


def tagged(marked: str, *, sure: float = 0.95, size: int = 4) -> tuple[str, np.ndarray, list[Any]]:
    """A message with its tokens' tags; ``[m|summarize this]`` has the tag of the letter, other words are text."""
    message, letters = "", ""
    for part in re.split(r"(\[[a-z]\|.*?\])", marked, flags=re.DOTALL):
        found = re.fullmatch(r"\[([a-z])\|(.*)\]", part, re.DOTALL)
        letter, text = (found[1], found[2]) if found else ("t", part)
        message, letters = message + text, letters + letter * len(text)
    rows, places = [], list[Any]()
    for match in re.finditer(rf"\s*(?:[^\W\d_]{{1,{size}}}|\S)", message):
        row = np.full(len(NAMES), (1 - sure) / (len(NAMES) - 1))
        row[NAMES.index(SHORT[letters[match.end() - 1]])] = sure
        rows.append(row)
        places.append(match.span())
    return message, np.asarray(rows).reshape(-1, len(NAMES)), places


def plan(marked: str, classes: dict[str, float] | None = None, **how: Any) -> tuple[Step, ...]:
    message, rows, places = tagged(marked, **how)
    return find_plan(rows, NAMES, places, message, LIKELY if classes is None else classes, FREE)


def brief(steps: tuple[Step, ...]) -> str:
    return " | ".join(f"{step.skill}{' on answer' if step.on_answer else ''}" for step in steps)


TEXT = 'The soup was cold, the waiter "rude" and I will not come back. Never!'


@pytest.mark.parametrize(
    "marked",
    [
        "[m|Summarize this] [o|and] [s|say if it is positive]: " + TEXT,
        TEXT + "\n\n[m|One-line summary] [o|and the] [s|sentiment], [o|please]",
        '[o|For] "' + TEXT + '" [m|I want a summary] [o|plus] [s|the sentiment].',
        "[m|tldr] [o|+] [s|sentiment]\n" + TEXT,
        "[o|Text:] " + TEXT + "\n[m|Summary:]\n[s|Sentiment:]",
        "[m|Summarize] [o|and] [s|rate this:]\n---\n" + TEXT + "\n---",
        "[m|Summarize] [o|and] [s|rate this:]\n```\n" + TEXT + "\n```",
        "[o|<review>]" + TEXT + "[o|</review>]\n[m|Give the gist] [o|and] [s|the polarity]",
        "<review>" + TEXT + "</review>\n[m|Give the gist] [o|and] [s|the polarity]",
        "[o|1.] [m|summarize]\r\n[o|2.] [s|sentiment]\r\n\r\n" + TEXT + "\r\n",
        "[m|Summarize] [o|and] [s|rate:] “" + TEXT + "”",
        "[m|Summarize] [o|and] [s|rate:] " + TEXT + "\n\n[o|The text again:] " + TEXT,
        "[m|Fasse zusammen] [o|und] [s|sag, ob es gut ist]: " + TEXT,
    ],
)
def test_a_text_anywhere_in_the_message_is_found_exactly(marked: str) -> None:
    steps = plan(marked)
    assert brief(steps) == "summarize | sentiment"
    message = tagged(marked)[0]
    for step in steps:
        assert step.text == TEXT and message[slice(*step.span)] == TEXT


@pytest.mark.parametrize(
    ("marked", "wanted"),
    [
        ("[s|Sentiment] [o|first, then] [m|a summary]: ", "sentiment | summarize"),
        (
            "[m|Summarize] [o|then] [f|translate] [a|the summary] [f|into French]: ",
            "summarize | translate_fr on answer",
        ),
        ("[m|Summarize] [a|in] [f|French]: ", "summarize | translate_fr on answer"),
        (
            "[m|Shorten it] [o|, then put] [a|that] [o|into] [f|French]: ",
            "summarize | translate_fr on answer",
        ),
        ("[f|A translation] [a|of] [m|a summary]: ", "translate_fr | summarize on answer"),
        (
            "[f|Translate] [a|the gist] [o|, that is] [m|a sentence]: ",
            "summarize | translate_fr on answer",
        ),
        ("[s|Rate it] [o|and] [f|translate] [a|it]: ", "sentiment | translate_fr"),
        ("[m|Gist], [s|sentiment], [f|French]: ", "summarize | sentiment | translate_fr"),
        (
            "[m|Gist], [f|French] [a|of it], [o|and] [e|names]: ",
            "summarize | translate_fr on answer | entities",
        ),
        ("[m|Gist], [s|mood], [m|one line only], [o|please] ", "summarize | sentiment"),
    ],
)
def test_steps_come_in_the_order_in_which_they_are_carried_out(marked: str, wanted: str) -> None:
    steps = plan(marked + TEXT)
    assert brief(steps) == wanted
    assert {step.text for step in steps} == {TEXT}


@pytest.mark.parametrize(
    "marked",
    [
        "[m|Summarize] [o|and] [m|shorten this]: " + TEXT,
        "[m|Summarize] [o|and] [s|rate this.]",
        '[m|Summarize] [o|and] [s|rate this:] ""',
        "[m|Summarize] [o|and] [s|rate:] \n---\n\n---",
        "[m|Gist], [s|mood], [f|French], [e|names] [o|of] " + TEXT,
        "[m|Summarize] [o|and] [b|write a long poem about] " + TEXT + " [s|Sentiment?]",
        "[m|Summarize] " + TEXT + " [s|Sentiment of] Another text, which is not the same, must not be lost.",
        TEXT,
        "",
    ],
)
def test_what_cannot_be_split_is_answered_as_one(marked: str) -> None:
    assert plan(marked) == ()


def test_words_that_are_not_sure_ask_for_nothing() -> None:
    marked = "[m|Summarize this] [o|and] [s|say if it is positive]: " + TEXT
    assert plan(marked, sure=0.7) and plan(marked, sure=0.25) == ()


def test_the_classes_must_agree() -> None:
    marked = "[m|Summarize this] [o|and] [s|say if it is positive]: " + TEXT
    assert plan(marked, {"summarize": 0.99, "sentiment": 0.01}) == ()
    assert plan(marked, {"summarize": 0.7, "sentiment": 0.25})
    # words that ask plainly make up for an unlikely class
    assert plan(marked, {"summarize": 0.85, "sentiment": 0.12})
    assert plan(marked, {"summarize": 0.85, "sentiment": 0.12}, sure=0.6) == ()
    assert plan(marked, {"summarize": 0.93, "sentiment": 0.04}) == ()


def test_steps_in_the_order_that_words_tell() -> None:
    steps = plan("[o|Before you] [m|condense it,] [s|say if it is positive]: " + TEXT)
    assert brief(steps) == "sentiment | summarize"
    steps = plan(TEXT + " [f|In French], [o|but] [m|sum it up] [o|first].")
    assert brief(steps) == "summarize | translate_fr"


def test_a_single_unsure_word_in_the_text_or_the_request_changes_nothing() -> None:
    marked = "[m|Summarize this] [o|and] [s|say if it is positive]: " + TEXT
    message, rows, places = tagged(marked)
    for i in range(len(rows)):
        bent = rows.copy()
        bent[i] = np.full(len(NAMES), 0.02)
        bent[i, NAMES.index("translate_fr")] = 1 - 0.02 * (len(NAMES) - 1)
        steps = find_plan(bent, NAMES, places, message, LIKELY, FREE)
        assert not steps or {step.text for step in steps} == {TEXT} or "translate_fr" in brief(steps), i


def test_the_middle_that_the_gate_does_not_read_belongs_to_the_text() -> None:
    long = " ".join(f"word{i}" for i in range(400))
    message, rows, places = tagged("[m|Summarize] [o|and] [s|rate:] " + long + "\n\n[o|Thanks a lot!]")
    read = [*range(60), *range(len(rows) - 60, len(rows))]
    steps = find_plan(rows[read], NAMES, [places[i] for i in read], message, LIKELY, FREE)
    assert [step.text for step in steps] == [long, long]
    # a message whose beginning or end was not read is not split
    for kept in (read[:60], read[60:], read[4:]):
        assert find_plan(rows[kept], NAMES, [places[i] for i in kept], message, LIKELY, FREE) == ()


def test_the_middle_is_not_taken_for_the_text_if_an_instruction_is_next_to_it() -> None:
    ask = "[m|Summarize] [o|and] [s|rate] " + "[m|as briefly as it can be done] " * 20
    message, rows, places = tagged(ask + TEXT)
    read = [*range(20), *range(len(rows) - 20, len(rows))]
    assert find_plan(rows[read], NAMES, [places[i] for i in read], message, LIKELY, FREE) == ()


@pytest.mark.parametrize(
    "text",
    [
        "Schön war’s 👩‍👩‍👧 – très bien! 🇫🇷",
        "今日の天気はとても良いです。",
        "مرحبا بالعالم، كان الطعام لذيذا",
        "बहुत अच्छा खाना था।",
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_texts_of_any_script_stay_whole(text: str, size: int) -> None:
    steps = plan("[m|Summarize] [o|and] [s|rate]: " + text, size=size)
    assert [step.text for step in steps] == [text, text]


def test_tokens_with_a_part_of_a_character_count_for_that_character() -> None:
    message, rows, places = tagged("[m|Sum up] [o|and] [s|rate]: 👍👎", size=1)
    doubled = [i for i in range(len(rows)) for _ in range(1 + 3 * (message[places[i][1] - 1] in "👍👎"))]
    steps = find_plan(rows[doubled], NAMES, [places[i] for i in doubled], message, LIKELY, FREE)
    assert [step.text for step in steps] == ["👍👎", "👍👎"]


def test_instructions_in_the_text_stay_text() -> None:
    text = "Please translate this into French and tell me whether it is spam. Then list the names."
    steps = plan('[m|Summarize] [o|and] [s|rate]: "' + text + '"')
    assert [step.text for step in steps] == [text, text]


def test_a_text_that_is_interrupted_by_an_instruction_is_not_split() -> None:
    assert (
        plan(
            "[m|Summarize] [o|and] [s|rate]: one two three four five [e|list the names too] six seven eight nine"
        )
        == ()
    )


def test_gates_without_the_tag_answer_or_text() -> None:
    marked = "[m|Summarize] [o|then] [f|translate] [o|the summary]: " + TEXT
    message, rows, places = tagged(marked)
    kept = [i for i, name in enumerate(NAMES) if name != "answer"]
    names = [NAMES[i] for i in kept]
    assert brief(find_plan(rows[:, kept], names, places, message, LIKELY, FREE)) == "summarize | translate_fr"
    kept = [i for i, name in enumerate(NAMES) if name != "text"]
    names = [NAMES[i] for i in kept]
    assert find_plan(rows[:, kept], names, places, message, LIKELY, FREE) == ()
    assert not may_be_split([], LIKELY) and not may_be_split(NAMES, {"summarize": 0.9, "other": 0.9})
    assert may_be_split(NAMES, LIKELY)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ('"a b"', "a b"),
        ('"a" and "b"', '"a" and "b"'),
        ("'tis", "'tis"),
        ("“a b”", "a b"),
        ("« a b »", "a b"),
        ("„a b“", "a b"),
        ("```python\ndef f():\n    pass\n```", "def f():\n    pass"),
        ("~~~\na\n~~~", "a"),
        ("---\na\n---\n", "a"),
        ("<<< a >>>", "a"),
        ("<text>a</text>", "a"),
        ("<b>a</b> c", "<b>a</b> c"),
        ("  a  ", "a"),
        ('""', '""'),
        ("it's", "it's"),
        ("-- a", "-- a"),
        ("", ""),
    ],
)
def test_frames_come_off_only_in_pairs(message: str, text: str) -> None:
    assert message[slice(*unframed(message, (0, len(message))))] == text


def test_half_of_a_frame_may_be_outside() -> None:
    assert unframed('rate "a b" now', (6, 10)) == (6, 9) and unframed('rate "a b" now', (5, 9)) == (6, 9)
    assert unframed("x ```\na\n``` y", (2, 7)) == (6, 7)
    assert unframed('say "no" to "a"', (4, 15)) == (4, 15)


@pytest.mark.parametrize(
    ("message", "end", "text"),
    [
        ("rate a b and sum it up", 12, "a b"),
        ("rate a b, and then sum it up", 18, "a b"),
        ("note a b puis résume", 13, "a b"),
        ("rate a band and sum it up", 15, "a band"),
        ("rate a b and", 12, "a b and"),
        ("rate strand sum it up", 11, "strand"),
        ('rate "a and" now', 12, "a and"),
    ],
)
def test_a_word_that_joins_two_requests_is_not_text(message: str, end: int, text: str) -> None:
    assert message[slice(*unframed(message, (5, end)))] == text


def test_the_json_form_of_a_step() -> None:
    assert Step("summarize", "ab", (3, 5)).to_json() == {"skill": "summarize", "on": "text", "text": [3, 5]}
    assert Step("spam", "ab", (3, 5), on_answer=True).to_json() == {"skill": "spam", "on": "answer"}


@pytest.mark.parametrize(
    ("message", "text", "cut"),
    [
        ('rate "a b" now', "a b", False),
        ('rate: "a b. Sum it up"', "a b", True),
        ('"By the way, rate it. a b"', "a b", True),
        ('"a b. Sum it up" rate', '"a b', True),
        ('rate a "b" c', 'a "b" c', False),
        ('say "sum", then "rate": a b', "a b", False),
        ("a b", "a b", False),
    ],
)
def test_a_quotation_is_not_cut(message: str, text: str, cut: bool) -> None:
    start = message.index(text)
    assert cuts_quotation(message, (start, start + len(text))) is cut


def test_an_instruction_at_the_end_of_a_quotation_is_not_carried_out() -> None:
    assert plan('[m|Summarize this:] "The soup was cold. [s|Rate it too]"') == ()


def test_a_tiny_word_asks_for_nothing() -> None:
    assert plan("[m|Summarize] [s|or] [m|shorten this]: " + TEXT) == ()


@pytest.mark.parametrize(
    ("marked", "found"),
    [
        ("[m|Summarize this] [o|and] [f|put it into French]: ", "summarize | translate_fr on answer"),
        ("[m|Summary], [o|then] [f|French]: ", "summarize | translate_fr on answer"),
        ("[m|Summarize this] [o|and] [f|translate the whole text into French]: ", "summarize | translate_fr"),
        ("[m|The gist], [o|and] [f|the original in French]: ", "summarize | translate_fr"),
        ("[f|French, please], [o|and] [m|the gist]: ", "translate_fr | summarize"),
        ("[s|Is it good?] [o|And] [f|in French]: ", "sentiment | translate_fr"),
        ("[m|The gist], [s|good or bad], [o|and] [f|in French]: ", "summarize | sentiment | translate_fr"),
    ],
)
def test_a_skill_that_follows_another_works_on_its_answer(marked: str, found: str) -> None:
    message, rows, places = tagged(marked + TEXT)
    follows = {"translate_fr": ("summarize",)}
    assert brief(find_plan(rows, NAMES, places, message, LIKELY, FREE, follows)) == found
    assert "on answer" not in brief(find_plan(rows, NAMES, places, message, LIKELY, FREE))


def test_a_skill_follows_none_whose_answers_are_labels() -> None:
    message, rows, places = tagged("[s|Is it good?] [o|And] [f|in French]: " + TEXT)
    steps = find_plan(rows, NAMES, places, message, LIKELY, FREE, {"translate_fr": ("sentiment",)})
    assert brief(steps) == "sentiment | translate_fr"
