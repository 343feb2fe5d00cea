"""The transcripts of README and docs say what their commands say, and the Python example runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from margins import SCALE_TOLERANCE
from shell import output_of

from loramix.cli import main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
MAX_README_LINES = 150


def blocks(language: str, *pages: Path) -> list[str]:
    """Fenced blocks of a language; of all pages where none is named."""
    texts = [page.read_text(encoding="utf-8") for page in pages or PAGES]
    return [body for text in texts for _, found, body in FENCED.findall(text) if found == language]


def transcripts() -> list[tuple[str, str]]:
    """(command, what it prints) of each ``$`` line in console blocks."""
    found = []
    for body in blocks("console"):
        for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output.strip()))
    return found


PROBABILITY = re.compile(r"(?<=[ (])\d+(?:\.\d)?%|(?<==)0\.\d+")  # a share or a blend's scale


LOOKED = re.compile(r"looked at: (.*)$")
LABELS = re.compile(r"^\[([^\[\]=]+ \d+\.\d%)\]$")


def named_shares(line: str) -> dict[str, float]:
    """The words that the gate looked at, or the labels of an answer, with their shares; their order may differ."""
    if looked := LOOKED.search(line):
        return {word: int(share) / 100 for word, share in re.findall(r"(\S+) \((\d+)%\)", looked[1])}
    if labels := LABELS.match(line):
        parts = [part.rsplit(" ", 1) for part in labels[1].split(", ")]
        return {label: float(share.strip("%")) / 100 for label, share in parts}
    return {}


def read(line: str) -> tuple[str, list[float]]:
    """A line without its probabilities and bars, and those; without what `named_shares` reads."""
    line = LABELS.sub("[labels]", LOOKED.sub("looked at", line))
    shares = [float(p.strip("%")) / (100 if p.endswith("%") else 1) for p in PROBABILITY.findall(line)]
    words = " ".join(PROBABILITY.sub("N", line.replace("█", "")).split())
    if shares[-1:] and shares[-1] < SCALE_TOLERANCE:  # which of the unlikely ones comes first is rounding
        words = re.sub(r"next is \w+", "next is any", words)
    return words, shares


def assert_says(output: str, recorded: str) -> None:
    """The same words in every line; probabilities move by a little from CPU to CPU, and so do the bars' places."""
    found, wanted = ([read(line) for line in text.splitlines()] for text in (output.strip(), recorded))
    assert sorted(words for words, _ in found) == sorted(words for words, _ in wanted)
    answers = [[words for words, shares in lines if not shares] for lines in (found, wanted)]
    assert answers[0] == answers[1]
    named = [
        [shares for line in text.splitlines() if (shares := named_shares(line))]
        for text in (output, recorded)
    ]
    for ours, theirs in zip(*named, strict=True):
        assert all(abs(ours.get(name, 0) - theirs.get(name, 0)) <= SCALE_TOLERANCE for name in ours | theirs)
    for (_, shares), (_, recorded_shares) in zip(sorted(found), sorted(wanted), strict=True):
        assert shares == pytest.approx(recorded_shares, abs=SCALE_TOLERANCE)


@pytest.mark.base
@pytest.mark.parametrize("command, output", transcripts())
def test_the_transcript_is_real(command: str, output: str, default_base: Path) -> None:
    assert_says(output_of(command), output)


@pytest.mark.parametrize(
    "other",
    [
        "[sentiment=1] sentiment fits with 75%; next is emotion with 14%\nnegative",  # another answer
        "[sentiment=1] sentiment fits with 60%; next is emotion with 14%\npositive",  # too far away
        "[emotion=1] emotion fits with 75%; next is sentiment with 14%\npositive",
        "[sentiment=1] sentiment fits with 75%; next is spam with 14%\npositive",
        "[sentiment=1] sentiment fits with 75%; next is emotion with 14%",
        "positive\n[sentiment=1, then emotion=1] sentiment (55%) and emotion (41%) fit, so each answers in turn",
    ],
)
def test_another_output_is_told_apart(other: str) -> None:
    said = "[sentiment=1] sentiment fits with 75%; next is emotion with 14%\npositive"
    assert_says(said.replace("75%", "69%").replace("14%", "15%"), said)
    assert_says("a  ██  4.1%\nb  █  4.0%\nmix: c=1", "b  █  4.2%\na  █  3.9%\nmix: c=1")
    looked = f"{said}; looked at: Is (24%), scam (21%), a (3%)\n[yes 90.0%, no 10.0%]"
    assert_says(f"{said}; looked at: scam (23%), Is (21%), the (2%)\n[yes 85.0%, no 15.0%]", looked)
    for wrong in (
        "Is (24%), the (21%), a (3%)\n[yes 90.0%, no 10.0%]",
        "Is (24%), scam (21%)\n[no 90.0%, yes 10.0%]",
    ):
        with pytest.raises(AssertionError):
            assert_says(f"{said}; looked at: {wrong}", looked)
    with pytest.raises(AssertionError):
        assert_says(other, said)


@pytest.mark.base
def test_the_python_example_runs(default_base: Path, capsys: Any) -> None:
    example = "\n".join(
        blocks("python", ROOT / "docs" / "python.md")
    )  # the second goes on where the first ends
    exec(compile(example, "python.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def commands() -> list[list[str]]:
    lines = [line.strip() for body in blocks("") for line in body.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("loramix ")]


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 20
    assert len(transcripts()) >= 3
    assert len(blocks("console", README)) == 1


def parse(words: list[str]) -> None:
    """Find the command of a line, and read its options; raises `click.UsageError` for one that is unknown."""
    command: click.Command = main
    context = click.Context(main, info_name="loramix")
    while isinstance(command, click.Group):
        name, words = words[0], words[1:]
        found = command.get_command(context, name)
        assert found is not None, f"no command {name}"
        command = found
    command.make_context(command.name, list(words))


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_parses(words: list[str]) -> None:
    parse(words)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"`make ([\w-]+)|^make ([\w-]+)", page.read_text(), re.MULTILINE):
            name = target[0] or target[1]
            assert re.search(rf"^{name}:", makefile, re.MULTILINE), f"{page.name}: make {name}"


def test_the_readme_is_short() -> None:
    assert README.read_text(encoding="utf-8").count("\n") <= MAX_README_LINES
