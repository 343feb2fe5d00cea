"""Where files live, which names are safe, and the only way a file is written: temp, fsync, replace."""

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
    """Directory for what can be made again: ``LORAMIX_CACHE``, else XDG's, else ``~/.cache/loramix``."""
    if own := os.environ.get("LORAMIX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache") / "loramix"


def data_dir() -> Path:
    """Directory for the user's own packs: ``LORAMIX_DATA``, else XDG's, else ``~/.local/share/loramix``."""
    if own := os.environ.get("LORAMIX_DATA"):
        return Path(own)
    return Path(os.environ.get("XDG_DATA_HOME") or _home() / ".local" / "share") / "loramix"


def is_safe_name(name: str) -> bool:
    """Whether ``name`` may become a file name: lower-case ASCII, digits, ``_ . -``, 64 at most.

    Names that climb, that end in a dot or that some systems reserve are refused.
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
    """Join a path that a manifest names to its directory, and refuse what would leave it.

    Args:
        root: the directory that must hold the file.
        relative: a relative POSIX path from an untrusted file.

    Raises:
        InvalidArtifact: absolute, climbing, odd, or a link that leads outside.
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
    """Name a temporary file beside ``path``; on success fsync it and move it into place.

    On any error the temporary file is removed and what was at ``path`` stays as it was.

    Args:
        path: the file to make or to replace; its directory is made if needed.

    Yields:
        The temporary path, for writers that open files by name.
    """
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
    """Make a directory whole or not at all: its files are written beside ``path``, then it is moved there.

    Args:
        path: a directory that does not exist.

    Yields:
        The temporary directory; write files into it through `write_bytes` and the like, which fsync them.
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
    mend: str = "free some, or write to another disk.",
) -> None:
    """Refuse a write that its disk cannot hold, before it begins.

    Args:
        path: the file to be written; its directory need not exist yet.
        size_bytes: what it will take.
        what: it is, for the message.
        spare_bytes: asked for beside it, for what else is written meanwhile.
        mend: what the user can do, for the message.

    Raises:
        NoSpace: less is free.
    """
    there = next(parent for parent in path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(there).free
    if free < size_bytes + spare_bytes:
        raise NoSpace(
            f"{what} needs {size_bytes / 1e6:,.0f} MB and {there} has {free / 1e6:,.0f} MB free: {mend}"
        )


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` through `atomic_write`."""
    with atomic_write(path) as file:
        file.write(content)


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 ``content`` to ``path`` through `atomic_write`."""
    write_bytes(path, content.encode())


def share_file(source: Path, target: Path) -> None:
    """Make ``target`` a hard link to ``source``, or a copy where the file system has no such links.

    Args:
        source: a file that is replaced and never written into.
        target: not there yet.
    """
    try:
        os.link(source, target)
    except OSError:  # another file system, or another user's file
        with source.open("rb") as file, atomic_write(target) as copy:
            shutil.copyfileobj(file, copy)
    else:
        sync_directory(target.parent)


def open_lines(path: Path, head: bytes) -> tuple[IO[bytes], list[bytes]] | None:
    """Open a file that grows line by line, for more; what a kill has torn at its end is cut off.

    Args:
        path: the file, which exists.
        head: its first line, with its end.

    Returns:
        The file at its end, and the whole lines behind the first; None where the first is another.
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
    """Make a rename in ``directory`` survive a power cut, where the system can."""
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
