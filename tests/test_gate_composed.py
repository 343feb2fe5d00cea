"""Requests for several skills: the marks in their templates, and the set that measures them."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from loramix.defaults import BASE
from loramix.models.clauses import TEXT_WORDS
from loramix.models.message_reading import ANSWER, TEXT
from loramix.train.data import Row
from loramix.train.gate_composed import alike, clause_of, composed
from loramix.train.gate_pieces import OTHER, UNKNOWN, Piece, Request, asked_by, parsed, plain
from loramix.train.gate_requests import Maker
from loramix.train.gate_run import tag_names, turns_of
from loramix.train.gate_wordings import load_wordings
from loramix.train.recipe import load_recipe, shipped

SKILLS = shipped()
TEXTS = {name: [f"The {name} text no. {i}. It has two sentences." for i in range(20)] for name in SKILLS}
MEASURED = Path(__file__).parent / "composed.toml"


def maker_of(*skills: str, dev: bool = False, seed: int = 0) -> Maker:
    rows = {name: [Row("train", text, "t") for text in TEXTS[name]] for name in skills}
    return Maker({name: load_recipe(name) for name in skills}, rows, dev=dev, seed=seed)


@pytest.fixture(scope="module")
def many() -> list[Request]:
    maker = maker_of(*SKILLS)
    return [request for _ in range(1000) if (request := composed(maker)) is not None]


def test_marks_say_what_words_ask_for() -> None:
    found = parsed("[summarize: Sum up], [answer: in] [translate_fr: French]: {input}!", "[a: b]")
    assert found == (
        Piece("Sum up", "summarize"), Piece(", ", OTHER), Piece("in", ANSWER), Piece(" ", OTHER),
        Piece("French", "translate_fr"), Piece(": ", OTHER), Piece("[a: b]", TEXT), Piece("!", OTHER),
    )  # fmt: skip
    assert plain(parsed("{input} [sentiment: or not?] {input}", "x")) == "x or not? x"


def test_each_skill_has_words_of_its_own_in_the_order_of_the_steps(many: list[Request]) -> None:
    counts: Counter[int] = Counter()
    for request in many:
        tags = [piece.tag for piece in request.turns[0].pieces]
        asked = list(dict.fromkeys(tag for tag in tags if tag not in (OTHER, TEXT, ANSWER)))
        if asked != [UNKNOWN]:
            assert set(asked) == set(request.target), request
        assert TEXT in tags and sum(request.target.values()) == pytest.approx(1)
        counts[len(request.target)] += 1
        assert not re.search(r"\{(do|ask|get|tag|Tag|asks|it)\}", request.group), "each slot is filled"
    assert set(counts) == {2, 3} and counts[2] > 5 * counts[3] > 0


def test_words_for_an_answer_stand_next_to_a_step_that_has_one_before(many: list[Request]) -> None:
    answers = load_wordings().composed.asks
    chains = [r for r in many if any(piece.tag == ANSWER for piece in r.turns[0].pieces)]
    assert 0.05 < len(chains) / len(many) < 0.4
    for request in chains:
        assert any(answers[name].answer for name in request.target), request


def test_a_skill_s_own_texts_are_used_where_it_needs_them(many: list[Request]) -> None:
    own = [request for request in many if "intent" in request.target]
    texts = {text.casefold() for text in TEXTS["intent"]}
    for request in own:
        [text, *_] = [p.text for p in request.turns[0].pieces if p.tag == TEXT]
        assert text.strip().casefold() in texts or text.islower()  # or as it is spoken
    assert len(own) > 20


def test_one_skill_alone_cannot_be_asked_for_twice() -> None:
    assert composed(maker_of("sentiment")) is None and composed(maker_of("sql", "shell")) is None
    assert composed(maker_of("sentiment", "sql")) is None, "no text is for both"
    found = composed(maker_of("sentiment", "intent"))
    assert found is not None and set(found.target) == {"sentiment", "intent"}


def test_whole_templates_say_what_they_ask_for() -> None:
    whole = load_wordings().whole
    assert len(whole.templates) > 1000 and len(whole.singles) > 200
    assert asked_by("[answer: In] [translate_fr: French], [summarize: the gist], [translate_fr: please]: {input}") == (
        "translate_fr", "summarize",
    )  # fmt: skip
    for template in whole.templates:
        names = asked_by(template)
        assert 2 <= len(names) <= 3 and set(names) <= set(SKILLS), template
        assert not re.search(r"\[[a-z_]+: ", re.sub(r"\[[\w-]+: [^\]]*\]", "", template)), template
    for template in whole.singles:
        assert len(set(asked_by(template)) - {BASE}) <= 1 and set(asked_by(template)) <= {*SKILLS, BASE}, (
            template
        )


def test_a_clause_is_a_request_of_its_own() -> None:
    maker = maker_of(*SKILLS)
    found = [request for _ in range(300) if (request := clause_of(maker)) is not None]
    wanted = Counter(name for request in found for name in request.target)
    assert len(found) > 200 and {"summarize", "sentiment", "translate_fr", BASE} <= set(wanted)
    texts = {text.casefold() for group in TEXTS.values() for text in group}
    for request in found:
        clause, _, text = request.text.rpartition("\n\n")
        assert len(text.split()) <= TEXT_WORDS and request.target.keys() <= {*SKILLS, BASE}
        assert not any(whole in clause.casefold() for whole in texts), "the text is no part of the clause"
    assert clause_of(maker_of("sentiment")) is None


def test_two_verbs_are_not_two_skills() -> None:
    maker = maker_of(*SKILLS)
    kinds: Counter[str] = Counter()
    for _ in range(300):
        request = alike(maker)
        [wanted] = request.target
        kinds[request.kind] += 1
        tags = {piece.tag for piece in request.turns[0].pieces} - {OTHER, TEXT, ANSWER}
        if request.kind == "two verbs":
            assert tags == {wanted} and wanted in SKILLS
        if request.kind == "partly served":
            assert wanted == BASE and BASE in tags and len(tags) == 2
        if request.kind == "two for none":
            assert tags == {BASE} and wanted == BASE
    assert set(kinds) == {"two verbs", "partly served", "two for none"} and min(kinds.values()) > 30
    assert alike(maker_of("sql")).kind in kinds


def test_tags_are_numbered_by_their_names() -> None:
    names = tag_names(["b", "a"])
    assert names == ["other", "text", "b", "a", "base", "answer"]
    maker = maker_of("sentiment", "summarize")
    request = composed(maker)
    assert request is not None
    [(role, pieces)] = turns_of(request, ["summarize", "sentiment"])
    wanted = {TEXT: 1, "summarize": 2, "sentiment": 3, BASE: 4, ANSWER: 5, OTHER: 0, UNKNOWN: -1}
    assert role == "user"
    assert [number for _, number in pieces] == [wanted[piece.tag] for piece in request.turns[0].pieces]


def test_training_and_dev_share_hardly_a_template() -> None:
    seen, held = (
        {request.group for _ in range(300) if (request := composed(maker)) is not None}
        for maker in (maker_of(*SKILLS), maker_of(*SKILLS, dev=True))
    )
    assert len(seen & held) < 0.05 * len(held), "only of lists so short that a part would be empty"


def test_the_set_that_measures_is_in_no_list() -> None:
    def normal(text: str) -> str:
        plain_text = re.sub(r"\[[\w-]+: ([^\]]*)\]", r"\1", text).replace("{input}", "")
        return "".join(letter for letter in plain_text.casefold() if letter.isalnum())

    lists = load_wordings().whole
    mine = {normal(t) for t in (*lists.templates, *lists.singles)}
    measured = tomllib.loads(MEASURED.read_text())
    theirs = [template for group in measured["templates"].values() for template in group]
    held = tomllib.loads((MEASURED.parent.parent / "benchmarks" / "heldout.toml").read_text())
    theirs += [template for part in held.values() for group in part.values() for template in group]
    assert len(theirs) > 120 and not mine & set(map(normal, theirs))
    assert all(template.count("{input}") == 1 for template in theirs if "{input}" in template)


def test_the_set_that_measures_is_consistent() -> None:
    measured = tomllib.loads(MEASURED.read_text())
    assert sum(map(len, measured["templates"].values())) >= 120 and len(measured["hostile"]) >= 40
    steps = [*measured["templates"], *(one["steps"] for one in measured["hostile"] if one["steps"])]
    for text in steps:
        names = re.split(r" [+>] ", text)
        assert 2 <= len(names) <= 3 and len(set(names)) == len(names) and set(names) <= set(SKILLS), text
    for one in measured["hostile"]:
        assert bool(one["steps"]) == ("text" in one) and one.get("text", "") in one["message"], one
