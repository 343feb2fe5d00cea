"""Data directories, safe file names, and atomic writes (temporary file, fsync, replace)."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from loramix.errors import InvalidArtifact, NoSpace, NotFound, UsageError

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_RESERVED = {"con", "prn", "aux", "nul", *(f"com{i}" for i in range(10)), *(f"lpt{i}" for i in range(10))}


def _home() -> Path:
    """The user's home directory.

    Raises:
        NotFound: there is none: HOME is unset and the system does not know the user, as in some containers.
    """
    try:
        return Path.home()
    except RuntimeError:
        raise NotFound(
            "this user has no home directory: set HOME to one, or LORAMIX_CACHE and LORAMIX_DATA to directories that "
            "can be written."
        ) from None


def cache_dir() -> Path:
    """Return the directory of reproducible files: ``LORAMIX_CACHE``, else XDG's, else ``~/.cache/loramix``."""
    if own := os.environ.get("LORAMIX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "loramix"


def data_dir() -> Path:
    """Return the directory of the user's packs: ``LORAMIX_DATA``, else XDG's, else ``~/.local/share/loramix``."""
    if own := os.environ.get("LORAMIX_DATA"):
        return Path(own)
    return Path(os.environ.get("XDG_DATA_HOME") or _home() / ".local" / "share") / "loramix"


def is_safe_name(name: str) -> bool:
    """Whether ``name`` is a safe file name: at most 64 of lower-case ASCII letters, digits, ``_ . -``.

    Names with ``..``, with a final dot, or reserved by some systems are not safe.
    """
    return bool(
        _NAME.fullmatch(name)
        and ".." not in name
        and not name.endswith(".")
        and name.split(".")[0] not in _RESERVED
    )


def safe_name(name: str, what: str = "name") -> str:
    """Return ``name`` if it is safe as a file name.

    Raises:
        UsageError: it is not.
    """
    if not is_safe_name(name):
        raise UsageError(
            f"{what} {name[:80]!r} is not usable: it needs 1 to 64 of a-z, 0-9, '_', '.', '-', "
            "and a letter or digit first."
        )
    return name


def safe_join(root: Path, relative: str) -> Path:
    """Join a manifest's relative path to its directory, and reject paths that leave the directory.

    Args:
        root: the directory that must hold the file.
        relative: a relative POSIX path from an untrusted file.

    Raises:
        InvalidArtifact: the path is absolute, has unsafe parts, or is a link to outside the directory.
    """
    parts = relative.split("/")
    if (
        not relative.isascii()
        or not relative
        or len(relative) > 200
        or not all(is_safe_name(part.lower()) for part in parts)
    ):
        raise InvalidArtifact(
            f"path {relative[:80]!r} in {root} is refused: it must be a plain path inside that directory."
        )
    path = (root / relative).resolve()
    if not path.is_relative_to(root.resolve()):
        raise InvalidArtifact(f"path {relative[:80]!r} leads outside {root} and is refused.")
    return path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the directory of ``path``; on success fsync it and move it to ``path``.

    On an error the temporary file is removed and ``path`` is unchanged.

    Args:
        path: the file to create or replace; its directory is created if needed.

    Yields:
        The temporary path, for writers that open files by name.

    Raises:
        UsageError: the path is a directory.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a directory; give the name of a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:80]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open the temporary file of `atomic_path` for binary writing."""
    with atomic_path(path) as temporary, temporary.open("xb") as file:
        yield file


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Create a directory atomically: yield a temporary directory, and rename it to ``path`` on success.

    Args:
        path: a directory that does not exist.

    Yields:
        The temporary directory; write its files with `write_bytes` or similar functions, which fsync them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:80]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(path.parent)


def need_space(
    path: Path,
    size_bytes: int,
    what: str,
    *,
    spare_bytes: int = 16 * 2**20,
    fix: str = "free some, or write to another disk.",
) -> None:
    """Check before a write that the disk has enough free space.

    Args:
        path: the file to be written; its directory may not exist yet.
        size_bytes: size of the file.
        what: name of the file's content, for the message.
        spare_bytes: additional free bytes, for other writes at the same time.
        fix: how to free space, for the message.

    Raises:
        NoSpace: the disk has less free space.
    """
    there = next(parent for parent in path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(there).free
    if free < size_bytes + spare_bytes:
        raise NoSpace(
            f"{what} needs {size_bytes / 1e6:,.0f} MB and {there} has {free / 1e6:,.0f} MB free: {fix}"
        )


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` through `atomic_write`."""
    with atomic_write(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 ``content`` to ``path`` through `atomic_write`."""
    write_bytes(path, content.encode())


def share_file(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to ``source``, or a copy if the file system does not support it.

    Args:
        source: a file that is only ever replaced, never modified in place.
        target: a path that does not exist.
    """
    try:
        os.link(source, target)
    except OSError:  # another file system, or another user's file
        with source.open("rb") as file, atomic_write(target) as copy:
            shutil.copyfileobj(file, copy)
    else:
        sync_directory(target.parent)


def open_lines(path: Path, head: bytes) -> tuple[IO[bytes], list[bytes]] | None:
    """Open a line-oriented file for appending; truncate an incomplete last line.

    Args:
        path: an existing file.
        head: its expected first line, with the line end.

    Returns:
        The file, positioned at its end, and its complete lines after the first; None if the first line differs.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    if lines[:1] != [head]:
        return None
    whole = [line for line in lines[1:] if line.endswith(b"\n")]
    file = path.open("r+b")
    file.truncate(len(head) + sum(map(len, whole)))
    file.seek(0, os.SEEK_END)
    return file, whole


def sync_directory(directory: Path) -> None:
    """Fsync a directory, so that a rename in it survives a power failure, if the system supports it."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:  # a system that cannot open directories
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
