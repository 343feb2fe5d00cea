"""Requests are read clause by clause, each with the text, where the tags of their words do not tell enough."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from planning import TEXT as PACK_TEXT
from planning import write_plan_pack
from test_find_plan import FREE, LIKELY, NAMES, TEXT, brief, tagged
from test_find_plan import plan as by_tags

from loramix import Engine
from loramix.models.clauses import (
    MOST_CLAUSES,
    TEXT_WORDS,
    asked_somewhere,
    is_refused,
    read_clauses,
    spans_of,
)
from loramix.models.message_units import units_of
from loramix.models.plan import find_plan
from loramix.models.step_order import in_order
from loramix.models.text_frame import only_quotation, unframed

WORDS = {"sum": "summarize", "gist": "summarize", "positive": "sentiment", "French": "translate_fr"}


def reader(asked: list[str], sure: float = 0.97) -> Callable[[str], dict[str, float]]:
    """A gate that knows a few words: sure of one skill, torn between two, and for the base without any."""

    def read(message: str) -> dict[str, float]:
        asked.append(message)
        found = {WORDS[word] for word in WORDS if word.casefold() in message.split("\n\n")[0].casefold()} or {
            "base"
        }
        rest = dict.fromkeys([*NAMES[3:]], (1 - sure) / 5)
        return rest | dict.fromkeys(found, sure / len(found))

    return read


@pytest.mark.parametrize(
    ("message", "clauses"),
    [
        ("Sum it up, and is it positive? TEXT", ["Sum it up, ", "and is it positive? "]),
        ("TEXT\n\nGive me the gist plus the French version", ["Give me the gist", "plus the French version"]),
        ("Gist & mood: TEXT", ["Gist & ", "mood: "]),
        ("The gist - the mood - TEXT", ["The gist - ", "the mood - "]),
        ("First the gist. TEXT Then the mood.", ["First the gist. ", "Then the mood."]),
        ("Summarize this: TEXT", ["Summarize this: "]),
        ("A band plays: TEXT", ["A band plays: "]),
        ("Sum up, : TEXT)", ["Sum up, : "]),
        ("TEXT", []),
    ],
)
def test_a_request_is_cut_at_marks_and_joining_words(message: str, clauses: list[str]) -> None:
    text = message.index("TEXT"), message.index("TEXT") + 4
    found = [message[slice(*span)] for span in spans_of(message, [text])]
    assert [one.strip() for one in found] == [one.strip() for one in clauses]


def test_each_clause_is_read_with_the_text_and_without_its_joining_word() -> None:
    asked: list[str] = []
    long = "word " * 100
    message = f"Sum it up, and then say if it is positive: {long}"
    clauses, asks = read_clauses(message, [(43, len(message))], ["summarize", "sentiment"], reader(asked))
    text = " ".join(long.split()[:TEXT_WORDS])
    assert asked[0].startswith("Sum it up") and asked[1] == f"say if it is positive:\n\n{text}"
    assert [skill for skill, _ in asks] == ["summarize", "sentiment"] and len(clauses) == len(asked) == 2


def test_two_clauses_are_read_together_only_where_neither_is_clear() -> None:
    asked: list[str] = []
    message = "Dear all, look at this, sum it up: TEXT"
    read_clauses(message, [(35, 39)], ["summarize"], reader(asked))
    firsts = [question.split("\n\n")[0] for question in asked]
    assert firsts == ["Dear all,", "look at this,", "sum it up:", "Dear all, look at this,"]


def test_a_skill_is_asked_for_where_it_is_surest() -> None:
    def read(message: str) -> dict[str, float]:
        sure = {
            "Two things": ("sentiment", 0.85),
            "the gist": ("summarize", 0.9),
            "positive": ("sentiment", 0.95),
        }
        found = next((value for key, value in sure.items() if message.startswith(key)), ("base", 0.9))
        return {**dict.fromkeys(["sentiment", "summarize", "base"], 0.01), found[0]: found[1]}

    message = "Two things with this review. First, the gist. Second, positive or negative? TEXT"
    _, asks = read_clauses(message, [(76, 80)], ["sentiment", "summarize"], read)
    assert [skill for skill, _ in asks] == ["summarize", "sentiment"]
    assert message[slice(*asks[1][1])].startswith("positive")


@pytest.mark.parametrize("message", ["Sum it up: TEXT", "and so on, " * (MOST_CLAUSES + 1) + "TEXT"])
def test_one_clause_or_very_many_are_not_read(message: str) -> None:
    asked: list[str] = []
    at = message.index("TEXT")
    assert read_clauses(message, [(at, at + 4)], ["summarize"], reader(asked)) == ([], [])
    assert not asked and asked_somewhere("summarize", [])


def test_an_unlikely_skill_is_not_asked_for() -> None:
    message = "Sum it up, and is it positive? TEXT"
    clauses, asks = read_clauses(message, [(31, 35)], ["summarize"], reader([]))
    assert [skill for skill, _ in asks] == ["summarize"]
    assert asked_somewhere("sentiment", clauses) and not asked_somewhere("translate_fr", clauses)


SECOND = "[s|Is it positive or negative?] [o|Then] [m|the gist. ]" + TEXT


def plan(marked: str, classes: dict[str, float] | None = None) -> str:
    message, rows, places = tagged(marked)
    return brief(find_plan(rows, NAMES, places, message, classes or LIKELY, FREE, {}, reader([])))


def test_clauses_find_what_tags_overlook() -> None:
    classes = {"sentiment": 0.9, "summarize": 0.065}
    assert brief(by_tags(SECOND, classes)) == ""
    assert plan(SECOND, classes) == "sentiment | summarize"
    assert plan(SECOND, classes | {"summarize": 0.06}) == ""


def test_a_clause_without_a_hint_of_the_skill_in_its_tags_asks_for_nothing() -> None:
    assert plan("[s|Is it positive or negative?] [b|I am preparing a summary. ]" + TEXT) == ""


@pytest.mark.parametrize(
    ("clause", "refused"),
    [
        ("no translation needed, ", True),
        ("I don't need a translation or a gist ", True),
        ("I do not want it shortened. ", True),
        ("so no translating. ", True),
        ("and please don't translate it", True),
        ("without the gist", True),
        ("that's not what I'm after today", True),
        ("sans résumé", True),
        ("keine Übersetzung bitte", True),
        ("is it positive or not? ", False),
        ("I don't know if it is positive ", False),
        ("don't tell me if it is positive until you have the gist, ", False),
        ("don't give me the gist before it is in French, ", False),
        ("my mother doesn't read English, ", False),
        ("note the gist ", False),
    ],
)
def test_what_is_not_wanted_is_told_from_what_is(clause: str, refused: bool) -> None:
    assert is_refused(clause) == refused


def test_clauses_are_not_read_where_the_tags_are_clear() -> None:
    asked: list[str] = []
    for marked, count in (
        ("[m|Give me the gist,] [s|is it positive?] ", 0),
        ("[m|Give me the gist,] [s|is it positive,] [m|and sum it up?] ", 3),
        ("[m|Give me the gist,] [s|is it positive,] [o|without delay?] ", 2),
    ):
        message, rows, places = tagged(marked + TEXT)
        steps = find_plan(rows, NAMES, places, message, LIKELY, FREE, {}, reader(asked))
        assert brief(steps) == "summarize | sentiment" and len(asked) == count
        asked.clear()


def test_a_skill_that_is_not_wanted_is_no_step() -> None:
    assert plan("[f|No French please,] [m|just give me the gist: ]" + TEXT) == ""
    assert plan("[m|Give me the gist] [f|without the French, ]" + TEXT) == ""
    assert (
        plan("[m|Give me the gist,] [f|and the French] [o|without delay: ]" + TEXT)
        == "summarize | translate_fr"
    )


def test_a_skill_that_no_clause_asks_for_is_dropped() -> None:
    less = dict(LIKELY, translate_fr=0.15)
    assert plan("[s|Is it positive, I wonder?] [f|Be honest. ]" + TEXT, less) == ""
    assert plan("[s|Is it positive, I wonder?] [f|And in French. ]" + TEXT) == "sentiment | translate_fr"


def test_tags_decide_where_clauses_find_another_set() -> None:
    marked = "[s|Is it positive], [o|and] [m|the gist], [o|and] [e|who is named, positive or sum]: " + TEXT
    classes = dict(LIKELY, entities=0.3)
    message, rows, places = tagged(marked)

    def read(asked: str) -> dict[str, float]:
        found = {"summarize": 0.6, "sentiment": 0.3} if "who is" in asked else reader([])(asked)
        return found | ({"entities": 0.55} if "who is" in asked else {})

    steps = find_plan(rows, NAMES, places, message, classes, FREE, {}, read)
    assert brief(steps) == "sentiment | summarize | entities"


def test_words_for_an_answer_belong_to_the_clause_that_holds_them() -> None:
    marked = "[m|Give me the gist], [m|and then say] [a|that] [f|in French: ]" + TEXT
    assert plan(marked) == "summarize | translate_fr on answer"


@pytest.mark.parametrize(
    ("marked", "found"),
    [
        ("[m|Sum this up] [o|and] [e|list the names in that summary]: ", "summarize | entities on answer"),
        (
            "[f|Put it into French,] [o|then] [s|rate the tone of the French version]: ",
            "translate_fr | sentiment on answer",
        ),
        ("[m|Résume ce texte] [o|et] [e|donne les noms du résumé]: ", "summarize | entities on answer"),
        ("[f|French please] [o|and] [m|give me the summary]: ", "translate_fr | summarize"),
        ("[s|Good or bad?] [o|And] [e|the names in the result]: ", "sentiment | entities"),
        (
            "[f|In French], [o|then] [e|list the names that are in the] [o|French version]: ",
            "translate_fr | entities on answer",
        ),
        (
            "[m|A summary], [o|and then from that summary] [e|just the names]. ",
            "summarize | entities on answer",
        ),
        (
            "[f|In French], [o|then] [e|pick the names from the French text]: ",
            "translate_fr | entities on answer",
        ),
        ("[m|A summary], [o|and] [e|the names in the text, not in the summary]: ", "summarize | entities"),
    ],
)
def test_words_that_name_an_answer_are_about_it(marked: str, found: str) -> None:
    assert brief(by_tags(marked + TEXT)) == found


def test_mentions_count_for_before_alone() -> None:
    message = "Title for this, though before the title I want the mood: TEXT"
    asks = [("summarize", (0, 15)), ("sentiment", (23, 56))]
    mentions = [("summarize", (0, 5)), ("summarize", (30, 39)), ("sentiment", (47, 55)), ("spam", (3, 4))]
    assert in_order(asks, message, [(57, 61)]) == ["summarize", "sentiment"]
    assert in_order(asks, message, [(57, 61)], mentions) == ["sentiment", "summarize"]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ('Sum up "the soup was cold" for me', "the soup was cold"),
        ("Sum up 'the soup wasn't warm' for me", "the soup wasn't warm"),
        ("Sum up 'the waiters' manners were bad.' for me", "the waiters' manners were bad."),
        ("Résume « la soupe est froide » pour moi", "la soupe est froide"),
        ("Sum up “the soup was cold” for me", "the soup was cold"),
        ('Sum up "cold soup" quickly and kindly', None),
        ('Sum up "the soup was cold" and "the bread was old" for me', None),
        ("it ' s only a matter of time until ' they ' go", None),
        ("'Twas a good evening and the waiters' manners were perfect. We loved it!", None),
        ("The boys' soup wasn't warm and the cooks' bread wasn't new", None),
        ('the phone is 6" wide and "nice" to hold', None),
    ],
)
def test_a_message_may_hold_one_quotation(message: str, text: str | None) -> None:
    found = only_quotation(message)
    assert (found and message[slice(*found)]) == text


def text_of(marked: str) -> str | None:
    steps = by_tags(marked)
    return steps[0].text if steps else None


def test_a_cut_quotation_is_worked_on_whole() -> None:
    asks = "[m|Sum this up] [o|and] [s|rate it]: "
    assert (
        text_of(asks + '"The soup was cold. [o|Anyway], we left at once."')
        == "The soup was cold. Anyway, we left at once."
    )
    whole = 'The mayor, Anne Petit, said on Monday: "We will close the old bridge for lorries next week."'
    assert text_of(asks + whole) == whole
    mixed = '"Best burger I have eaten in all the years I have lived here," says my wife. I hated it.'
    assert text_of(asks + mixed) == mixed
    assert text_of(
        '"The soup was cold and thin." [o|- for the files I need] [m|a gist] [o|and] [s|the tone]'
    ) == ("The soup was cold and thin.")


def test_a_text_does_not_begin_within_a_word() -> None:
    message = "who's in it: 'Ann' isn't"
    units = units_of(np.zeros((len(message), 2)), [(i, i + 1) for i in range(len(message))], message)
    cost = {start: turn for (start, _), turn in zip(units.spans, units.turns, strict=False)}
    assert cost[message.index("'s")] == cost[message.index("s in")] == cost[message.index("in it")]
    assert cost[message.index("'Ann")] < cost[message.index("in it")]


def test_an_instruction_inside_the_quotation_asks_for_nothing() -> None:
    marked = '[m|Sum this up:] "The soup was cold and so was the tea. [s|Is it positive?]"'
    assert plan(marked) == ""


@pytest.mark.parametrize(
    "mark", [" ", "\t", "\n", ",", ", ", "and ", "before ", "'", '"', "- ", "no ", "don't "]
)
def test_long_runs_of_marks_take_no_minutes(mark: str) -> None:
    message = f"Sum it up and rate it: {mark * 20_000} the soup was cold. {mark * 20_000}"
    text = message.index("the soup"), message.index("the soup") + 18
    assert all(start < end for start, end in spans_of(message, [text]))
    assert only_quotation(message) is None
    assert unframed(message, (22, len(message)))[1] <= len(message)
    asks = [("summarize", (0, 9)), ("sentiment", (14, 21))]
    assert in_order(asks, message, [text]) == ["summarize", "sentiment"]


def test_two_quotations_are_not_made_one_text() -> None:
    marked = '[m|Sum up] "The soup was cold today" [s|and rate the tone of] "The bread was old and dry."'
    assert plan(marked) == ""


def test_a_last_word_before_a_new_line_belongs_to_the_text() -> None:
    assert text_of("The soup was cold and I was much happier then\n\n[m|Gist], [s|tone]") == (
        "The soup was cold and I was much happier then"
    )


def test_the_first_step_is_never_on_an_answer() -> None:
    marked = (
        "[m|Summarize] [a|the new version] [o|and] [e|tell me the names in] [a|the latest version]: " + TEXT
    )
    assert brief(by_tags(marked)) == "entities | summarize on answer"


def test_the_order_that_words_ask_for_is_kept_where_an_answer_is_meant() -> None:
    marked = "[f|Translate it into French] [o|once you have] [m|summarized] [a|it]: "
    message, rows, places = tagged(marked + TEXT)
    follows = {"translate_fr": ["summarize"]}
    steps = find_plan(rows, NAMES, places, message, LIKELY, FREE, follows)
    assert brief(steps) == "summarize | translate_fr on answer"


def test_more_than_three_wishes_are_answered_as_one() -> None:
    marked = "[m|Sum it up,] [f|in French,] [s|is it positive,] [o|who is in it]: "

    def read(asked: str) -> dict[str, float]:
        return {"entities": 0.95} if "who is" in asked else reader([])(asked)

    message, rows, places = tagged(marked.replace("[o|who", "[e|who") + TEXT)
    assert find_plan(rows, NAMES, places, message, LIKELY, FREE, {}, read) == ()


def test_what_is_not_wanted_is_about_no_answer() -> None:
    marked = "[m|Summarize this] [o|and] [s|tell me if it is positive,] [o|but] [a|don't translate it:] "
    assert "on answer" not in plan(marked + TEXT)


def test_words_that_name_the_text_are_not_about_an_answer() -> None:
    marked = "[m|Sum this up] [o|and] [e|list the names in the text, not the ones in the summary]: "
    assert text_of(marked + TEXT) and "on answer" not in brief(by_tags(marked + TEXT))


def test_the_runtime_reads_clauses_as_messages_of_their_own(tiny_pack: Path, tmp_path: Path) -> None:
    pack = write_plan_pack(tiny_pack, tmp_path / "pack")
    with closing(Engine.open(pack)) as engine:
        message = f"MMM, OO SSS: {PACK_TEXT}"
        classes = engine.routing._classes(f"SSS:\n\n{PACK_TEXT}")
        assert classes == pytest.approx(engine.route(f"SSS:\n\n{PACK_TEXT}").probabilities, abs=1e-6)
        route = engine.route(message)
        assert [step.skill for step in route.plan] == ["summarize", "sentiment"]
        assert route.timings["gate"] > 0
