"""Each example runs, on the tiny pack and the tiny base."""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_readme import ROOT

from loramix import Engine
from loramix.cli import main

EXAMPLES = ROOT / "examples"


def program(name: str) -> Callable[..., None]:
    """``main`` of an example."""
    found: Callable[..., None] = runpy.run_path(str(EXAMPLES / name))["main"]
    return found


def test_every_example_is_run_here() -> None:
    names = {path.name for path in EXAMPLES.iterdir()} - {"README.md", "__pycache__"}
    assert names == {"chat.py", "openai_client.py", "own_skill", "blend.ipynb", "styles"}
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"]({name}" in listed for name in names)


def test_chat(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two turns, the second with the first as its history."""
    monkeypatch.setattr("sys.stdin", io.StringIO("the quick brown fox\n\nand the dog\n"))
    program("chat.py")(str(tiny_pack))
    said = capsys.readouterr().out
    with Engine.open(tiny_pack) as engine:
        first = engine.generate("the quick brown fox", max_tokens=128)
        history = [
            {"role": "user", "content": "the quick brown fox"},
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "and the dog"},
        ]
        second = engine.generate(history, max_tokens=128)
    assert said == "".join(f"[{answer.route.named}] {answer.text}\n" for answer in (first, second))


def test_openai_client(tiny_server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai")
    program("openai_client.py")(tiny_server.url, "the quick brown fox jumps")
    whole = tiny_server.chat().json()
    said = capsys.readouterr().out
    assert "routed by the gate: tiny\n" in said and "tiny:sentiment" in said and "tiny:base" in said
    assert f"because {whole['loramix']['reason']}\n" in said
    assert said.endswith(whole["choices"][0]["message"]["content"] + "\n")


def test_the_notebook_on_blending(
    tiny_pack: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its code cells in order; no Jupyter is needed for that."""
    monkeypatch.setenv("PACK", str(tiny_pack))
    notebook = json.loads((EXAMPLES / "blend.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    said = capsys.readouterr().out
    assert all(re.search(rf"^{policy} ", said, re.MULTILINE) for policy in ("top1", "each", "blend", "base"))
    assert len(names["answers"]) == 5
    assert [names["answers"][names["Mix"].of({name: 1.0})] for name in ("sentiment", "summarize")] == names[
        "in_turn"
    ]


@pytest.mark.train
def test_own_skill(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two commands of its README, on the tiny base."""
    pytest.importorskip("torch")
    monkeypatch.setattr("loramix.train.gate_update.FIRST_PROMPTS", 15)  # no decision is checked
    directory = Path(shutil.copytree(EXAMPLES / "own_skill", tmp_path / "own_skill"))
    monkeypatch.chdir(directory)
    rows = (directory / "shopping.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 20
    add, ask = re.findall(r"^loramix (.+)$", (directory / "README.md").read_text("utf-8"), re.MULTILINE)
    done = CliRunner().invoke(main, [*shlex.split(add), "--base", str(tiny_base)])
    assert done.exit_code == 0, done.output
    assert "skill shopping added, and the gate knows it." in done.output
    asked = CliRunner().invoke(main, [*shlex.split(ask), "--json"])
    assert asked.exit_code == 0, asked.output
    route = json.loads(asked.stdout)["route"]
    assert set(route["probabilities"]) == {"shopping", "base"}
