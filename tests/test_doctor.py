"""``loramix doctor`` tells what is wrong and how to mend it, and never falls over itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from loramix.cli import main
from loramix.errors import InvalidArtifact
from loramix.runtime import cpu, doctor

NAMES = ["python", "cpu", "memory", "llama.cpp", "base", "native probe", "pack", "cache", "training"]


def by_name() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.report()}


def test_a_machine_without_a_base_is_told_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path))
    found = by_name()
    assert list(found) == NAMES
    assert found["base"].status == "fail"
    assert found["base"].mend == "loramix pull smollm2-135m"
    assert found["llama.cpp"].status == "ok", found["llama.cpp"].detail
    assert found["native probe"].status == "warn"


def test_a_damaged_pack_is_a_line_and_not_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(name: str) -> None:
        raise InvalidArtifact("pack.toml is broken.")

    monkeypatch.setattr("loramix.pack.Pack.load", damaged)
    found = by_name()["pack"]
    assert (found.status, found.detail) == ("fail", "pack.toml is broken.")


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path))
    monkeypatch.setattr("os.access", lambda *_: False)
    found = by_name()["cache"]
    assert found.status == "fail"
    assert "LORAMIX_CACHE" in found.mend


def test_the_command_exits_1_when_something_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path))
    text = CliRunner().invoke(main, ["doctor"])
    assert text.exit_code == 1
    assert "→ loramix pull smollm2-135m" in text.stdout
    rows = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    assert [row["name"] for row in rows] == NAMES


def test_threads_respect_affinity_and_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(cpu, "_QUOTA", quota)
    assert cpu.default_threads() == 8
    quota.write_text("250000 100000")
    assert cpu.default_threads() == 2
    quota.write_text("max 100000")
    assert cpu.default_threads() == 8
    quota.write_text("10000 100000")
    assert cpu.default_threads() == 1


def test_cpu_and_memory_are_read_as_linux_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info, memory = tmp_path / "cpuinfo", tmp_path / "meminfo"
    info.write_text("model name\t: Some CPU @ 2 GHz\nflags\t\t: sse avx2 amx_tile\n")
    memory.write_text("MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:   400 kB\n")
    monkeypatch.setattr(cpu, "_CPUINFO", info)
    monkeypatch.setattr(cpu, "_MEMINFO", memory)
    assert cpu.cpu_model() == "Some CPU @ 2 GHz"
    assert cpu.cpu_flags() == {"sse", "avx2", "amx_tile"}
    assert cpu.memory_bytes() == (1_024_000, 409_600)
    memory.write_text("nonsense")
    assert cpu.memory_bytes() == (0, 0)
