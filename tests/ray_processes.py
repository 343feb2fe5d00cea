"""Processes of the tests' Ray cluster, found in /proc."""

from __future__ import annotations

import os
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """All processes below one."""
    found, open_ = [], [pid]
    while open_:
        parent = open_.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                children = [int(child) for child in task.read_text().split()]
            except (FileNotFoundError, ProcessLookupError):
                continue
            found += children
            open_ += children
    return found


def titled(title: str) -> list[int]:
    """Processes of this one's cluster whose title begins so, such as ``ray::ServeReplica``."""
    found = []
    for pid in descendants(os.getpid()):
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title.encode()):
                found.append(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return sorted(found)


def libraries(pid: int) -> set[str]:
    """Which of PyTorch and llama.cpp a process holds."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        maps = ""  # it has ended
    return {name for name, file in (("torch", "libtorch_cpu"), ("llama", "libllama.so")) if file in maps}
