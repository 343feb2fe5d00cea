"""Tests llama.cpp in a child process before this process uses it.

Some builds crash on the first prompt: GCC drops the set-up of AMX tiles, or a wheel was built for another CPU. A
crash cannot be caught, so a child process (``python -m loramix.runtime.probe_child BASE 0|1``) decodes first. The
verdict is cached per library, CPU and tensor kinds of the base.
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

from loramix.defaults import LLAMA_CPP
from loramix.errors import REFUSED, NativeError, UsageError
from loramix.hardware import cpu_flags, cpu_model
from loramix.paths import cache_dir, sha256_file, write_text

ENVIRONMENT = "LORAMIX_EXTRA_BUFTS"
TIMEOUT_S = 60.0
_MAX_ENTRIES = 32  # entries of each kind


@dataclass(frozen=True, slots=True)
class Verdict:
    """How llama.cpp may load a base on this machine."""

    use_extra_bufts: bool
    """Whether weights may be repacked for the CPU (AMX, REPACK)."""
    reason: str
    key: str
    """SHA-256 of library, CPU and tensor kinds; empty if the environment variable decided."""
    seconds: float
    """Duration of the trial; 0 if the verdict was cached."""


class _StoredVerdict(msgspec.Struct):
    use_extra_bufts: bool
    reason: str


class _File(msgspec.Struct):
    size: int
    mtime_ns: int
    value: list[str]


class _ProbeCache(msgspec.Struct):
    """probe.json: verdicts by key; library digests and tensor kinds by path, valid for a size and mtime."""

    verdicts: dict[str, _StoredVerdict] = {}
    libraries: dict[str, _File] = {}
    bases: dict[str, _File] = {}


@dataclass(frozen=True, slots=True)
class _Trial:
    """Result of a child process; an empty ``failure`` is success."""

    failure: str = ""
    refused: str = ""
    """The child's error message, if it raised a `LoramixError`."""
    reproducible: bool = True
    """Whether the failure is reproducible; False for a time-out or an external kill."""


def verdict_for(base: Path) -> Verdict:
    """Return the verdict for a base; reads its tensor kinds from the file or the cache.

    Args:
        base: a GGUF.

    Raises:
        NativeError: llama.cpp cannot run it either way.
        InvalidArtifact: not a GGUF base.
        UsageError: a bad value in ``LORAMIX_EXTRA_BUFTS``.
    """
    return _from_environment() or verdict(base, tensor_kinds(base))


def verdict(
    base: Path,
    tensor_types: frozenset[str],
    *,
    cache: Path | None = None,
    command: Sequence[str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Verdict:
    """Determine how llama.cpp may load bases of this kind on this machine; cache the verdict.

    Args:
        base: a GGUF validated by `loramix.formats.validate`.
        tensor_types: tensor kinds, which select llama.cpp's kernels; see `tensor_kinds`.
        cache: file of cached verdicts; by default in `cache_dir`.
        command: command of the child; the base and ``1`` or ``0`` are appended.
        timeout_s: time-out of a trial in seconds.

    Raises:
        NativeError: llama.cpp cannot run the base either way; the message gives the fix.
        UsageError: a bad value in ``LORAMIX_EXTRA_BUFTS``.
    """
    if chosen := _from_environment():
        return chosen
    cache = cache or cache_dir() / "probe.json"
    stored = _load_cache(cache)
    key, fresh = _key(stored, tensor_types)
    if known := stored.verdicts.get(key):
        if fresh:
            _save_cache(cache, stored)
        return Verdict(known.use_extra_bufts, known.reason, key, 0.0)
    started = time.monotonic()
    # -P: a module in the user's current directory must not be imported in place of ours
    command = command or [sys.executable, "-P", "-m", "loramix.runtime.probe_child"]
    repacked = _run_trial(command, base, True, timeout_s)
    if repacked.failure:
        plain = _run_trial(command, base, False, timeout_s)
        if plain.failure:
            raise NativeError(_failure_message(base, plain))
        reason = f"weights stay as they are: with repacked weights llama.cpp {repacked.failure}"
    else:
        reason = "llama.cpp may repack weights for this CPU: the trial run went well"
    if repacked.reproducible:
        stored.verdicts[key] = _StoredVerdict(not repacked.failure, reason)
        _save_cache(cache, stored)
    return Verdict(not repacked.failure, reason, key, time.monotonic() - started)


def tensor_kinds(base: Path, *, cache: Path | None = None) -> frozenset[str]:
    """Types and shapes of a base's tensors, e.g. ``Q8_0 576x1536``; llama.cpp chooses kernels by both.

    Args:
        base: a GGUF.
        cache: file of cached verdicts; by default in `cache_dir`.

    Raises:
        InvalidArtifact: not a GGUF base.
    """
    cache = cache or cache_dir() / "probe.json"
    stored = _load_cache(cache)
    path = base.resolve()
    try:
        status = path.stat()
    except OSError:
        status = None
    known = stored.bases.get(str(path))
    if known and status and (known.size, known.mtime_ns) == (status.st_size, status.st_mtime_ns):
        return frozenset(known.value)
    from loramix.formats.validate import read_base

    found, _ = read_base(base)
    kinds = {f"{tensor.type_name} {'x'.join(map(str, tensor.shape))}" for tensor in found.tensors.values()}
    if status:
        stored.bases[str(path)] = _File(status.st_size, status.st_mtime_ns, sorted(kinds))
        _save_cache(cache, stored)
    return frozenset(kinds)


def rebuild_command() -> str:
    """The command that builds llama-cpp-python for this machine, without AMX where GCC may break it."""
    command = f"{shlex.quote(sys.executable)} -m pip install --force-reinstall --no-deps --no-cache-dir"
    command += f" --no-binary llama-cpp-python {LLAMA_CPP}"
    if "amx_tile" not in cpu_flags():
        return command
    flags = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    return f'CFLAGS="{flags}" CXXFLAGS="{flags}" {command}'


def _from_environment() -> Verdict | None:
    value = os.environ.get(ENVIRONMENT, "")
    if value not in ("", "0", "1"):
        raise UsageError(f"{ENVIRONMENT} is {value[:20]!r}; it must be 0, 1 or unset.")
    return Verdict(value == "1", f"{ENVIRONMENT}={value} decides", "", 0.0) if value else None


def _key(stored: _ProbeCache, tensor_types: frozenset[str]) -> tuple[str, bool]:
    """Return the key of a verdict, and whether a library's digest was added to ``stored``."""
    digest, fresh = hashlib.sha256(), False
    for path in _library_files():
        status = path.stat()
        known = stored.libraries.get(str(path))
        if known is None or (known.size, known.mtime_ns) != (status.st_size, status.st_mtime_ns):
            known = _File(status.st_size, status.st_mtime_ns, [sha256_file(path)])
            stored.libraries[str(path)] = known
            fresh = True
        digest.update(f"{path.name} {known.value}\n".encode())
    for part in (cpu_model(), sorted(cpu_flags()), sorted(tensor_types)):
        digest.update(f"{part}\n".encode())
    return digest.hexdigest(), fresh


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


def _run_trial(command: Sequence[str], base: Path, use_extra_bufts: bool, timeout_s: float) -> _Trial:
    """Run a child with or without extra buffers."""
    # a debugger's backtrace would take long and hide the reason
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    environment.pop(ENVIRONMENT, None)
    try:
        child = subprocess.run(
            [*command, str(base.absolute()), "1" if use_extra_bufts else "0"],
            stdin=subprocess.DEVNULL,  # stdin may hold the user's prompt
            capture_output=True,
            timeout=timeout_s,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _Trial(f"did not finish within {timeout_s:g} s", reproducible=False)
    if child.returncode == 0:
        return _Trial()
    lines = child.stderr.decode("utf-8", "replace").strip().splitlines()
    last = lines[-1].strip()[:300] if lines else ""
    detail = f" ({last})" if last else ""
    if child.returncode == REFUSED:
        return _Trial(f"failed{detail}", refused=last)
    if 0 < child.returncode < 256:
        return _Trial(f"ended with exit code {child.returncode}{detail}")
    return _Trial(
        f"crashed with {signal_name(child.returncode)}{detail}", reproducible=child.returncode != -9
    )


def signal_name(code: int) -> str:
    """Name of the signal or status that ended a process."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"code {code & 0xFFFFFFFF:#x}"  # Windows returns an NTSTATUS code instead


def _failure_message(base: Path, plain: _Trial) -> str:
    if plain.refused:
        return plain.refused
    return f"llama.cpp {plain.failure} in a trial run of {base.name}; build it for this machine: {rebuild_command()}"


def _load_cache(cache: Path) -> _ProbeCache:
    try:
        return msgspec.json.decode(cache.read_bytes(), type=_ProbeCache)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return _ProbeCache()  # absent or damaged: everything in it can be recomputed


def _save_cache(cache: Path, stored: _ProbeCache) -> None:
    for entries in (stored.verdicts, stored.libraries, stored.bases):
        for old in list(entries)[:-_MAX_ENTRIES]:
            del entries[old]
    try:
        write_text(cache, msgspec.json.encode(stored).decode())
    except OSError:
        pass  # a read-only cache costs a trial at each start
