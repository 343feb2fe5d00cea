"""Selects the pack that a change applies to: the named pack, a copy of a read-only one, or a new one.

Packs shipped with Loramix and packs in unwritable directories are read-only. A copy or a new pack is created
atomically together with the change. Unchanged files are hard links, which is safe because packs replace files and
never modify them in place.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from loramix.defaults import DEFAULT_PACK
from loramix.errors import Busy, InvalidArtifact, NotFound, UsageError
from loramix.formats.validate import read_base
from loramix.models import bases
from loramix.models.known_bases import BASES
from loramix.pack.files import digests
from loramix.pack.manifest import MANIFEST, BaseReference, Manifest, write_manifest
from loramix.pack.pack import Pack, is_directory, is_shipped, is_shipped_name
from loramix.paths import (
    atomic_directory,
    data_dir,
    safe_join,
    safe_name,
    sha256_file,
    share_file,
    write_bytes,
    write_text,
)

ORIGIN = ".copy.json"
"""File that names the pack of which a pack is a copy; further changes of that pack are made in the copy."""


@dataclass(frozen=True, slots=True)
class Target:
    """The pack that a command changes.

    Args:
        pack: the pack before the change; if ``fresh``, the initial content of the new directory.
        directory: absolute directory of the changed pack.
        fresh: whether the directory does not exist yet.
        note: message for the user before the change; may be empty.
        origin: if ``fresh``, the pack that is copied; empty for a new pack.
    """

    pack: Pack
    directory: Path
    fresh: bool = False
    note: str = ""
    origin: str = ""

    @contextmanager
    def changing(self) -> Iterator[Path]:
        """Yield a directory to change; a new one is renamed to its final name at the end.

        Raises:
            Busy: another process created the directory meanwhile.
            InvalidArtifact, NotFound: a file of the pack to copy is invalid or missing.
        """
        if not self.fresh:
            yield self.directory
            return
        try:
            with atomic_directory(self.directory) as staging:
                _fill(self.pack, staging, self.directory.name)
                if self.origin:
                    write_text(staging / ORIGIN, json.dumps({"copy_of": self.origin}) + "\n")
                yield staging
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise Busy(
                f"another process created {self.directory} meanwhile; run the command again."
            ) from None

    @property
    def used_as(self) -> str:
        """Value of ``--pack`` for it: its name if it is found by name, otherwise its directory."""
        named = self.directory.parent == (data_dir() / "packs").absolute()
        return self.directory.name if named else str(self.directory)


def target_of(text: str, *, to: str = "", base: str = "", make: bool = False) -> Target:
    """Find or prepare the pack that a command changes, without writing anything.

    Args:
        text: the pack, by name or directory.
        to: name or directory of a copy to change instead; by default ``my-NAME`` for a pack that is read-only,
            and the pack itself for others.
        base: name or GGUF of a new pack's base; by default the default base. An existing pack must have it.
        make: create a new pack if ``text`` is a directory that does not exist.

    Raises:
        NotFound: the pack does not exist.
        UsageError: ``to`` names another pack, or the pack has another base.
    """
    try:
        found = Pack.load(text)
    except NotFound as error:
        if not make:
            raise
        if not is_directory(text):
            raise NotFound(f"{error} For a new pack give its directory, as in --pack ./{text}") from None
        return new_target(Path(text), base or DEFAULT_PACK)
    known = found.manifest.base
    if base not in ("", known.name) and bases.digest(bases.resolve(base)) != known.sha256:
        raise UsageError(
            f"pack {found.name} is on base {known.name}; --base is only for a new pack: leave it out."
        )
    kept = _why_kept(found.directory)
    directory = _place(to or f"my-{found.name}") if kept or to else found.directory.absolute()
    if directory.resolve() == found.directory.resolve():
        if kept:
            raise UsageError(f"pack {found.name} {kept}; change a copy of it with --to NAME.")
        return Target(found, directory)
    origin = _identity(found)
    stays = f"pack {found.name} {kept} and stays as it is" if kept else f"pack {found.name} stays as it is"
    if (directory / MANIFEST).is_file():
        if _origin(directory) != origin:
            raise UsageError(
                f"pack {directory.name} already exists and is not a copy of {found.name}: change it with "
                f"--pack {directory.name}, or name another copy with --to NAME."
            )
        note = f"{stays}; this changes your copy of it, {directory.name} ({directory})"
        return Target(Pack.load(directory), directory, note=note)
    _check_free(directory)
    note = f"{stays}; this changes a copy of it, {directory.name} ({directory})"
    return Target(found, directory, fresh=True, note=note, origin=origin)


def new_target(directory: Path, base: str) -> Target:
    """Prepare a new pack.

    Args:
        directory: directory of the pack; it must not exist, or be empty.
        base: name or GGUF of the base.

    Raises:
        UsageError: the directory is not empty, or its name is not a valid pack name.
        NotFound: the base does not exist.
        InvalidArtifact: the file is not a base.
    """
    directory = directory.absolute()
    name = safe_name(directory.name, "pack")
    _check_free(directory)
    path = bases.resolve(base)
    read_base(path)
    named = str(path.absolute()) if Path(base).is_file() and base not in BASES else base
    reference = BaseReference(name=named, sha256=bases.digest(path))
    manifest = Manifest(format=1, name=name, description="", license="Apache-2.0", base=reference)
    note = f"this creates a new pack, {name} ({directory}), on base {base}"
    return Target(Pack(directory, manifest), directory, fresh=True, note=note)


def copy_pack(source: Pack, directory: Path) -> Pack:
    """Copy a pack atomically.

    Args:
        source: the pack to copy; each file's digest is checked.
        directory: directory of the copy, whose name becomes the pack's; it must not exist, or be empty.

    Raises:
        UsageError: the directory is not empty, or its name is not a valid pack name.
        InvalidArtifact, NotFound: a file of the pack is invalid or missing.
    """
    directory = directory.absolute()
    safe_name(directory.name, "pack")
    _check_free(directory)
    with Target(source, directory, fresh=True, origin=_identity(source)).changing():
        pass
    return Pack.load(directory)


def _fill(source: Pack, directory: Path, name: str) -> None:
    """Copy a pack's files and its manifest into a directory, under another name."""
    for file, digest in digests(source.manifest).items():
        path, copy = safe_join(source.directory, file), directory / file
        if not path.is_file():
            raise NotFound(f"{source.directory / file} does not exist; get the pack again.")
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not digest:  # a card: users edit text files in place, and a link would change the source
            write_bytes(copy, path.read_bytes())
            continue
        share_file(path, copy)
        if (found := sha256_file(copy)) != digest:
            raise InvalidArtifact(
                f"{source.directory / file} has SHA-256 {found[:12]}…, {MANIFEST} needs {digest[:12]}…: "
                "get the pack again."
            )
    write_manifest(directory, replace(source.manifest, name=name))


def _why_kept(directory: Path) -> str:
    """Return why a pack is read-only; empty if it is not."""
    if is_shipped(directory):
        return "ships with Loramix"
    return "" if os.access(directory, os.W_OK | os.X_OK) else "is in a directory that cannot be written"


def _place(to: str) -> Path:
    """Return the directory of a copy given by name or directory."""
    if is_directory(to):
        directory = Path(to).absolute()
        safe_name(directory.name, "pack")
        return directory
    if is_shipped_name(to):
        raise UsageError(f"{to} is a pack that ships with Loramix; give the copy another name with --to.")
    return (data_dir() / "packs" / to).absolute()


def _check_free(directory: Path) -> None:
    if (directory / MANIFEST).exists():
        raise UsageError(f"{directory} is already a pack; name another directory.")
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UsageError(f"{directory} already exists and is not a pack; name another directory.")


def _identity(pack: Pack) -> str:
    """Return the name of a pack in `ORIGIN`; a shipped pack may move with an upgrade, so it has no path."""
    return pack.directory.name if pack.is_shipped else str(pack.directory.resolve())


def _origin(directory: Path) -> str:
    try:
        found = json.loads((directory / ORIGIN).read_bytes())
    except (OSError, ValueError):
        return ""
    return str(found.get("copy_of", "")) if isinstance(found, dict) else ""
