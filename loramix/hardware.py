"""CPU features, cores and memory that this process may use.

Reads /proc, /sys and cgroups, with Python's own functions as a fallback. Independent of llama.cpp.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
SYS = Path("/sys")
MAX_THREADS = 16
"""Maximum number of threads; more only wait for each other on small models."""


def limit_spinning() -> None:
    """Let OpenMP threads sleep soon while they wait for each other; before a library with OpenMP is loaded.

    Beside another process, spinning threads starve each other: eight tokens took 26 s instead of 0.3 s, a gate's
    training 218 s instead of 63 s. Nothing is lost on an idle machine.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@functools.cache
def _cpuinfo(file: Path) -> dict[str, str]:
    """Read the first processor of /proc/cpuinfo; the kernel generates the file line by line, so the rest is free."""
    found: dict[str, str] = {}
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, colon, value = line.partition(":")
                if not colon:
                    break
                found[name.strip().lower()] = value.strip()
    except OSError:
        pass  # not Linux
    return found


def cpu_flags() -> frozenset[str]:
    """Return the CPU's features by their names in Linux, e.g. ``avx2``; empty on other systems."""
    info = _cpuinfo(PROC / "cpuinfo")
    return frozenset((info.get("flags") or info.get("features") or "").lower().split())


def repacked_types() -> frozenset[str]:
    """Return the types of weights that llama.cpp repacks for this CPU (ggml/src/ggml-cpu/repack.cpp)."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return frozenset({"Q4_0", "Q4_K", "IQ4_NL", "Q8_0"})
    flags = cpu_flags()
    if "avx2" not in flags:
        return frozenset()
    return frozenset({"Q4_0", "Q4_K", "IQ4_NL"} | ({"Q2_K"} if "avx512f" in flags else set()))


def cpu_model() -> str:
    """Return the CPU's name, or its architecture if the system does not report the name."""
    info = _cpuinfo(PROC / "cpuinfo")
    name = info.get("model name") or info.get("hardware")
    if not name and (part := info.get("cpu part")):  # on ARM, cores have only numbers
        name = f"{platform.machine()} implementer {info.get('cpu implementer', '?')} part {part}"
    return name or platform.processor() or platform.machine() or "unknown"


def cpu_count() -> int:
    """Return the number of logical processors that the process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


def default_threads() -> int:
    """Return the number of threads for llama.cpp: one per usable physical core, within the cgroup's quota.

    A second thread on one core, or more threads than the quota, makes every decode wait for the slowest.
    """
    if not hasattr(os, "sched_getaffinity"):
        return min(cpu_count(), MAX_THREADS)
    cores = set()
    for cpu in os.sched_getaffinity(0):
        topology = SYS / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        cores.add(_text(topology) or str(cpu))
    quota = cpu_quota()
    return max(1, min(len(cores), int(quota) if quota else len(cores), MAX_THREADS))


def cpu_quota() -> float | None:
    """Return the cgroups' CPU quota in processors, or None without a limit."""
    limits = []
    for directory in _cgroups("cpu"):
        quota, _, period = _text(directory / "cpu.max").partition(" ")
        if not quota:  # version 1
            quota, period = _text(directory / "cpu.cfs_quota_us"), _text(directory / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory_bytes() -> tuple[int, int]:
    """Return the memory of the machine or of the cgroup, whichever is less.

    Returns:
        (total, available) in bytes; zeros if the system does not report them.
    """
    info = {}
    for line in _text(PROC / "meminfo").splitlines():
        name, _, value = line.partition(":")
        if (number := value.split()[:1]) and number[0].isdigit():
            info[name] = int(number[0]) * 1024
    total, available = info.get("MemTotal", 0), info.get("MemAvailable", info.get("MemFree", 0))
    if not total:
        try:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):
            return 0, 0
        available = total
    for directory in _cgroups("memory"):
        limit = _text(directory / "memory.max") or _text(directory / "memory.limit_in_bytes")
        used = _text(directory / "memory.current") or _text(directory / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit() and int(limit) < total:
            # cached files count as used, but are released on demand
            stat = dict(
                row.split()[:2] for row in _text(directory / "memory.stat").splitlines() if " " in row
            )
            cached = stat.get("inactive_file", "0")
            free = int(limit) - int(used) + (int(cached) if cached.isdigit() else 0)
            total, available = int(limit), max(0, min(available, free))
    return total, available


def _cgroups(controller: str) -> Iterator[Path]:
    """Yield the directories of the process's cgroup and its ancestors, each of which may set a limit."""
    root = SYS / "fs/cgroup"
    for line in _text(PROC / "self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        # in a container, the cgroup is often the mount's root, whatever path is listed
        named = root / controllers  # version 1 mounts e.g. cpu,cpuacct and may link cpu to it
        top = named if named.is_dir() or not controllers else root / controller
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:depth])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def machine() -> str:
    """Describe CPU, threads and system for reports."""
    system = f"{platform.system()}, Python {platform.python_version()}"
    return f"{cpu_model()}, {default_threads()} threads, {system}"
