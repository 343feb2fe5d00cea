"""The README's commands run as written, and its transcript says what they say."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from test_golden import GOLDEN, KERNELS

from loramix.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^( *)```(\w*)\n(.*?)^\1```", README, re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    return [body for _, found, body in BLOCKS if found == language]


def transcripts() -> list[tuple[str, str]]:
    """(command, what it prints) of each ``$`` line in console blocks."""
    found = []
    for body in blocks("console"):
        for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output.strip()))
    return found


def first_words(output: str) -> list[str]:
    """Where the answer came from: ``[skill=scale,...]`` without the scales, or the first bar's skill."""
    return re.sub(r"=[\d.]+", "", output.split()[0]).split(",")


@pytest.mark.base
@pytest.mark.parametrize("command, output", transcripts())
def test_the_transcript_is_real(command: str, output: str, default_base: Path) -> None:
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command,
        shell=True,
        env={**os.environ, "PATH": places},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    if json.loads(GOLDEN.read_text())["kernels"] == KERNELS:
        assert done.stdout.strip() == output
    else:  # other kernels round otherwise: a scale by a little, and the end of a near tie
        assert first_words(done.stdout) == first_words(output)


@pytest.mark.base
def test_the_python_example_runs(default_base: Path, capsys: Any) -> None:
    (example,) = blocks("python")
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def commands() -> list[list[str]]:
    lines = [line.strip() for body in blocks("") for line in body.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("loramix ")]


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 6
    assert len(transcripts()) >= 3


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
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`|^make (\w+)", README, re.MULTILINE):
        name = target[0] or target[1]
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name
