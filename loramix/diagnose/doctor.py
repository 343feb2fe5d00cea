"""The checks of ``loramix doctor``: machine, native build, base, pack and cache, each with a fix.

The checks are independent, so that one failure does not hide another. Native code runs in child processes only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from loramix import hardware
from loramix.defaults import DEFAULT_PACK, LLAMA_CPP
from loramix.errors import LoramixError
from loramix.models import bases
from loramix.models.known_bases import BASES
from loramix.paths import cache_dir
from loramix.runtime import probe

NEEDED_BYTES = 450 * 10**6
"""Memory of the default pack with 2,048 tokens of context."""
NEEDED_DISK_BYTES = 500 * 10**6
"""Disk space for the default base and its copy in the cache."""
_FEATURES = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "sve"),  # ARM
)
_TRAIN = ("torch", "transformers", "peft", "safetensors", "accelerate", "rouge_score")
_INFO = (
    "import json, llama_cpp, llama_cpp.llama_cpp as C\n"
    "print(json.dumps([llama_cpp.__version__, C.llama_print_system_info().decode('utf-8', 'replace')]))"
)

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one check."""

    name: str
    status: Status
    """``warn`` is informative; only ``fail`` keeps Loramix from running."""
    detail: str
    fix: str = ""
    """What the user can do about it, if anything."""


def report(pack: str = DEFAULT_PACK, base: str = DEFAULT_PACK) -> list[Check]:
    """Run all checks, the machine first; none of them raises.

    Args:
        pack: name or directory of the pack to check.
        base: name of the base to look for.
    """
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("python", _python),
        ("platform", _platform),
        ("cpu", _cpu),
        ("threads", _threads),
        ("memory", _memory),
        ("llama.cpp", _llama),
        ("base", lambda: _base(base)),
        ("native probe", lambda: _probe(base)),
        ("pack", lambda: _pack(pack)),
        ("cache", _cache),
        ("training", _training),
    ]
    return [_guarded(name, check) for name, check in checks]


def to_json(checks: Sequence[Check]) -> str:
    """Return the checks as a JSON list.

    The JSON key of ``fix`` keeps its former name, because existing programs rely on it.
    """
    rows = [{"mend" if key == "fix" else key: value for key, value in asdict(c).items()} for c in checks]
    return json.dumps(rows, ensure_ascii=False, indent=1)


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except LoramixError as error:
        return Check(name, "fail", str(error))
    except Exception as error:  # a bug in one check must not stop the others
        return Check(name, "fail", f"the check itself failed: {type(error).__name__}: {error}")


def _python() -> Check:
    version, bits = platform.python_version(), 64 if sys.maxsize > 2**32 else 32
    detail = f"{version}, {bits} bit, {sys.executable}"
    if sys.version_info < (3, 11) or bits < 64:
        return Check("python", "fail", detail, "install a 64-bit Python 3.11 or newer")
    return Check("python", "ok", detail)


def _platform() -> Check:
    return Check("platform", "ok", platform.platform())


def _cpu() -> Check:
    flags = hardware.cpu_flags()
    found = [name for name in _FEATURES if name in flags]
    detail = f"{hardware.cpu_model()}; {', '.join(found) or 'no features known'}"
    if flags and platform.machine().lower() in ("x86_64", "amd64") and "avx2" not in flags:
        return Check("cpu", "warn", detail, "a CPU with AVX2 is several times faster")
    return Check("cpu", "ok", detail)


def _threads() -> Check:
    quota = hardware.cpu_quota()
    usable = f"{hardware.cpu_count()} of {os.cpu_count()} logical processors usable"
    detail = f"{hardware.default_threads()} by default; {usable}"
    if quota is not None:
        detail += f", quota of {quota:g}"
    if quota is not None and quota < 1:
        return Check("threads", "warn", detail, "give the container at least one whole processor")
    return Check("threads", "ok", detail)


def _memory() -> Check:
    total, available = hardware.memory_bytes()
    if not total:
        return Check("memory", "warn", "this system does not report how much memory it has")
    need = f"the default pack needs {_size(NEEDED_BYTES)}"
    detail = f"{_size(available)} available of {_size(total)}; {need}"
    if total < NEEDED_BYTES:
        return Check("memory", "fail", detail, "use a machine, or a container limit, with more memory")
    if available < NEEDED_BYTES:
        return Check("memory", "warn", detail, "close other programs, or use a smaller --ctx")
    return Check("memory", "ok", detail)


def _llama() -> Check:
    fix = probe.rebuild_command()
    if importlib.util.find_spec("llama_cpp") is None:
        return Check("llama.cpp", "fail", "llama-cpp-python is not installed", fix)
    # in a child process, because a broken library may crash it
    command = [sys.executable, "-P", "-c", _INFO]
    try:
        child = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )
        version, features = json.loads(child.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return Check("llama.cpp", "fail", "loading the library took over 60 s", fix)
    except (ValueError, IndexError):
        reason = (child.stderr.strip().splitlines() or ["no message"])[-1][:300]
        how = probe.signal_name(child.returncode) if child.returncode < 0 else f"exit code {child.returncode}"
        return Check("llama.cpp", "fail", f"the library cannot be loaded: {how} ({reason})", fix)
    detail = f"llama-cpp-python {version}; {' '.join(str(features).split())}"
    if version != (wanted := LLAMA_CPP.partition("==")[2]):
        # the ctypes structs match one version of the library
        return Check("llama.cpp", "fail", f"{detail}; {wanted} is needed", fix)
    return Check("llama.cpp", "ok", detail)


def _base(name: str) -> Check:
    pull = f"loramix pull {name}"
    path = bases.find(name)
    if path is None:
        return Check("base", "fail", f"{name} is not on this machine", pull)
    found, wanted = bases.digest(path), BASES[name].sha256 if name in BASES else ""
    detail = f"{name}, {path}, {_size(path.stat().st_size)}, sha256 {found[:12]}"
    if wanted and found != wanted:
        return Check("base", "fail", f"{detail}; {wanted[:12]} is needed", f"delete it, then {pull}")
    return Check("base", "ok", detail)


def _probe(name: str) -> Check:
    path = bases.find(name)
    if path is None:
        return Check("native probe", "warn", "not run: the base is missing", f"loramix pull {name}")
    verdict = probe.verdict_for(path)
    when = f"; took {verdict.seconds:.1f} s" if verdict.seconds else "; remembered" if verdict.key else ""
    if verdict.use_extra_bufts or not verdict.key:
        return Check("native probe", "ok", verdict.reason + when)
    fix = f"it works, but prompts are decoded more slowly; to build llama.cpp for this CPU: {probe.rebuild_command()}"
    return Check("native probe", "warn", verdict.reason + when, fix)


def _pack(name: str) -> Check:
    from loramix.diagnose.wording import counted
    from loramix.pack.pack import Pack

    pack = Pack.load(name)
    notes = pack.check(bases.find(pack.manifest.base.name))
    detail = f"{pack.name}, {pack.directory}, {counted(len(pack.skills), 'skill')}, all files valid"
    if notes:
        return Check("pack", "warn", "; ".join([detail, *notes]), f"loramix pack check {pack.name}")
    return Check("pack", "ok", detail)


def _cache() -> Check:
    directory = cache_dir()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"\0")
        free = shutil.disk_usage(directory).free
    except OSError as error:
        detail = f"{directory} cannot be written: {error.strerror or error}"
        return Check("cache", "fail", detail, "set LORAMIX_CACHE to a directory that you can write")
    detail = f"{directory} is writable, {_size(free)} free"
    if free < NEEDED_DISK_BYTES:
        return Check("cache", "warn", detail, f"free {_size(NEEDED_DISK_BYTES)} to fetch a base")
    return Check("cache", "ok", detail)


def _training() -> Check:
    missing = [name for name in _TRAIN if importlib.util.find_spec(name) is None]
    if missing:
        detail = f"not installed ({', '.join(missing)} missing); only training needs it"
        return Check("training", "warn", detail, "pip install 'loramix[train]'")
    return Check("training", "ok", "installed")


def _size(number: int) -> str:
    """Format a number of bytes in decimal units."""
    return f"{number / 1e9:.1f} GB" if number >= 10**9 else f"{number / 1e6:.0f} MB"
