"""The trial run of llama.cpp: crashes, time-outs, and what is remembered. The children here are fakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from loramix.defaults import LLAMA_CPP
from loramix.errors import NativeError, UsageError
from loramix.runtime import probe, probe_child

TYPES = frozenset({"Q8_0 576x576", "F32 576"})


@pytest.fixture(autouse=True)
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of fake shared libraries, and a cache of the test's own."""
    directory = tmp_path / "lib"
    directory.mkdir()
    (directory / "libggml-cpu.so.0").write_bytes(b"cpu kernels 1")
    (directory / "libllama.so").write_bytes(b"llama 1")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(directory))
    monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORAMIX_EXTRA_BUFTS", raising=False)
    return directory


class Child:
    """A fake child that notes each start; ``packed`` and ``plain`` are its code with and without extra buffers."""

    def __init__(self, directory: Path, packed: str = "", plain: str = "") -> None:
        self.log = directory / "starts"
        script = directory / "child.py"
        script.write_text(
            "import os, signal, sys, time\n"
            "def die(number): os.kill(os.getpid(), number)\n"
            f"open({str(self.log)!r}, 'a').write(sys.argv[-1])\n"
            "if sys.argv[-1] == '1':\n"
            + textwrap.indent(packed or "pass", "    ")
            + "\nelse:\n"
            + textwrap.indent(plain or "pass", "    ")
        )
        self.command = [sys.executable, str(script)]

    @property
    def starts(self) -> str:
        """``1`` or ``0`` for each start, in order."""
        return self.log.read_text() if self.log.exists() else ""


SEGFAULT = "print('ggml: about to fail', file=sys.stderr, flush=True)\ndie(signal.SIGSEGV)"
BASE = Path("some.gguf")


def judge(child: Child, types: frozenset[str] = TYPES, timeout_s: float = 300.0) -> probe.Verdict:
    return probe.verdict(BASE, types, command=child.command, timeout_s=timeout_s)


def test_a_good_build_keeps_extra_buffers_and_is_tried_once(tmp_path: Path) -> None:
    child = Child(tmp_path)
    first, second = judge(child), judge(child)
    assert first.use_extra_bufts and second.use_extra_bufts
    assert first.seconds > 0 and second.seconds == 0
    assert (first.key, first.reason) == (second.key, second.reason)
    assert child.starts == "1"


def test_a_crash_with_extra_buffers_falls_back_and_is_remembered(tmp_path: Path) -> None:
    child = Child(tmp_path, packed=SEGFAULT)
    found = judge(child)
    assert not found.use_extra_bufts
    assert "SIGSEGV" in found.reason and "ggml: about to fail" in found.reason
    assert not judge(child).use_extra_bufts
    assert child.starts == "10"


def test_a_crash_either_way_is_an_error_with_the_command_that_mends_it(tmp_path: Path) -> None:
    child = Child(tmp_path, packed=SEGFAULT, plain="die(signal.SIGILL)")
    for _ in range(2):  # nothing is remembered: the library may be mended meanwhile
        with pytest.raises(NativeError, match=r"SIGILL.*pip install.*--no-binary llama-cpp-python") as error:
            judge(child)
        assert "\n" not in str(error.value)
    assert child.starts == "1010"


def test_numbers_that_are_not_finite_fall_back(tmp_path: Path) -> None:
    child = Child(tmp_path, packed="print('not finite', file=sys.stderr); sys.exit(3)")
    assert not judge(child).use_extra_bufts


def test_a_refusal_in_order_is_handed_on_as_it_is(tmp_path: Path) -> None:
    refusal = "print('llama.cpp cannot load the base.', file=sys.stderr); sys.exit(3)"
    with pytest.raises(NativeError, match=r"^llama.cpp cannot load the base\.$"):
        judge(Child(tmp_path, packed=refusal, plain=refusal))


@pytest.mark.parametrize("accident", ["time.sleep(600)", "die(signal.SIGKILL)"])
def test_an_accident_falls_back_but_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accident: str
) -> None:
    child, run, tried = Child(tmp_path, packed=accident), subprocess.run, ""

    def noted(command: list[str], **options: Any) -> Any:
        nonlocal tried
        tried += command[-1]
        if command[-1] == "1" and "sleep" in accident:
            options["timeout"] = 1.0  # for what never ends; the plain trial keeps its own, long one
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", noted)
    for _ in range(2):
        assert not judge(child).use_extra_bufts
    assert tried == "1010"


def test_a_time_out_either_way_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NativeError, match=r"did not finish within 0\.5 s"):
        judge(Child(tmp_path, packed="time.sleep(60)", plain="time.sleep(60)"), timeout_s=0.5)


def test_another_library_of_the_same_size_is_tried_again(tmp_path: Path, library: Path) -> None:
    child = Child(tmp_path)
    first = judge(child)
    file = library / "libggml-cpu.so.0"
    file.write_bytes(b"cpu kernels 2")
    os.utime(file, ns=(1, 1))
    second = judge(child)
    assert first.key != second.key
    assert child.starts == "11"


def test_a_touched_library_with_the_same_bytes_is_not_tried_again(tmp_path: Path, library: Path) -> None:
    child = Child(tmp_path)
    first = judge(child)
    os.utime(library / "libggml-cpu.so.0", ns=(1, 1))
    assert judge(child).key == first.key
    assert child.starts == "1"


def test_other_tensors_or_another_cpu_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Child(tmp_path)
    keys = {judge(child).key, judge(child, TYPES | {"Q4_0 64x64"}).key}
    monkeypatch.setattr(probe, "cpu_flags", lambda: frozenset({"amx_tile"}))
    keys.add(judge(child).key)
    monkeypatch.setattr(probe, "cpu_model", lambda: "another")
    keys.add(judge(child).key)
    assert len(keys) == 4
    assert child.starts == "1111"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"verdicts": 3}', b'{"libraries": {"/x": {}}}', b"0" * 1000],
)
def test_a_damaged_cache_is_ignored_and_replaced(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "cache" / "probe.json"
    file.parent.mkdir()
    file.write_bytes(content)
    child = Child(tmp_path)
    assert judge(child).use_extra_bufts
    assert judge(child).seconds == 0
    assert child.starts == "1"
    assert json.loads(file.read_bytes())["verdicts"]


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    child = Child(tmp_path, packed=SEGFAULT)
    assert not judge(child).use_extra_bufts
    assert not judge(child).use_extra_bufts
    assert child.starts == "1010"


def test_the_cache_does_not_grow_for_ever(tmp_path: Path) -> None:
    memory = probe._ProbeCache(verdicts={str(i): probe._StoredVerdict(True, "") for i in range(100)})
    probe._save_cache(tmp_path / "probe.json", memory)
    assert list(probe._load_cache(tmp_path / "probe.json").verdicts) == [str(i) for i in range(68, 100)]


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_environment_overrides_without_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("LORAMIX_EXTRA_BUFTS", value)
    child = Child(tmp_path)
    assert judge(child).use_extra_bufts is (value == "1")
    assert probe.verdict_for(tmp_path / "absent.gguf").use_extra_bufts is (value == "1")
    assert child.starts == ""


def test_a_bad_value_in_the_environment_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMIX_EXTRA_BUFTS", "yes")
    with pytest.raises(UsageError, match="LORAMIX_EXTRA_BUFTS is 'yes'"):
        judge(Child(tmp_path))


def test_the_child_neither_eats_stdin_nor_takes_modules_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Child(tmp_path, packed="sys.exit(5 if sys.stdin.read() else 0)")
    reader, writer = os.pipe()
    os.write(writer, b"the user's prompt")
    os.close(writer)
    kept = os.dup(0)
    os.dup2(reader, 0)
    try:
        assert judge(child).use_extra_bufts
        assert os.read(0, 100) == b"the user's prompt"
    finally:
        os.dup2(kept, 0)
        os.close(kept)
        os.close(reader)
    (tmp_path / "msgspec.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NativeError):  # the base is not there
        probe.verdict(tmp_path / "absent.gguf", frozenset({"another"}))
    assert not (tmp_path / "canary").exists()


def test_a_remembered_verdict_costs_under_five_milliseconds(tmp_path: Path) -> None:
    child = Child(tmp_path)
    judge(child)
    times = []
    for _ in range(20):
        start = time.thread_time()
        judge(child)
        times.append(time.thread_time() - start)
    assert sorted(times)[5] < 0.005


def test_llama_cpp_that_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NativeError, match=r"not installed.*pip install"):
        judge(Child(tmp_path))


def test_the_rebuild_command_drops_amx_only_where_there_is_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "cpu_flags", lambda: frozenset({"avx2"}))
    assert "mno-amx" not in probe.rebuild_command()
    monkeypatch.setattr(probe, "cpu_flags", lambda: frozenset({"avx2", "amx_tile"}))
    assert 'CXXFLAGS="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" ' in probe.rebuild_command()


def test_the_pinned_version_is_that_of_the_project() -> None:
    root = Path(__file__).parent.parent
    assert f'"{LLAMA_CPP}"' in (root / "pyproject.toml").read_text()
    assert LLAMA_CPP in (root / "constraints.txt").read_text().splitlines()


def test_logits_agree_but_for_rounding() -> None:
    np = pytest.importorskip("numpy")
    row = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert probe_child.logits_match(row, row)
    assert probe_child.logits_match(row, row * 1.01 + 1e-3)
    assert not probe_child.logits_match(row, row[::-1])
    assert probe_child.logits_match(row * 0, row * 0)


def test_tensor_kinds_are_read_once_and_again_after_a_change(tmp_path: Path) -> None:
    from tiny import write_base

    base = write_base(tmp_path / "tiny.gguf")
    kinds = probe.tensor_kinds(base)
    assert "F32 64x64" in kinds and "F32 64" in kinds
    assert probe.tensor_kinds(base) == kinds
    write_base(base, kind="Q8_0")
    os.utime(base, ns=(1, 1))
    assert "Q8_0 64x64" in probe.tensor_kinds(base)


def test_the_real_child_runs_a_tiny_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny import write_base

    monkeypatch.delenv("LLAMA_CPP_LIB_PATH")
    found = probe.verdict_for(write_base(tmp_path / "tiny.gguf", kind="Q8_0"))
    assert found.key and found.seconds > 0
    assert probe.verdict_for(tmp_path / "tiny.gguf").seconds == 0
