"""Changes to a pack: add or remove a skill, put in a gate; one process at a time.

Killed at any moment, the pack is left whole: its manifest never names a file of another digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from msgspec.structs import replace

from loramix.errors import Busy, InvalidArtifact, NotFound, UsageError
from loramix.manifest import (
    GateReference,
    Manifest,
    SkillEntry,
    check_manifest,
    read_manifest,
    write_manifest,
)
from loramix.models.gate_numpy import NumpyGate
from loramix.models.mixing import RESERVED_NAMES
from loramix.pack import Pack, check_gate
from loramix.paths import safe_join, safe_name, write_bytes


class Change(NamedTuple):
    """A pack after a change, and what to tell the user."""

    pack: Pack
    message: str


def add_skill(
    directory: Path,
    name: str,
    adapter: bytes | Path,
    *,
    description: str,
    max_tokens: int,
    example: str | None = None,
    card: str | None = None,
    replace_existing: bool = False,
) -> Change:
    """Add a skill to a pack; its gate goes, as it cannot choose the new skill.

    Args:
        directory: the pack.
        name: the new skill.
        adapter: the GGUF LoRA's content, or its path.
        description: one line for listings.
        max_tokens: longest answer, in tokens.
        example: a prompt that shows the skill.
        card: Markdown text on data, results and limits.
        replace_existing: take the place of a skill of the same name.

    Raises:
        UsageError: a name that no skill can have, or one the pack has already.
        InvalidArtifact: not a GGUF file, or an entry that `Pack.load` would refuse.
        NotFound: no such pack or adapter file.
        Busy: another process is changing the pack.
    """
    check_skill_name(name)
    if isinstance(adapter, Path):
        if not adapter.is_file():
            raise NotFound(f"no adapter at {adapter}; give a GGUF LoRA file.")
        adapter = adapter.read_bytes()
    if not adapter.startswith(b"GGUF"):
        raise InvalidArtifact(f"the adapter of {name} is not a GGUF file; convert it with `loramix convert`.")
    entry = SkillEntry(
        name=name,
        description=description,
        file=f"skills/{name}.gguf",
        sha256=hashlib.sha256(adapter).hexdigest(),
        max_tokens=max_tokens,
        card=f"skills/{name}.md" if card is not None else None,
        example=example,
    )
    with _changing(directory) as manifest:
        old = [skill for skill in manifest.skills if skill.name == name]
        if old and not replace_existing:
            raise UsageError(
                f"pack {manifest.name} has a skill {name} already; remove it, or ask to replace it."
            )
        without = replace(manifest, gate=None, skills=tuple(s for s in manifest.skills if s.name != name))
        whole = replace(without, skills=(*without.skills, entry))
        check_manifest(whole, directory)  # refuse before anything is written
        if old or manifest.gate:
            _drop(directory, manifest, without)
        write_bytes(directory / entry.file, adapter)
        if entry.card is not None and card is not None:
            write_bytes(directory / entry.card, card.encode(errors="replace"))
        pack = Pack(directory, write_manifest(directory, whole))
        return Change(pack, _gate_message(f"skill {name} added", manifest))


def remove_skill(directory: Path, name: str) -> Change:
    """Remove a skill and its files from a pack; its gate goes, as it would still choose that skill.

    Raises:
        UnknownSkill: the pack has no such skill.
        NotFound: no such pack.
        Busy: another process is changing the pack.
    """
    with _changing(directory) as manifest:
        Pack(directory, manifest).skill(name)
        without = replace(manifest, gate=None, skills=tuple(s for s in manifest.skills if s.name != name))
        _drop(directory, manifest, without)
        return Change(Pack(directory, without), _gate_message(f"skill {name} removed", manifest))


def set_gate(directory: Path, data: bytes) -> Pack:
    """Put a trained gate into a pack.

    Args:
        directory: the pack.
        data: content of a gate.npz, for this pack's base and skills.

    Raises:
        InvalidArtifact: not a gate, or one for other skills.
        WrongBase: a gate for another base.
        NotFound: no such pack.
        Busy: another process is changing the pack.
    """
    with _changing(directory) as manifest:
        check_gate(NumpyGate.from_bytes(data), manifest, directory)
        if manifest.gate:
            _drop(directory, manifest, replace(manifest, gate=None))
        write_bytes(directory / "gate.npz", data)
        reference = GateReference(file="gate.npz", sha256=hashlib.sha256(data).hexdigest())
        return Pack(directory, write_manifest(directory, replace(manifest, gate=reference)))


def check_skill_name(name: str) -> str:
    """Return ``name`` if a skill may have it.

    Raises:
        UsageError: not safe as a file name, or a word that means something else where skills are named.
    """
    if safe_name(name, "skill") in RESERVED_NAMES:
        raise UsageError(f"{name!r} is a word of Loramix's own and cannot be a skill; choose another name.")
    return name


@contextmanager
def _changing(directory: Path) -> Iterator[Manifest]:
    """The manifest, while no other process can change it."""
    Pack.load(directory.absolute())  # no lock file where there is no pack
    try:
        with FileLock(directory / ".lock", timeout=0.5):
            yield read_manifest(directory)
    except Timeout:
        raise Busy(f"another process is changing {directory}; run the command again after it.") from None


def _drop(directory: Path, before: Manifest, after: Manifest) -> None:
    """Write ``after``, then remove the files that only ``before`` names."""

    def files(manifest: Manifest) -> set[str]:
        skills = {file for skill in manifest.skills for file in (skill.file, skill.card) if file}
        return skills | ({manifest.gate.file} if manifest.gate else set())

    write_manifest(directory, after)
    for file in files(before) - files(after):
        safe_join(directory, file)
        (directory / file).unlink(missing_ok=True)  # a link itself, not the file it leads to


def _gate_message(what: str, before: Manifest) -> str:
    gone = "its gate is dropped, " if before.gate else ""
    return f"{what}; {gone}run `loramix train gate` so that prompts find their skill."
