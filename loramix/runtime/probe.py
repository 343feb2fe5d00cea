"""Does this build of llama.cpp survive on this CPU? Asked once, in a child process, and remembered.

Built by GCC 12 for a CPU with AMX, llama.cpp dies on any prompt of two tokens or more: the compiler drops
the tile configuration as dead stores. A signal cannot be caught, so a child decodes eight tokens first; if
it dies, weights are not repacked for the CPU (``use_extra_bufts = False``), which is slower and safe.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from loramix.errors import NativeError, NotFound
from loramix.paths import cache_dir, write_text
from loramix.runtime.cpu import cpu_flags, cpu_model

MEND = (
    "rebuild it with CFLAGS='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16' CXXFLAGS=\"$CFLAGS\" "
    "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python==0.3.36"
)
_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether llama.cpp may repack weights for this CPU, and how we know."""

    use_extra_bufts: bool
    reason: str
    key: str
    """Digest of library build, CPU and tensor types; another key is another question."""


def verdict_for(base: Path) -> Verdict:
    """The verdict for a base that `validate.read_base` accepts."""
    from loramix.convert.validate import read_base

    _, shape = read_base(base)
    return verdict(base, shape.tensor_types)


def verdict(base: Path, tensor_types: frozenset[str], *, command: Sequence[str] | None = None) -> Verdict:
    """Look the verdict up, or let a child process find out.

    Args:
        base: GGUF to decode with.
        tensor_types: types of its tensors: each has kernels of its own.
        command: the child, for tests; base and ``1`` or ``0`` are appended.

    Raises:
        NativeError: llama.cpp dies on this CPU either way.
    """
    key = build_key(tensor_types)
    forced = os.environ.get("LORAMIX_EXTRA_BUFTS")
    if forced in ("0", "1"):
        return Verdict(forced == "1", f"LORAMIX_EXTRA_BUFTS={forced}", key)
    memory = cache_dir() / "probe.json"
    known = _read(memory)
    if isinstance(entry := known.get(key), dict) and isinstance(entry.get("use_extra_bufts"), bool):
        return Verdict(entry["use_extra_bufts"], str(entry.get("reason", "")), key)
    child = list(command or [sys.executable, "-m", "loramix.runtime.probe"])
    failure = _try([*child, str(base), "1"])
    if failure is None:
        found = Verdict(True, "decodes with weights repacked for this CPU", key)
    elif (second := _try([*child, str(base), "0"])) is None:
        found = Verdict(False, f"repacked weights fail here ({failure}); running without", key)
    else:
        raise NativeError(f"llama.cpp fails on this machine ({second}); {MEND}.")
    try:
        kept = dict(list(known.items())[-15:])
        write_text(memory, json.dumps({**kept, key: asdict(found)}, indent=1))
    except OSError:
        pass  # a read-only cache means probing again, nothing worse
    return found


def build_key(tensor_types: frozenset[str]) -> str:
    """Digest of what decides the verdict: library bytes (by size and time), CPU, tensor types."""
    parts = [cpu_model(), *sorted(cpu_flags()), *sorted(tensor_types)]
    for library in libraries():
        status = library.stat()
        parts.append(f"{library.name} {status.st_size} {status.st_mtime_ns}")
    try:
        parts.append(importlib.metadata.version("llama-cpp-python"))
    except importlib.metadata.PackageNotFoundError:
        raise NotFound("llama-cpp-python is not installed: pip install llama-cpp-python==0.3.36.") from None
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def libraries() -> list[Path]:
    """The shared libraries of the installed llama-cpp-python, found without importing it."""
    spec = importlib.util.find_spec("llama_cpp")
    places = spec.submodule_search_locations if spec else None
    folder = Path(next(iter(places or ["."]))) / "lib"
    return sorted(
        path for path in folder.glob("*") if (path.is_file() and "ggml" in path.name) or "llama" in path.name
    )


def _read(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _try(command: list[str]) -> str | None:
    """Run the child; None if it decoded, else what happened."""
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {_TIMEOUT:.0f} s"
    if child.returncode == 0:
        return None
    if child.returncode < 0:
        return f"killed by {signal.Signals(-child.returncode).name}"
    last = (child.stderr.strip().splitlines() or ["no message"])[-1]
    return f"exit code {child.returncode}: {last[:200]}"


def main(arguments: Sequence[str]) -> None:
    """Decode eight tokens with the base; dying is an answer too."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass
    from loramix.runtime.llama import Context, Model

    began = time.perf_counter()
    with Model(Path(arguments[0]), use_extra_bufts=arguments[1] == "1") as model:
        context = Context(model, n_ctx=64, n_threads=2)
        context.decode([i % model.n_vocab for i in range(1, 9)])
        context.decode([1])
    print(json.dumps({"seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main(sys.argv[1:])
