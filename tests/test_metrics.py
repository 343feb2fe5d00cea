"""Measures of answers against values worked out by hand."""

from __future__ import annotations

import json
from typing import get_args

import msgspec
import numpy as np
import pytest

from loramix.train.data import Row
from loramix.train.metrics import bootstrap, estimate, kept, measure, share
from loramix.train.recipe import MeasureName, load_recipe


def value(name: str, pairs: list[tuple[str, str]], labels: tuple[str, ...] = ()) -> float:
    """The measure of (answer, target) pairs."""
    rows = [Row("test", "x", target, "", (target,)) for _, target in pairs]
    return estimate(measure(name, labels), [answer for answer, _ in pairs], rows).value


def test_accuracy_forgives_case_and_full_stop_alone() -> None:
    assert value("accuracy", [(" Positive. ", "positive"), ("positive, I think", "positive")]) == 0.5


def test_exact_forgives_white_space_alone() -> None:
    assert value("exact", [("SELECT a\n FROM b ", "SELECT a FROM b"), ("select a", "SELECT a")]) == 0.5


def test_first_word() -> None:
    pairs = [("find . -name x", "find / -type f"), ("", "ls"), ("ls", "lsof"), ("grep a", "grep b")]
    assert value("first_word", pairs) == 0.5


def test_macro_f1() -> None:
    # a: 1 hit of 2 found and 1 wanted = 2/3; b: 1 hit of 1 found and 2 wanted = 2/3; c: never hit = 0
    pairs = [("a", "a"), ("a", "b"), ("b", "b"), ("d", "c")]
    assert value("macro_f1", pairs, ("a", "b", "c")) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_positive_f1_is_of_the_last_label() -> None:
    pairs = [("spam", "spam"), ("spam", "ham"), ("ham", "spam"), ("ham", "ham"), ("Spam.", "spam")]
    assert value("positive_f1", pairs, ("ham", "spam")) == pytest.approx(2 * 2 / (3 + 3))


def test_entity_f1() -> None:
    pairs = [
        ("person: Ann; location: Rome", "person: ann; group: U2"),  # 1 of 2 found, 1 of 2 wanted
        ("none", "none"),
        ("none", "product: Pixel: 3"),  # missed; a colon in a name stays
        ("product: Pixel: 3; product: Pixel: 3", "product: Pixel: 3"),  # said twice counts once
    ]
    assert value("entity_f1", pairs) == pytest.approx(2 * 2 / (4 + 4))


def test_frames() -> None:
    wanted = json.dumps({"intent": "PlayMusic", "artist": "Nina", "year": "1965"})
    right = json.dumps({"intent": "PlayMusic", "year": "1965", "artist": "nina"})
    wrong = json.dumps({"intent": "GetWeather", "artist": "Nina", "city": "Bern"})
    pairs = [(right, wanted), (wrong, wanted), ('{"intent": ', wanted), ("[1]", wanted)]
    assert value("valid_json", pairs) == 0.5
    assert value("frame_intent", pairs) == 0.25
    assert value("slot_f1", pairs) == pytest.approx(2 * 3 / (4 + 8))


def test_rouge_l_takes_the_best_reference() -> None:
    row = Row("test", "x", "a dog ran", "", ("a dog ran", "the cat sat down"))
    found = estimate(measure("rouge_l"), ["the cat sat"], [row])
    assert found.value == pytest.approx(2 * 1 * 0.75 / 1.75)


def test_chrf_is_that_of_sacrebleu() -> None:
    from sacrebleu.metrics.chrf import CHRF

    answers = ["le chat est assis", "un petit programme", ""]
    targets = ["le chat était assis", "petit programme", "rien du tout"]
    expected = CHRF().corpus_score(answers, [targets]).score
    assert 30 < expected < 90
    assert value("chrf", list(zip(answers, targets, strict=True))) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("The Mill is a cheap pub by the river where children are welcome.", 5),
        ("The Mill is a pub.", 2),
        ("", 0),
        ("A family-friendly place with low prices", 2),
    ],
)
def test_slot_recall(answer: str, said: int) -> None:
    text = "name[The Mill], eatType[pub], priceRange[less than £20], area[riverside], familyFriendly[yes]"
    found = estimate(measure("slot_recall"), [answer], [Row("test", text, "x")])
    assert found.value == pytest.approx(said / 5)


def test_bootstrap_interval() -> None:
    counts = np.asarray([[1.0, 1.0]] * 60 + [[0.0, 1.0]] * 40)
    found = bootstrap(counts, share)
    # a binomial's standard error is sqrt(.6 * .4 / 100) = 0.049
    assert found.value == 0.6 and found.rows == 100
    assert found.low == pytest.approx(0.6 - 1.96 * 0.049, abs=0.015)
    assert found.high == pytest.approx(0.6 + 1.96 * 0.049, abs=0.015)
    assert bootstrap(counts, share) == found


@pytest.mark.parametrize("name", get_args(MeasureName))
def test_perfect_answers_score_highest(name: str) -> None:
    targets = {
        "entity_f1": "person: Ann",
        "valid_json": '{"intent": "a"}',
        "frame_intent": '{"intent": "a"}',
        "slot_f1": '{"intent": "a", "b": "c"}',
        "slot_recall": "The Mill",
    }
    target = targets.get(name, "spam")
    row = Row("test", "name[The Mill]", target, "", (target,))
    found = estimate(measure(name, ("spam",)), [target], [row])
    assert found.value == pytest.approx(100 if name == "chrf" else 1)
    assert estimate(measure(name, ("spam",)), ["~"], [row]).value < 0.01


def test_keep_drops_training_rows_that_fall_short() -> None:
    facts = "name[The Mill], eatType[pub], area[riverside]"
    rows = [
        Row(split, facts, target, "", (target,))
        for split in ("train", "dev")
        for target in ("The Mill is a pub on the riverside.", "The Mill is a pub.")
    ]
    recipe = msgspec.structs.replace(load_recipe("facts"), keep="slot_recall")
    assert kept(rows, recipe) == [rows[0], rows[2], rows[3]]
    assert kept(rows, msgspec.structs.replace(recipe, keep=None)) == rows
    assert recipe.fingerprint() != msgspec.structs.replace(recipe, keep=None).fingerprint()
