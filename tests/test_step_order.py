"""The order of steps where a request does not mention them in it."""

import re

import pytest

from loramix.models.step_order import Ask, in_order

S, E, T = "summarize", "entities", "translate_fr"


def order(marked: str) -> str:
    """Order of a message whose asks stand in brackets such as ``[s:gist]``; ``{…}`` is the text."""
    message, asks, texts = "", list[Ask](), []
    names = {"s": S, "e": E, "t": T}
    for skill, ask, text, other in re.findall(r"\[(\w):([^]]*)\]|\{([^}]*)\}|([^[{]+)", marked):
        start = len(message)
        message += ask or text or other
        if skill:
            asks.append((names[skill], (start, len(message))))
        elif text:
            texts.append((start, len(message)))
    return "".join(name[0] for name in in_order(asks, message, texts))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("[s:Give the gist] and then [e:list the names]: {Ann left.}", "se"),
        ("Before you [s:sum it up], [e:list the names]: {Ann left.}", "es"),
        ("[s:Before summarizing], [e:list the names] in it: {Ann left.}", "es"),
        ("{Ann left.} Before [t:putting it in French] please [e:list the names].", "et"),
        ("Avant de [t:traduire], [e:donne les noms] : {Ann left.}", "et"),
        ("[e:List the names] before you [s:sum it up]: {Ann left.}", "es"),
        ("[e:List the names] before [s:summing it up] and [t:putting it in French]: {Ann left.}", "est"),
        ("[s:Sum it up], but before you do that [e:list the names]: {Ann left.}", "es"),
        ("[s:Sum this up]. Before that, [e:list the names]: {Ann left.}", "es"),
        ("[s:Title] for this, though before the [s:title] I want [e:the names]: {Ann left.}", "es"),
        ("Don't [e:list the names] until you've [s:summed it up]: {Ann left.}", "se"),
        ("[e:List the names] and wait until I say so, [s:sum it up]: {Ann left.}", "es"),
        ("[t:Put it in French] after you have [s:summed it up]: {Ann left.}", "st"),
        ("[t:Put it in French] once [s:summarized]: {Ann left.}", "st"),
        ("[s:Sum it up] and after that [e:list the names]: {Ann left.}", "se"),
        ("[s:Sum it up], and once you have done so [e:list the names]: {Ann left.}", "se"),
        ("[s:Sum it up] and, once [s:summed up], [t:put it in French]: {Ann left.}", "st"),
        ("[t:In French], but [s:sum it up] first: {Ann left.}", "st"),
        ("[t:French version]. But first [s:sum it up]: {Ann left.}", "st"),
        ("First [e:list the names], then [s:sum it up]: {Ann left.}", "es"),
    ],
)
def test_words_for_the_order(message: str, expected: str) -> None:
    assert order(message) == expected


@pytest.mark.parametrize(
    "message",
    [
        "Before anything else, [s:summarize this]; then [e:list the names]: {Ann left.}",
        "Before [s:anything else, summarize this]; then [e:list the names]: {Ann left.}",
        "I have to send this before 5 pm. Please [s:summarize it] and [e:list the names]: {Ann left.}",
        "I was here before. [s:Summarize this], then [e:list the names]: {Ann left.}",
        "As I said before, [s:summarize this] and then [e:list the names]: {Ann left.}",
        "Before you reply, read it twice. [s:Summarize it], then [e:list the names]: {Ann left.}",
        "Before lunch [s:I need you to summarize this] and [e:list the names]: {Ann left.}",
        "[s:Summarize it] once, then [e:list the names] in it: {Ann left.}",
        "[s:Summarize the text] once again and [e:give me the names]: {Ann left.}",
        "[s:Summarize it] and once more [t:in French]: {Ann left.}",
        "[s:Summarize the text] after the colon and [e:list the names]: {Ann left.}",
        "[s:Summarize what happened] after [e:the dinner and list the names of all]: {Ann left.}",
        "[s:Summarize this email] I got the day after, and [e:list the names]: {Ann left.}",
        "[s:Summarize this], but first names only [e:in the list of names], please: {Ann left.}",
        "[s:Summarize it], not until the end but in full, and [e:list names]: {Ann left.}",
    ],
)
def test_the_same_words_about_other_things_change_nothing(message: str) -> None:
    assert order(message)[0] == "s"


def test_words_of_the_text_say_nothing() -> None:
    text = "{She left before the end. Nobody knew until noon, but he was first.}"
    assert order(f"{text} [s:Gist], [e:names].") == "se"
    assert order(f"[s:Gist] of {text} and [e:names]") == "se"


def test_nothing_is_asked_for() -> None:
    assert in_order([], "before", []) == []
