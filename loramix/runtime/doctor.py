"""``loramix doctor``: what this machine has, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from loramix.errors import LoramixError
from loramix.paths import cache_dir
from loramix.runtime import cpu

Status = Literal["ok", "warn", "fail"]
NEEDED_MEMORY = 450 * 10**6
_TELLING = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "neon",
    "asimd",
)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    detail: str
    mend: str = ""


def report(pack: str = "smollm2-135m", base: str = "smollm2-135m") -> list[Check]:
    """Look at everything a run needs; nothing here can crash or raise.

    Args:
        pack: pack to check.
        base: base to look for.
    """
    steps: list[tuple[str, Callable[[], Check]]] = [
        ("python", _python),
        ("cpu", _cpu),
        ("memory", _memory),
        ("llama.cpp", _build),
        ("base", lambda: _base(base)),
        ("native probe", lambda: _probe(base)),
        ("pack", lambda: _pack(pack)),
        ("cache", _cache),
        ("training", _training),
    ]
    checks = []
    for name, step in steps:
        try:
            checks.append(step())
        except LoramixError as error:
            checks.append(Check(name, "fail", str(error)))
        except (OSError, ValueError) as error:
            checks.append(Check(name, "fail", f"{type(error).__name__}: {error}"))
    return checks


def to_json(checks: list[Check]) -> str:
    """The checks as a JSON list."""
    return json.dumps([asdict(check) for check in checks])


def _python() -> Check:
    version = platform.python_version()
    fits = sys.version_info >= (3, 11)
    return Check(
        "python",
        "ok" if fits else "fail",
        f"{version} on {platform.platform()}",
        "install Python 3.11 or newer",
    )


def _cpu() -> Check:
    flags = cpu.cpu_flags()
    found = " ".join(flag for flag in _TELLING if flag in flags) or "no flags known"
    slow = bool(flags) and "avx2" not in flags and "asimd" not in flags
    detail = f"{cpu.cpu_model()}; {found}; {cpu.default_threads()} threads used"
    return Check(
        "cpu", "warn" if slow else "ok", detail, "without AVX2 answers are slow; any newer CPU helps"
    )


def _memory() -> Check:
    total, free = cpu.memory_bytes()
    if not total:
        return Check("memory", "warn", "the system does not tell")
    detail = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB; the default pack needs {NEEDED_MEMORY / 1e9:.2f} GB"
    return Check(
        "memory", "ok" if free > NEEDED_MEMORY else "warn", detail, "close other programs, or lower --ctx"
    )


def _build() -> Check:
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return Check(
            "llama.cpp", "fail", "llama-cpp-python is not installed", "pip install llama-cpp-python==0.3.36"
        )
    # in a child, since a broken library may kill the process that loads it
    code = "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())"
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    if child.returncode:
        from loramix.runtime.probe import MEND

        return Check(
            "llama.cpp", "fail", f"llama-cpp-python {version} does not load (code {child.returncode})", MEND
        )
    features = " ".join(child.stdout.split())
    expected = version == "0.3.36"
    mend = "pip install llama-cpp-python==0.3.36"
    return Check("llama.cpp", "ok" if expected else "fail", f"llama-cpp-python {version}; {features}", mend)


def _base(name: str) -> Check:
    from loramix.models import bases

    path = bases.find(name)
    if path is None:
        return Check("base", "fail", f"{name} is not on this machine", f"loramix pull {name}")
    wanted, found = bases.BASES[name].sha256, bases.digest(path)
    detail = f"{path} ({path.stat().st_size / 1e6:.0f} MB, sha256 {found[:12]})"
    if wanted and found != wanted:
        return Check(
            "base", "fail", f"{detail}, needs {wanted[:12]}", f"delete it and run 'loramix pull {name}'"
        )
    return Check("base", "ok", detail)


def _probe(name: str) -> Check:
    from loramix.models import bases
    from loramix.runtime.probe import MEND, verdict_for

    path = bases.find(name)
    if path is None:
        return Check("native probe", "warn", "needs the base", f"loramix pull {name}")
    found = verdict_for(path)
    return Check("native probe", "ok" if found.use_extra_bufts else "warn", found.reason, MEND)


def _pack(name: str) -> Check:
    from loramix.models import bases
    from loramix.pack import Pack

    pack = Pack.load(name)
    notes = pack.check(bases.find(pack.manifest.base.name))
    skills = ", ".join(skill.name for skill in pack.skills)
    return Check(
        "pack", "ok" if not notes else "warn", f"{pack.name} in {pack.directory}: {skills}", "; ".join(notes)
    )


def _cache() -> Check:
    folder = cache_dir()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    writable = os.access(existing, os.W_OK)
    detail = f"{folder}; {free / 1e9:.1f} GB free"
    if not writable:
        return Check("cache", "fail", f"{detail}; not writable", "set LORAMIX_CACHE to a directory of yours")
    return Check("cache", "ok" if free > 10**9 else "warn", detail, "free some disk space")


def _training() -> Check:
    missing = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        return Check(
            "training", "ok", f"not installed ({', '.join(missing)} missing); running needs none of it"
        )
    return Check("training", "ok", "installed")
