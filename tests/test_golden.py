"""Golden outputs of the default pack: route, tokens and text of fixed prompts, greedy, the same on every CPU.

    LORAMIX_UPDATE_GOLDEN=1 python -m pytest tests/test_golden.py     writes tests/golden.json anew

Kernels for other instruction sets, and other splits of the same tokens into batches, round differently. No prompt
here is near enough to another answer for that to matter: `test_margins` measures how near each is.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from margins import SCALE_TOLERANCE, Asked, offences

pytestmark = pytest.mark.base
GOLDEN = Path(__file__).parent / "golden.json"
CLOSED = "The school will stay closed on Monday because of heavy snow. Lessons begin again on Tuesday."
KETTLE = "Name the emotion and the sentiment of this review: I am so happy with this kettle, it is quick and quiet."
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "positive": ("Is this review positive or negative? A tender, funny film that I will watch again.", {}),
    "negative": ("Sentiment: the plot is thin and the jokes are older than the actors", {}),
    "after": (
        "The battery died after two days and nobody answers the phone.\n\nIs this review positive or negative?",
        {},
    ),
    "summary": (
        "Summarize in one sentence: The factory in Leeds will close in March. Two hundred people will lose their "
        "jobs.",
        {},
    ),
    "oneline": (
        "Give a one-line summary of this: The meeting on Monday was moved to Friday because the hall is being painted.",
        {},
    ),
    "spam": (
        "Is this message spam? WINNER! You have won a 1000 pound prize. Call 09061701461 now to claim.",
        {},
    ),
    "scam": (
        "Is this a scam? You have won a gift card worth 500 dollars! Click the link to claim your prize today.",
        {},
    ),
    "sql": ("Table orders(id, customer, total, city). Write the SQL: the customers from Lyon", {}),
    "shell": ("Write a bash command for this: find all files larger than 100 MB in my home folder", {}),
    "french": ("Translate into French: I am very tired today.", {}),
    "entities": (
        "Which people, places and organizations are named here? Angela flew from Berlin to Tokyo to meet the people "
        "of Sony.",
        {},
    ),
    "slots": ("Parse this voice command into JSON with intent and slots: play some jazz by Miles Davis", {}),
    "facts": (
        "Write a sentence from these facts: name[The Olive Tree], food[Italian], familyFriendly[yes]",
        {},
    ),
    "intent": ("What does this customer of a bank want? My card has not arrived yet.", {}),
    "emotion": ("Which emotion does this comment show? I am so happy that you came!", {}),
    "two in turn": (KETTLE, {}),
    "blend": (KETTLE, {"policy": "blend", "max_tokens": 24}),
    "fixed mix": ("The soup was cold.", {"mix": "sentiment=0.7,summarize=0.3", "max_tokens": 16}),
    "none": ("What is the capital of Japan?", {"max_tokens": 24}),
    "none and wrong": ("Who was the first president of the United States?", {"max_tokens": 12}),
    "bare base": (f"Summarize in one sentence: {CLOSED.split('.')[0]}.", {"policy": "base", "max_tokens": 3}),
}


def outcome(engine: Any, name: str) -> dict[str, Any]:
    """Mixes, tokens and text."""
    prompt, options = PROMPTS[name]
    answer = engine.generate(prompt, **options)
    steps = [step.scales for step in answer.route.steps]
    return {"mixes": steps, "tokens": answer.tokens, "text": answer.text}


def assert_agree(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """The same tokens, by the same skills in the same order; their scales follow probabilities."""
    assert found["tokens"] == wanted["tokens"] and found["text"] == wanted["text"]
    assert found["mixes"] == [pytest.approx(mix, abs=SCALE_TOLERANCE) for mix in wanted["mixes"]]


@pytest.fixture(scope="module")
def golden(default_engine: Any) -> dict[str, Any]:
    if os.environ.get("LORAMIX_UPDATE_GOLDEN"):
        near = [line for name in PROMPTS for line in offences(default_engine, Asked(name, *PROMPTS[name]))]
        assert not near, near
        found = {name: outcome(default_engine, name) for name in PROMPTS}
        GOLDEN.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    read: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return read


@pytest.mark.parametrize("name", PROMPTS)
def test_output_is_as_recorded(name: str, default_engine: Any, golden: dict[str, Any]) -> None:
    assert_agree(outcome(default_engine, name), golden[name])


def test_the_recorded_outputs_say_something(golden: dict[str, Any]) -> None:
    assert golden.keys() == PROMPTS.keys() and all(wanted["text"] for wanted in golden.values())
    assert sum(len(wanted["tokens"]) for wanted in golden.values()) >= 50
    assert len({skill for wanted in golden.values() for mix in wanted["mixes"] for skill in mix}) >= 5


def test_a_second_time_gives_the_same(default_engine: Any) -> None:
    """The second time a prompt's beginning comes from the cache, and only its end is read: other batches."""
    first = {name: outcome(default_engine, name) for name in PROMPTS}
    for name in reversed(PROMPTS):
        assert_agree(outcome(default_engine, name), first[name])


def test_no_skill_fits_equals_never_having_adapters(default_engine: Any) -> None:
    for name in ("none", "none and wrong"):
        prompt, options = PROMPTS[name]
        routed = default_engine.generate(prompt, **options)
        assert routed.route.mix == {}, routed.route
        assert default_engine.generate(prompt, policy="base", **options).tokens == routed.tokens
