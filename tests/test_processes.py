"""Commands as users start them, with all their children: no process holds PyTorch and llama.cpp at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_peft

pytest.importorskip("torch")

pytestmark = [
    pytest.mark.train,
    pytest.mark.own_process,
    pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc, which this system lacks"),
]
# imported by every Python that starts with its directory on PYTHONPATH; says at the end what is mapped
WATCH = """
import atexit, os
def note():
    with open("/proc/self/maps") as file:
        maps = file.read()
    found = [name for name, library in (("torch", "libtorch_cpu"), ("llama", "libllama.so")) if library in maps]
    with open(os.environ["WATCHED"], "a") as file:
        file.write(" ".join(["process", *found]) + "\\n")
atexit.register(note)
"""


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where each process of a command writes a line: which of the two libraries it had at its end."""
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    path = [str(tmp_path / "watch"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    monkeypatch.setenv("WATCHED", str(tmp_path / "watched.txt"))
    return tmp_path / "watched.txt"


# the command itself, but a gate of few prompts
FEWER = """
from loramix.train import gate_update
from loramix.cli import main
gate_update.FIRST_PROMPTS = 10
main()
"""


def libraries(watched: Path, *words: object, start: tuple[str, ...] = ("-m", "loramix")) -> set[str]:
    """What the processes of one command held."""
    watched.unlink(missing_ok=True)
    command = [sys.executable, *start, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(watched.read_text().splitlines())


def test_training_and_adding_a_skill(tiny_pack: Path, watched: Path, tmp_path: Path) -> None:
    pack = Path(shutil.copytree(tiny_pack, tmp_path / "tiny"))
    for name in ("sentiment", "summarize"):
        assert libraries(watched, "skill", "remove", name, "--pack", pack)
    rows = [{"split": "dev" if i % 5 == 0 else "train", "input": f"z {i}", "target": "Z"} for i in range(20)]
    data = tmp_path / "shout.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--data", data, "--pack", pack, "--out", tmp_path / "run"]
    found = libraries(watched, "skill", "add", "shout", *words, start=("-c", FEWER))
    assert found >= {"process torch", "process llama"} and "process torch llama" not in found


def test_converting_an_adapter(tiny_base: Path, watched: Path, tmp_path: Path) -> None:
    source = write_peft(tmp_path / "peft")
    words = [source, "--base", tiny_base, "--out", tmp_path / "a.gguf"]
    found = libraries(watched, "convert", "adapter", *words)
    assert found >= {"process torch", "process llama"} and "process torch llama" not in found
