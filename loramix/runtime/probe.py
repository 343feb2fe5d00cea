"""A trial run of llama.cpp in a child process, before it may run in ours.

Some builds crash on the first prompt: GCC drops the set-up of AMX tiles, or a wheel was built for another
CPU. A crash cannot be caught, so a child decodes first, and the verdict is remembered for this library,
CPU and kind of base. ``python -m loramix.runtime.probe_child BASE 0|1`` is that child.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from loramix.errors import NativeError, UsageError
from loramix.hardware import cpu_flags, cpu_model
from loramix.paths import cache_dir, sha256_file, write_text
from loramix.runtime.probe_child import REFUSED

LLAMA_CPP = "llama-cpp-python==0.3.36"
ENVIRONMENT = "LORAMIX_EXTRA_BUFTS"
TIMEOUT_S = 60.0
_REMEMBERED = 32  # entries of each kind


@dataclass(frozen=True, slots=True)
class Verdict:
    """How llama.cpp may load a base on this machine."""

    use_extra_bufts: bool
    """Whether weights may be repacked for the CPU (AMX, REPACK)."""
    reason: str
    key: str
    """SHA-256 of what the verdict holds for; empty if the environment decided."""
    seconds: float
    """Time that the trial took; 0 if the verdict was remembered."""


class _Remembered(msgspec.Struct):
    use_extra_bufts: bool
    reason: str


class _File(msgspec.Struct):
    size: int
    mtime_ns: int
    value: list[str]


class _Memory(msgspec.Struct):
    """probe.json: verdicts by key; digests of libraries and kinds of bases by path, valid for size and time."""

    verdicts: dict[str, _Remembered] = {}
    libraries: dict[str, _File] = {}
    bases: dict[str, _File] = {}


@dataclass(frozen=True, slots=True)
class _Trial:
    """What became of a child: empty ``trouble`` is success."""

    trouble: str = ""
    refused: str = ""
    """The child's own sentence, where it refused in order."""
    lasting: bool = True
    """Whether the same would come again; not so for a time-out or a kill from outside."""


def verdict_for(base: Path) -> Verdict:
    """The verdict for a base whose kinds of tensors are read from it, or remembered.

    Args:
        base: a GGUF.

    Raises:
        NativeError: llama.cpp cannot run it either way.
        InvalidArtifact: not a GGUF base.
        UsageError: a bad value in ``LORAMIX_EXTRA_BUFTS``.
    """
    return _forced() or verdict(base, tensor_kinds(base))


def verdict(
    base: Path,
    tensor_types: frozenset[str],
    *,
    cache: Path | None = None,
    command: Sequence[str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Verdict:
    """Find out, once, how llama.cpp may load bases of this kind on this machine.

    Args:
        base: a GGUF that `loramix.formats.validate` has passed.
        tensor_types: the kinds of tensors that choose llama.cpp's kernels; see `tensor_kinds`.
        cache: file of remembered verdicts; by default in `cache_dir`.
        command: the child to try with; it gets the base and ``1`` or ``0`` as last arguments.
        timeout_s: longest trial, in seconds.

    Raises:
        NativeError: llama.cpp cannot run the base either way; the message says how to mend it.
        UsageError: a bad value in ``LORAMIX_EXTRA_BUFTS``.
    """
    if forced := _forced():
        return forced
    cache = cache or cache_dir() / "probe.json"
    memory = _recall(cache)
    key, fresh = _key(memory, tensor_types)
    if known := memory.verdicts.get(key):
        if fresh:
            _keep(cache, memory)
        return Verdict(known.use_extra_bufts, known.reason, key, 0.0)
    started = time.monotonic()
    # -P: a module in the user's current directory must not be imported in place of ours
    command = command or [sys.executable, "-P", "-m", "loramix.runtime.probe_child"]
    packed = _try(command, base, True, timeout_s)
    if packed.trouble:
        plain = _try(command, base, False, timeout_s)
        if plain.trouble:
            raise NativeError(_hopeless(base, plain))
        reason = f"weights stay as they are: with repacked weights llama.cpp {packed.trouble}"
    else:
        reason = "llama.cpp may repack weights for this CPU: the trial run went well"
    if packed.lasting:
        memory.verdicts[key] = _Remembered(not packed.trouble, reason)
        _keep(cache, memory)
    return Verdict(not packed.trouble, reason, key, time.monotonic() - started)


def tensor_kinds(base: Path, *, cache: Path | None = None) -> frozenset[str]:
    """Types and shapes of a base's tensors, e.g. ``Q8_0 576x1536``; llama.cpp chooses kernels by both.

    Args:
        base: a GGUF.
        cache: file of remembered verdicts; by default in `cache_dir`.

    Raises:
        InvalidArtifact: not a GGUF base.
    """
    cache = cache or cache_dir() / "probe.json"
    memory = _recall(cache)
    path = base.resolve()
    try:
        status = path.stat()
    except OSError:
        status = None
    known = memory.bases.get(str(path))
    if known and status and (known.size, known.mtime_ns) == (status.st_size, status.st_mtime_ns):
        return frozenset(known.value)
    from loramix.formats.validate import read_base

    found, _ = read_base(base)
    kinds = {f"{tensor.type_name} {'x'.join(map(str, tensor.shape))}" for tensor in found.tensors.values()}
    if status:
        memory.bases[str(path)] = _File(status.st_size, status.st_mtime_ns, sorted(kinds))
        _keep(cache, memory)
    return frozenset(kinds)


def rebuild_command() -> str:
    """The command that builds llama-cpp-python for this machine, without AMX where GCC may break it."""
    command = f"{shlex.quote(sys.executable)} -m pip install --force-reinstall --no-deps --no-cache-dir"
    command += f" --no-binary llama-cpp-python {LLAMA_CPP}"
    if "amx_tile" not in cpu_flags():
        return command
    flags = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    return f'CFLAGS="{flags}" CXXFLAGS="{flags}" {command}'


def _forced() -> Verdict | None:
    value = os.environ.get(ENVIRONMENT, "")
    if value not in ("", "0", "1"):
        raise UsageError(f"{ENVIRONMENT} is {value[:20]!r}; it must be 0, 1 or unset.")
    return Verdict(value == "1", f"{ENVIRONMENT}={value} decides", "", 0.0) if value else None


def _key(memory: _Memory, tensor_types: frozenset[str]) -> tuple[str, bool]:
    """What a verdict holds for, and whether ``memory`` learned a library's digest on the way."""
    whole, fresh = hashlib.sha256(), False
    for path in _library_files():
        status = path.stat()
        known = memory.libraries.get(str(path))
        if known is None or (known.size, known.mtime_ns) != (status.st_size, status.st_mtime_ns):
            known = _File(status.st_size, status.st_mtime_ns, [sha256_file(path)])
            memory.libraries[str(path)] = known
            fresh = True
        whole.update(f"{path.name} {known.value}\n".encode())
    for part in (cpu_model(), sorted(cpu_flags()), sorted(tensor_types)):
        whole.update(f"{part}\n".encode())
    return whole.hexdigest(), fresh


def _library_files() -> list[Path]:
    """The shared libraries, and the Python files that hold their version and structs; nothing is imported.

    Raises:
        NativeError: llama-cpp-python is not installed.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise NativeError(f"llama-cpp-python is not installed; get it with: {rebuild_command()}")
    package = Path(spec.submodule_search_locations[0])
    libraries = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or package / "lib")
    found = {path for stem in ("ggml", "llama") for path in libraries.glob(f"*{stem}*")}
    found |= {package / "__init__.py", package / "llama_cpp.py"}
    return sorted(path for path in found if path.is_file())


def _try(command: Sequence[str], base: Path, use_extra_bufts: bool, timeout_s: float) -> _Trial:
    """Run a child with or without extra buffers."""
    # a trace by a debugger would take long and bury the reason
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    environment.pop(ENVIRONMENT, None)
    try:
        child = subprocess.run(
            [*command, str(base.absolute()), "1" if use_extra_bufts else "0"],
            stdin=subprocess.DEVNULL,  # the prompt may be waiting there
            capture_output=True,
            timeout=timeout_s,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _Trial(f"did not finish within {timeout_s:g} s", lasting=False)
    if child.returncode == 0:
        return _Trial()
    lines = child.stderr.decode("utf-8", "replace").strip().splitlines()
    last = lines[-1].strip()[:300] if lines else ""
    said = f" ({last})" if last else ""
    if child.returncode == REFUSED:
        return _Trial(f"failed{said}", refused=last)
    if 0 < child.returncode < 256:
        return _Trial(f"ended with exit code {child.returncode}{said}")
    return _Trial(f"crashed with {signal_name(child.returncode)}{said}", lasting=child.returncode != -9)


def signal_name(code: int) -> str:
    """The name of what ended a process."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"code {code & 0xFFFFFFFF:#x}"  # Windows gives its status instead


def _hopeless(base: Path, plain: _Trial) -> str:
    if plain.refused:
        return plain.refused
    return f"llama.cpp {plain.trouble} in a trial run of {base.name}; build it for this machine: {rebuild_command()}"


def _recall(cache: Path) -> _Memory:
    try:
        return msgspec.json.decode(cache.read_bytes(), type=_Memory)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return _Memory()  # absent or damaged: everything in it can be found out again


def _keep(cache: Path, memory: _Memory) -> None:
    for entries in (memory.verdicts, memory.libraries, memory.bases):
        for old in list(entries)[:-_REMEMBERED]:
            del entries[old]
    try:
        write_text(cache, msgspec.json.encode(memory).decode())
    except OSError:
        pass  # a read-only cache costs a trial at each start
