"""Prompts that a gate is measured on, each with what it should say of it.

``dev``: wordings that no training sees, on rows of dev; what is chosen is chosen on them. ``test``: the wordings of
``heldout.toml``, ``heldout_turns.toml`` and ``tests/composed.toml``, on rows of test.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import msgspec

from loramix.defaults import BASE
from loramix.eval.routing import questions, read_held_out
from loramix.models.message_reading import ANSWER, TEXT
from loramix.prompts import Message, fill
from loramix.train.data import Row
from loramix.train.gate_collect import collect_from
from loramix.train.gate_data import NonePhrasings, Phrasings
from loramix.train.gate_pieces import OTHER, UNKNOWN, Piece, Request
from loramix.train.gate_requests import Maker
from loramix.train.gate_turns import conversation
from loramix.train.gate_wordings import Embedded, Turns, Whole, load_wordings
from loramix.train.recipe import Recipe, load_recipe
from loramix.train.sources import read_sources

HERE = Path(__file__).resolve().parent
COMPOSED = HERE.parent / "tests" / "composed.toml"
Steps = tuple[tuple[str, str], ...]
"""(skill, ``text`` or ``answer``) of each step."""


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt with what is wanted."""

    messages: list[Message]
    kind: str
    wanted: str
    """The class; of a request for several things that of the first step."""
    steps: Steps = ()
    """Two or three; empty: it is for one thing or none."""
    text: str = ""
    """What the steps work on, where it is known."""


def test_rows(skills: Sequence[str], data: Path) -> tuple[dict[str, Recipe], dict[str, list[Row]]]:
    """The broad recipes, and all test rows of their sources."""
    recipes = {name: load_recipe(f"broad/{name}") for name in skills}
    rows = {
        name: [row for rows in read_sources(recipes[name], data) for row in rows if row.split == "test"]
        for name in skills
    }
    for name, found in rows.items():
        random.Random(name).shuffle(found)
    return recipes, rows


def dev_cases(skills: Sequence[str], data: Path, files: Sequence[Path], per_skill: int) -> list[Case]:
    """Prompts to choose on."""
    return [case_of(one) for one in collect_from(skills, data, files, per_skill=per_skill, dev=True)]


def case_of(request: Request) -> Case:
    """A made request as a case."""
    messages: list[Message] = [{"role": turn.role, "content": turn.text} for turn in request.turns]
    pieces = request.turns[-1].pieces
    steps: Steps = ()
    if len(request.target) > 1:
        known = all(piece.tag != UNKNOWN for piece in pieces)
        steps = steps_of(pieces) if known else tuple((name, "text") for name in request.target)
    text = next((piece.text for piece in pieces if piece.tag == TEXT), "")
    wanted = steps[0][0] if steps else max(request.target, key=request.target.__getitem__)
    return Case(messages, request.kind, wanted, steps, text)


def steps_of(pieces: Sequence[Piece]) -> Steps:
    """The steps that the tags of a request's words mean, in the order in which they are carried out."""
    said = [p for p in pieces if p.tag != OTHER or p.text.strip()]
    order = list(dict.fromkeys(p.tag for p in said if p.tag not in (OTHER, TEXT, ANSWER)))
    late = set()
    for (before, words), (_, behind) in zip(
        pairwise([Piece(""), *said]), pairwise([*said, Piece("")]), strict=True
    ):
        if words.tag == ANSWER:
            late.add(next((p.tag for p in (behind, before) if p.tag in order), order[-1]))
    if order[0] in late:
        order[0], order[1] = order[1], order[0]
    return tuple((name, "answer" if i and name in late else "text") for i, name in enumerate(order))


def test_cases(skills: Sequence[str], data: Path, files: Sequence[Path]) -> list[Case]:
    """Prompts of the test: nothing is chosen on them."""
    recipes, rows = test_rows(skills, data)
    held = read_held_out(HERE / "heldout.toml")
    found = [
        Case([{"role": "user", "content": q.text}], name, q.wanted)
        for name, group in questions(recipes, rows, held, files).items()
        for q in group
    ]
    maker = held_out_maker(recipes, rows, held)
    rng = random.Random(0)
    classes = [*maker.general, BASE]
    found += [
        replace(case_of(maker.embedded(rng.choice(classes))), kind="instructions inside texts")
        for _ in range(200)
    ]
    found += [replace(case_of(conversation(maker)), kind="follow-ups") for _ in range(400)]
    return [*found, *composed_cases(rows, maker.general)]


def held_out_maker(
    recipes: Mapping[str, Recipe],
    rows: Mapping[str, Sequence[Row]],
    held: Mapping[str, Mapping[str, list[str]]],
) -> Maker:
    """Makes requests of the held-out wordings alone."""
    later = tomllib.loads((HERE / "heldout_turns.toml").read_text(encoding="utf-8"))
    known = load_wordings()
    wordings = replace(
        known,
        asks={"none": []},
        long={"none": []},
        tongues={"none": []},
        grammar={},
        tasks=[],
        embedded=Embedded(texts=[], **later.pop("embedded")),
        turns=Turns(answers=known.turns.answers, **later),
        whole=Whole([], []),
    )
    asked = {name: {"any": [*held[name]["templates"], *held[name]["plain"]]} for name in recipes}
    none = NonePhrasings(held["none"]["templates"], held["none"]["prompts"])
    bare = {name: msgspec.structs.replace(one, instructions={}, asks={}) for name, one in recipes.items()}
    return Maker(bare, rows, dev=None, phrasings=Phrasings(asked, none, {}), wordings=wordings)


def composed_cases(rows: Mapping[str, Sequence[Row]], general: Sequence[str], each: int = 2) -> list[Case]:
    """The requests for several things of ``tests/composed.toml``, each on two texts, and its hostile messages."""
    held = tomllib.loads(COMPOSED.read_text(encoding="utf-8"))
    rng = random.Random(0)
    found = []
    for key, templates in held["templates"].items():
        steps = parse_steps(key)
        own = [name for name, _ in steps if name not in general]
        among = [
            r.input
            for name in (own or [n for n, _ in steps])
            for r in rows[name]
            if 20 <= len(r.input) <= 500
        ]
        for template in templates:
            for text in rng.sample(among, each):
                message: Message = {"role": "user", "content": fill(template, text)}
                found.append(Case([message], "composed", steps[0][0], steps, text))
    for one in held["hostile"]:
        steps = parse_steps(one["steps"]) if one["steps"] else ()
        message = {"role": "user", "content": one["message"]}
        kind = "hostile, several" if steps else "hostile, one or none"
        found.append(Case([message], kind, steps[0][0] if steps else "", steps, one.get("text", "")))
    return found


def parse_steps(key: str) -> Steps:
    """``a + b > c`` as steps: what stands behind ``>`` works on the answer before."""
    names, marks = re.split(r" [+>] ", key), ["+", *re.findall(r" ([+>]) ", key)]
    return tuple((name, "answer" if mark == ">" else "text") for name, mark in zip(names, marks, strict=True))
