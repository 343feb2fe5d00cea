"""Requests that the early gate is trained on: what they say of themselves must be true."""

from __future__ import annotations

import random
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from loramix.defaults import BASE
from loramix.errors import InvalidRecipe
from loramix.models.gate_window import GAP, MAX_CHARACTERS, window
from loramix.models.message_reading import TEXT
from loramix.train.data import Row
from loramix.train.gate_pieces import Piece, Request, Turn, asked_by, cut, plain, read_turns, user
from loramix.train.gate_requests import LONG, Maker
from loramix.train.gate_styles import spoken, styled, typos
from loramix.train.gate_turns import conversation
from loramix.train.gate_wordings import DIRECTORY, is_dev, load_wordings, of_part, sentence
from loramix.train.recipe import load_recipe, shipped

SKILLS = shipped()
HELD_OUT = Path(__file__).parent.parent / "benchmarks"


def rows(name: str) -> list[Row]:
    return [
        Row("train", f"The {name} text no. {i} is here. It has two sentences.", f"{name} {i}")
        for i in range(30)
    ]


@pytest.fixture(scope="module")
def maker() -> Maker:
    return Maker({name: load_recipe(name) for name in SKILLS}, {name: rows(name) for name in SKILLS})


@pytest.fixture(scope="module")
def many(maker: Maker) -> list[Request]:
    made = [maker.skill(name) for name in SKILLS for _ in range(40)]
    made += [maker.embedded(name) for name in [*SKILLS, BASE] for _ in range(15)]
    return made + [maker.none() for _ in range(200)] + [conversation(maker) for _ in range(500)]


def test_each_request_is_wanted_by_one_class_and_its_words_say_which(many: list[Request]) -> None:
    for request in many:
        assert sum(request.target.values()) == 1 and set(request.target) <= {*SKILLS, BASE}
        assert request.turns[-1].role == "user" and request.text.strip()
        tags = {piece.tag for piece in request.turns[-1].pieces} - {TEXT, "", "?"}
        assert tags <= set(request.target), (tags, request)


def test_a_text_s_own_words_are_tagged_as_text(maker: Maker) -> None:
    texts = {row.input for name in SKILLS for row in maker.rows[name]}
    for _ in range(200):
        request = maker.skill(maker.rng.choice(SKILLS), style=False)
        [piece] = [piece for piece in request.turns[0].pieces if piece.tag == TEXT]
        assert piece.text in texts or (len(piece.text) <= LONG and any(text in piece.text for text in texts))


def test_instructions_inside_a_text_are_text(maker: Maker) -> None:
    seen = 0
    for _ in range(150):
        request = maker.embedded("summarize")
        assert request.target == {"summarize": 1.0}
        inside = plain(piece for piece in request.turns[0].pieces if piece.tag == TEXT)
        seen += inside.casefold().strip() not in {
            row.input.casefold() for n in SKILLS for row in maker.rows[n]
        }
    assert seen == 150, "each text must hold an instruction besides the row's own words"


def test_a_marked_template_asks_about_a_text_with_an_instruction(maker: Maker) -> None:
    found = [maker.embedded(name) for name in [*SKILLS, BASE] for _ in range(60)]
    marked = [request for request in found if request.group in maker.singles]
    assert len(marked) > 20, "whole templates are among them"
    for request in marked:
        assert list(asked_by(request.group)) == list(request.target)
        assert [piece for piece in request.turns[0].pieces if piece.tag == TEXT and piece.text.strip()]


def test_training_and_what_is_chosen_on_share_no_wording(maker: Maker) -> None:
    dev = Maker(maker.recipes, maker.rows, dev=True)
    for name in [*SKILLS, BASE]:
        own = {wording.text for pool in maker.pools[name].values() for wording in pool}
        other = {wording.text for pool in dev.pools[name].values() for wording in pool}
        assert own and other and not own & other


def test_conversations_follow_what_was_asked(maker: Maker) -> None:
    lists = maker.wordings.turns
    kinds: Counter[str] = Counter()
    for _ in range(600):
        request = conversation(maker)
        [wanted] = request.target
        kind = request.kind.removeprefix("turns ")
        kinds[kind] += 1
        assert [turn.role for turn in request.turns] == ["user", "assistant"] * (len(request.turns) // 2) + [
            "user"
        ]
        if kind in ("chat", "base", "none"):
            assert wanted == BASE
        if kind == "switch":
            assert request.group in lists.switch[wanted]
        if kind == "refine" and wanted != BASE:
            assert request.group in lists.refine[wanted]
        if kind == "again" and len(request.turns) == 3:
            before = {piece.tag for piece in request.turns[0].pieces} - {TEXT, "", "?"}
            assert wanted in before or not before
    assert min(kinds[kind] for kind in ("again", "chat", "base", "switch", "refine", "new", "none")) > 5


def test_the_gate_is_trained_on_what_it_will_read(many: list[Request]) -> None:
    for request in many:
        messages = [{"role": turn.role, "content": turn.text} for turn in request.turns]
        assert [{"role": turn.role, "content": turn.text} for turn in read_turns(request)] == window(messages)


def test_a_long_conversation_costs_no_more_than_a_short_one() -> None:
    said = [
        {"role": role, "content": f"{i} " + role * 300} for i in range(9) for role in ("user", "assistant")
    ]
    found = window(
        [
            {"role": "system", "content": "Be kind."},
            *said,
            {"role": "user", "content": "and this: " + "x" * 5000},
        ]
    )
    assert found[-1]["content"].startswith("and this: ") and GAP in found[-1]["content"]
    assert sum(len(message["content"]) for message in found) <= MAX_CHARACTERS + len(GAP) * len(found)
    assert [message["role"] for message in found] == ["user", "assistant", "user"]
    assert not any(message["role"] == "system" for message in found)


def test_one_message_is_read_whole() -> None:
    text = "x" * 9000
    assert window([{"role": "system", "content": "s"}, {"role": "user", "content": text}]) == [
        {"role": "user", "content": text}
    ]


def test_short_turns_are_kept_as_they_are() -> None:
    messages = [
        {"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "hello"), ("user", "why?"))
    ]
    assert window(messages) == messages


@pytest.mark.parametrize("sizes", [(10, 400, 10), (300, 1, 300), (200, 200, 200), (1000, 0, 3)])
def test_cut_pieces_are_the_cut_text(sizes: tuple[int, ...]) -> None:
    pieces = [Piece(letter * size, letter) for letter, size in zip("abc", sizes, strict=True)]
    whole = plain(pieces)
    for limit in ((200, 160), (30, 20), (90, 70)):
        expected = (
            whole[: limit[0]] + GAP + whole[-limit[1] :] if len(whole) > sum(limit) + len(GAP) else whole
        )
        found = cut(pieces, limit)
        assert plain(found) == expected
        assert all(set(piece.text) <= {piece.tag} for piece in found if piece.tag)


def test_a_style_changes_no_pasted_text_but_where_it_is_spoken(maker: Maker) -> None:
    pieces = (Piece("Is this spam? ", "spam"), Piece("Call NOW, win £1000!", TEXT))
    styles, rng = maker.wordings.styles, random.Random(3)
    for _ in range(200):
        found = styled(pieces, styles, rng)
        text = plain(piece for piece in found if piece.tag == TEXT)
        assert text.strip() in ("Call NOW, win £1000!", "call now win £1000")
        assert any(piece.tag == "spam" for piece in found)


def test_speech_has_no_marks_and_no_capitals(maker: Maker) -> None:
    for seed in range(40):
        found = spoken(
            (Piece("Who's there? TELL me.", BASE),), maker.wordings.styles, random.Random(seed), False
        )
        assert plain(found) == plain(found).lower() and not set("?.,!") & set(plain(found)) - set("'")


def test_typos_change_words_but_few() -> None:
    text = "Summarize the following paragraph without further explanation please"
    found = {typos(text, random.Random(seed), 0.3) for seed in range(50)}
    assert len(found) > 30 and all(abs(len(t) - len(text)) < 9 for t in found)
    assert typos("a to of it", random.Random(0), 1.0) == "a to of it"


def test_made_sentences_leave_no_part_open(maker: Maker) -> None:
    rng = random.Random(5)
    for dev in (False, True):
        for _ in range(300):
            assert "{" not in sentence(maker.wordings.grammar, ["sunflower"], rng, dev=dev)


def test_a_wording_is_always_in_the_same_part() -> None:
    wordings = [f"wording {i}" for i in range(2000)]
    dev = [wording for wording in wordings if is_dev(wording)]
    assert 0.1 < len(dev) / len(wordings) < 0.18
    assert of_part(wordings, dev=True) == dev and of_part(["only"], dev=not is_dev("only")) == ["only"]


def test_held_out_wordings_are_in_no_list() -> None:
    def normal(text: str) -> str:
        return "".join(letter for letter in text.replace("{input}", "").casefold() if letter.isalnum())

    lists = load_wordings()
    mine = [
        t for lists_ in (lists.asks, lists.long, lists.tongues) for group in lists_.values() for t in group
    ]
    mine += lists.tasks + lists.embedded.notes + [t for group in lists.messages.values() for t in group]
    turns = lists.turns
    follow_ups = list(turns.again + turns.chat + turns.base)
    follow_ups += [t for table in (turns.refine, turns.switch) for group in table.values() for t in group]
    held = tomllib.loads((HELD_OUT / "heldout.toml").read_text())
    phrasings = {normal(t) for part in held.values() for group in part.values() for t in group}
    assert not {normal(t) for t in mine} & phrasings
    later = tomllib.loads((HELD_OUT / "heldout_turns.toml").read_text())
    words = later["again"] + later["chat"] + later["base"] + later["embedded"]["notes"]
    words += [t for table in (later["refine"], later["switch"]) for group in table.values() for t in group]
    assert not {normal(t) for t in mine + follow_ups} & {normal(t) for t in words}


@pytest.mark.parametrize("name", ["asks", "long", "turns", "styles", "composed_whole", "messages"])
def test_a_damaged_list_is_named(tmp_path: Path, name: str) -> None:
    for file in DIRECTORY.glob("*.toml"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / f"{name}.toml"
    path.write_text(
        path.read_text().replace("{input}", "{text}", 3)
        if name in ("long", "turns", "composed_whole")
        else "unheard = 3\n"
    )
    with pytest.raises(InvalidRecipe, match=name):
        load_wordings(tmp_path)


def test_a_text_alone_is_a_request_of_the_base() -> None:
    turn = Turn("user", user(Piece("Only a text.", TEXT)).pieces)
    assert turn.text == "Only a text."
