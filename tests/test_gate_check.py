"""The program that measures a gate by kind of prompt: what it wants of a prompt, and how it counts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from gate_check import is_near, table
from gate_sets import Case, composed_cases, held_out_maker, parse_steps, steps_of

from loramix.defaults import BASE
from loramix.eval.routing import read_held_out
from loramix.models.plan import Step
from loramix.runtime.router import Route
from loramix.train.data import Row
from loramix.train.gate_pieces import parsed
from loramix.train.gate_turns import conversation
from loramix.train.recipe import load_recipe, shipped

ROWS = {
    name: [Row("test", f"The {name} text no. {i} has some more words.", "t") for i in range(9)]
    for name in shipped()
}
pytestmark = pytest.mark.train


def test_marks_say_which_step_works_on_an_answer() -> None:
    def steps(template: str) -> str:
        return str(steps_of(parsed(template, "x")))

    both = "[summarize: gist], [translate_fr: French]: {input}"
    assert steps(both) == "(('summarize', 'text'), ('translate_fr', 'text'))"
    chain = str((("summarize", "text"), ("translate_fr", "answer")))
    assert steps("[summarize: gist], [answer: in] [translate_fr: French]: {input}") == chain
    assert steps("[answer: In] [translate_fr: French], [summarize: the gist]: {input}") == chain
    assert steps("[summarize: gist], [translate_fr: translate] [answer: it]. {input}") == chain


def test_keys_of_the_measured_set_are_steps() -> None:
    assert parse_steps("a + b > c") == (("a", "text"), ("b", "text"), ("c", "answer"))


@pytest.mark.parametrize(
    ("found", "near"),
    [
        ("a b c d e", True),
        ("b c d e", True),
        ("c d e", True),
        ("d e", False),
        ("x a b c d e y", True),
        ("a c d e", False),
    ],
)
def test_a_text_may_be_off_by_two_words_at_its_ends(found: str, near: bool) -> None:
    assert is_near(found, "a b c d e") == near


def test_the_measured_requests_stand_on_test_rows() -> None:
    general = [name for name in shipped() if load_recipe(name).any_text]
    found = composed_cases(ROWS, general)
    composed = [case for case in found if case.kind == "composed"]
    assert len(composed) == 244 and all(case.text in case.messages[0]["content"] for case in composed)
    assert all(len(case.steps) in (2, 3) and case.wanted == case.steps[0][0] for case in composed)
    assert sum(case.kind == "hostile, one or none" for case in found) > 15


def test_held_out_requests_are_of_held_out_wordings_alone() -> None:
    recipes = {name: load_recipe(name) for name in shipped()}
    held = read_held_out(Path(__file__).parent.parent / "benchmarks" / "heldout.toml")
    maker = held_out_maker(recipes, ROWS, held)
    known = {t for name in recipes for t in (*held[name]["templates"], *held[name]["plain"])}
    known |= set(held["none"]["templates"])
    assert {maker.embedded(name).group for name in (*maker.general, BASE) for _ in range(20)} <= known
    assert {conversation(maker).kind for _ in range(60)} > {"turns again", "turns switch"}


def test_figures_count_prompts_by_kind() -> None:
    def route(*names: str, answer: bool = False) -> Route:
        plan = tuple(Step(name, "one two", (0, 7), answer and i > 0) for i, name in enumerate(names))
        mixes = [{name: 1.0} for name in names]
        shares = {"a": 0.5, "b": 0.3, BASE: 0.2}
        return Route(
            mixes[0] if mixes else {}, shares, "", "each", tuple(mixes[1:]), plan if len(plan) > 1 else ()
        )

    message = [{"role": "user", "content": "one two"}]
    two, chain = (("a", "text"), ("b", "text")), (("a", "text"), ("b", "answer"))
    cases = [
        Case(message, "own", "a"), Case(message, "own", "b"), Case(message, "none", BASE),
        Case(message, "composed", "a", two, "one two"),
        Case(message, "composed", "a", chain, "one two three four five"),
        Case(message, "composed", "a", two, "one two"),
    ]  # fmt: skip
    routes = [route("a"), route("a", "b"), route(), route("a", "b"), route("a", "b", answer=True), route("a")]
    found = {name: (round(one["value"], 3), one["n"]) for name, one in table(cases, routes).items()}
    assert found["own"] == (0.5, 2) and found["none"] == (1.0, 1)
    assert found["skill prompts left to the base"] == (0.0, 2)
    assert found["second answers to one thing or none"] == (0.333, 3)
    assert found["composed: skills in order"] == (0.667, 3) and found["composed: as one"] == (0.333, 3)
    assert found["composed: steps exact"] == (0.667, 3) and found["composed: text within two words"] == (
        0.5,
        2,
    )
    assert found["composed: on the answer, where asked"] == (1.0, 1)
