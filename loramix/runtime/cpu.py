"""What this machine has: CPU flags, cores that we may use, memory. Standard library only."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_CPUINFO, _MEMINFO, _QUOTA = Path("/proc/cpuinfo"), Path("/proc/meminfo"), Path("/sys/fs/cgroup/cpu.max")


def cpu_flags() -> frozenset[str]:
    """Instruction sets as Linux names them; empty where the system does not tell."""
    return frozenset(_field("flags").split() or _field("Features").split())


def cpu_model() -> str:
    """The processor's name."""
    return _field("model name") or platform.processor() or platform.machine()


def _field(name: str) -> str:
    try:
        for line in _CPUINFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    except OSError:
        pass
    return ""


def default_threads() -> int:
    """Threads for one decode: the cores this process may use, no more than its quota, sixteen at most.

    More threads than cores make llama.cpp several times slower, so a container's quota counts.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    try:
        limit, period = _QUOTA.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    except (OSError, ValueError):
        pass
    return max(1, min(cores, 16))


def memory_bytes() -> tuple[int, int]:
    """(total, available) memory in bytes; (0, 0) where the system does not tell."""
    found = {}
    try:
        for line in _MEMINFO.read_text().splitlines():
            key, _, value = line.partition(":")
            found[key] = int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return 0, 0
    return found.get("MemTotal", 0), found.get("MemAvailable", 0)
