"""The words that the gate looked at: whole words of the messages, nothing of the chat template."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loramix.runtime.attended_words import MAX_WORDS, attended_words


def words(pieces: list[str | bytes], weights: list[float], contents: list[str], first: int = 999) -> Any:
    spelled = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]
    found = attended_words(
        np.array(weights, np.float32), range(len(spelled)), first, contents, spelled.__getitem__
    )
    return {word: pytest.approx(weight, abs=1e-6) for word, weight in found}


CHAT = ["", "user", "\n", "Sum", "mar", "ize", " this", ":", " a", " cat", "", "\n", "", "assistant", "\n"]


def test_tokens_are_merged_to_words_and_the_template_is_left_out() -> None:
    weights = [0.3, 0.1, 0, 0.1, 0.05, 0.05, 0.02, 0.08, 0, 0.1, 0, 0, 0, 0.2, 0]
    found = attended_words(
        np.array(weights, np.float32),
        range(len(CHAT)),
        999,
        ["Summarize this: a cat"],
        [piece.encode() for piece in CHAT].__getitem__,
    )
    assert [word for word, _ in found][:2] == ["Summarize", "cat"] or found[1][0] == "this"
    assert dict(found)["Summarize"] == pytest.approx(0.2) and dict(found)["this"] == pytest.approx(0.1)
    assert "user" not in dict(found) and "assistant" not in dict(found)


def test_equal_words_are_counted_together() -> None:
    pieces = ["no", " No", " no", " no."]
    assert words(pieces, [0.1, 0.2, 0.3, 0.4], ["no No no no."]) == {"no": 0.8, "No": 0.2}


def test_a_user_who_writes_the_templates_words_sees_them() -> None:
    pieces = ["", "user", "\n", "user", " assistant", "", "\n"]
    assert words(pieces, [0.1, 0.1, 0, 0.3, 0.2, 0.1, 0], ["user assistant"]).keys() == {"user", "assistant"}


def test_letters_of_several_tokens_stay_whole() -> None:
    """A character may be cut into bytes by the tokenizer."""
    raw = "schön".encode()
    assert words([raw[:4], raw[4:]], [0.5, 0.5], ["schön"]) == {"schön": 1.0}


def test_a_long_prompt_is_shown_from_both_ends() -> None:
    text = " ".join(f"word{i}" for i in range(400))
    pieces: list[str | bytes] = [
        "",
        "user\n",
        "word0",
        *(f" word{i}" for i in range(1, 400)),
        "",
        "assistant",
    ]
    kept = [*pieces[:112], *pieces[-80:]]
    weights = [0.0] * 192
    weights[2], weights[100], weights[150], weights[191] = 0.1, 0.2, 0.3, 0.4
    assert words(kept, weights, [text], 112) == {"word360": 0.3, "word98": 0.2, "word0": 0.1} | {
        word: 0.0 for word in words(kept, weights, [text], 112) if word not in ("word360", "word98", "word0")
    }


def test_all_turns_are_shown() -> None:
    pieces = ["", "user\n", "one", "", "assistant\n", "two", "", "user\n", "three", ""]
    assert words(pieces, [0.1] * 10, ["one", "two", "three"]) == {"one": 0.1, "two": 0.1, "three": 0.1}


def test_what_cannot_be_found_gives_no_words() -> None:
    """A base that normalizes its text may have no such string."""
    assert words(["", "HELLO"], [0.5, 0.5], ["hello"]) == {}
    assert words([""], [1.0], [""]) == {}


def test_few_and_short_words_are_shown() -> None:
    text = " ".join(f"w{i}" for i in range(30)) + " " + "x" * 500 + " ???"
    found = words([text], [1.0], [text])
    assert len(found) == MAX_WORDS and max(map(len, found)) <= 32 and "???" not in found


def test_no_word_steers_a_terminal() -> None:
    text = "a\x1b[31mred\x1b[0m \x07bell\u202e"
    assert words([text], [1.0], [text]).keys() == {"a[31mred[0m", "bell"}
