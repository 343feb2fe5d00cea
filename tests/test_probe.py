"""The guard against a llama.cpp that dies on this CPU, with children that die on command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loramix.errors import NativeError
from loramix.runtime import probe

TYPES = frozenset({"Q8_0", "F32"})


def child(tmp_path: Path, dies_on: str, how: str = "os.kill(os.getpid(), signal.SIGSEGV)") -> list[str]:
    """A stand-in for the probe's child that notes each call and dies on some of its arguments."""
    script = tmp_path / "child.py"
    script.write_text(
        "import os, signal, sys, time\n"
        f"open({str(tmp_path / 'calls')!r}, 'a').write(sys.argv[-1])\n"
        f"if sys.argv[-1] in {dies_on!r}:\n    {how}\n"
    )
    return [sys.executable, str(script)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORAMIX_EXTRA_BUFTS", raising=False)


def calls(tmp_path: Path) -> str:
    return (tmp_path / "calls").read_text()


def test_a_build_that_works_keeps_repacking_and_is_asked_once(tmp_path: Path) -> None:
    command = child(tmp_path, dies_on="")
    first = probe.verdict(Path("base.gguf"), TYPES, command=command)
    second = probe.verdict(Path("base.gguf"), TYPES, command=command)
    assert first.use_extra_bufts and second.use_extra_bufts
    assert calls(tmp_path) == "1"


def test_a_segfault_falls_back_and_is_remembered(tmp_path: Path) -> None:
    command = child(tmp_path, dies_on="1")
    found = probe.verdict(Path("base.gguf"), TYPES, command=command)
    assert not found.use_extra_bufts
    assert "SIGSEGV" in found.reason
    again = probe.verdict(Path("base.gguf"), TYPES, command=command)
    assert again == found
    assert calls(tmp_path) == "10"


def test_dying_either_way_is_one_sentence_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(NativeError, match=r"SIGSEGV.*no-amx-tile.*pip install"):
        probe.verdict(Path("base.gguf"), TYPES, command=child(tmp_path, dies_on="10"))


def test_a_hanging_child_counts_as_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_TIMEOUT", 0.5)
    found = probe.verdict(Path("base.gguf"), TYPES, command=child(tmp_path, "1", "time.sleep(30)"))
    assert not found.use_extra_bufts
    assert "no answer" in found.reason


def test_another_library_or_type_is_another_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "libggml-cpu.so"
    library.write_bytes(b"one")
    monkeypatch.setattr(probe, "libraries", lambda: [library])
    before = probe.build_key(TYPES)
    assert probe.build_key(frozenset({"Q4_0"})) != before
    library.write_bytes(b"another build")
    assert probe.build_key(TYPES) != before


def test_the_real_libraries_are_among_what_is_hashed() -> None:
    names = [path.name for path in probe.libraries()]
    assert any("ggml-cpu" in name for name in names)
    assert any("llama" in name for name in names)


@pytest.mark.parametrize(
    "content", ["", "[]", "{broken", '{"KEY": 5}', '{"KEY": {"use_extra_bufts": "yes"}}']
)
def test_a_damaged_memory_is_asked_anew(tmp_path: Path, content: str) -> None:
    memory = tmp_path / "cache" / "probe.json"
    memory.parent.mkdir()
    memory.write_text(content.replace("KEY", probe.build_key(TYPES)))
    assert probe.verdict(Path("base.gguf"), TYPES, command=child(tmp_path, "")).use_extra_bufts
    assert json.loads(memory.read_text())[probe.build_key(TYPES)]["use_extra_bufts"] is True


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_environment_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("LORAMIX_EXTRA_BUFTS", value)
    found = probe.verdict(Path("base.gguf"), TYPES, command=child(tmp_path, "10"))
    assert found.use_extra_bufts is (value == "1")
    assert not (tmp_path / "calls").exists()


def test_the_real_child_decodes_a_tiny_base(tmp_path: Path) -> None:
    from tiny import write_base

    base = write_base(tmp_path / "tiny.gguf")
    command = [sys.executable, "-m", "loramix.runtime.probe", str(base), "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["seconds"] > 0
