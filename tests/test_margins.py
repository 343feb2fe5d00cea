"""No prompt that is shown, recorded or tested is so near another answer that a different CPU could give that one."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from margins import Asked, asked_by, offences, route_margins, token_margins
from test_clients import REVIEW
from test_golden import PROMPTS
from test_page import TWO_SKILLS
from test_readme import ROOT, blocks, transcripts

from loramix.runtime.router import Route

TESTS = Path(__file__).parent
ROAD = (
    "The road to the airport is closed because of an accident. Drivers should take the road along the river."
)
IN_PROCESS = {"route", "generate", "stream"}  # of `Engine`


def examples(source: str) -> list[Asked]:
    """The calls of an engine in Python source, their variables filled in."""
    known: dict[str, Any] = {}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                known[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                pass  # a result, which no call is given
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in IN_PROCESS
        ):
            prompt, *_ = node.args
            value = known[prompt.id] if isinstance(prompt, ast.Name) else ast.literal_eval(prompt)
            options = {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg}
            found.append(Asked("docs/python.md", value, options, node.func.attr != "route"))
    return found


def everything() -> list[Asked]:
    """All that the default pack is asked in README, docs, goldens and tests."""
    python = "\n".join(blocks("python", ROOT / "docs" / "python.md"))
    (make,) = re.findall(r"^PROMPT \?= (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return [
        *(Asked(f"golden {name}", *PROMPTS[name]) for name in PROMPTS),
        *(asked for command, _ in transcripts() if (asked := asked_by(command))),
        *examples(python),
        Asked("Makefile, PROMPT", make),
        Asked("test_clients.REVIEW", REVIEW),
        Asked("test_clients.REVIEW", REVIEW, {"mix": "sentiment"}),
        Asked("test_page.TWO_SKILLS", TWO_SKILLS),
    ]


@pytest.mark.base
def test_everything_is_far_from_another_answer(default_engine: Any) -> None:
    asked = everything()
    assert len(asked) >= 25 and len({one.where.split()[0] for one in asked}) >= 5
    seen: dict[str, list[str]] = {}
    for one in asked:  # the same prompt stands in several places
        key = repr((one.prompt, one.options, one.answered))
        if key not in seen:
            seen[key] = offences(default_engine, one)
    assert [line for lines in seen.values() for line in lines] == []


@pytest.mark.base
@pytest.mark.parametrize(
    "prompt, options, margin, what",
    [
        # near within a wide margin, so that this test itself rests on no near tie
        (f"Summary and sentiment maybe: {ROAD}", {"max_tokens": 1}, 0.3, "thresholds moved"),
        ("What is the capital of Portugal?", {"max_tokens": 24}, 0.1, "Portugal"),
    ],
)  # fmt: skip
def test_a_near_tie_is_named(
    default_engine: Any,
    prompt: str,
    options: dict[str, Any],
    margin: float,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("margins.ROUTE_MARGIN", margin)
    lines = offences(default_engine, Asked("here", prompt, options))
    assert lines and all(line.startswith("here: ") for line in lines)
    assert any(what in line for line in lines), lines


def test_every_test_that_asks_the_default_pack_is_measured() -> None:
    """A new one brings its prompts into `everything`, by a name that it imports from there."""
    asks = re.compile(
        r"served\(\"smollm2|default_engine|Engine\.open\(\)|choose\(\"smollm2|open_engine\(DEFAULT"
    )
    measured = {"test_clients.py", "test_golden.py", "test_margins.py", "test_page.py"}
    silent = {"test_export.py"}  # compares logits, and rests on no token
    found = {path.name for path in TESTS.glob("test_*.py") if asks.search(path.read_text(encoding="utf-8"))}
    assert found == measured | silent


def route(policy: str, *, base: float = 0.01, mix: bool = True, **skills: float) -> Route:
    return Route({"a": 1.0} if mix else {}, {**skills, "base": base}, "", policy)


@pytest.mark.parametrize(
    "found, near",
    [
        (route("each", a=0.98, b=0.01), []),
        (route("each", a=0.62, b=0.36), ["b at 0.360, floor 0.3"]),
        (route("each", a=0.5, b=0.48), ["a at 0.500, b at 0.480"]),
        (route("top1", a=0.62, b=0.36), []),
        (route("blend", a=0.5, b=0.48), []),
        (route("blend", a=0.75, b=0.22), ["b at 0.220, floor 0.15"]),
        (route("token", a=0.85, b=0.1), ["b at 0.100, floor 0.15"]),
        (route("each", a=0.9, base=0.05), ["all skills at 0.950, threshold 0.88"]),
        (route("each", a=0.4, base=0.6, mix=False), []),
        (route("each", a=0.7, base=0.2, b=0.1, mix=False), ["all skills at 0.800, threshold 0.88"]),
        (route("each", a=0.49, base=0.51, mix=False), ["base at 0.510, a at 0.490"]),
        (Route({"a": 1.0}, {}, "", "fixed"), []),
    ],
)
def test_what_decides_a_route(found: Route, near: list[str]) -> None:
    assert [what for what, distance, least in route_margins(found, 0.88) if distance < least] == near


def test_tokens_are_measured_to_the_end_of_the_answer(tiny_engine: Any) -> None:
    text, tokens = token_margins(tiny_engine, Asked("here", "a dog", {"mix": "sentiment", "max_tokens": 5}))
    answer = tiny_engine.generate("a dog", mix="sentiment", max_tokens=5)
    assert text == answer.text and [token for token, _ in tokens][: len(answer.tokens)] == answer.tokens
    assert all(margin >= 0 for _, margin in tokens)


@pytest.mark.parametrize(
    "command",
    [
        "echo hello | loramix run",
        "loramix run -t 0.7 hello",
        "loramix run -p other hello",
        "cd x && loramix route y",
    ],
)
def test_a_command_whose_margins_cannot_be_known_is_refused(command: str) -> None:
    with pytest.raises(ValueError, match="cannot be measured"):
        asked_by(command)


def test_a_command_is_read_as_the_shell_reads_it() -> None:
    found = asked_by("loramix run --show-route --policy blend -n 7 'a b' c")
    assert found and (found.prompt, found.answered) == ("a b c", True)
    assert found.options == {"policy": "blend", "max_tokens": 7}
    routed = asked_by('loramix route "is it good?"')
    assert routed and not routed.answered
    assert asked_by("loramix plan") is None and asked_by("ls") is None
