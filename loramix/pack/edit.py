"""Changes a pack atomically: a kill at any moment leaves the old or the new pack, as only the manifest is replaced."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from msgspec.structs import replace

from loramix.errors import Busy, InvalidArtifact, LoramixError, NotFound, UsageError
from loramix.models.gate_file import read_gate
from loramix.models.mixing import RESERVED_NAMES
from loramix.pack.files import NewFiles, digest_of, digests
from loramix.pack.manifest import (
    MANIFEST,
    BaseReference,
    GateReference,
    Labels,
    Manifest,
    SkillEntry,
    check_manifest,
    read_manifest,
    write_manifest,
)
from loramix.pack.pack import Pack, check_gate
from loramix.paths import safe_join, safe_name, write_bytes


class Change(NamedTuple):
    """A pack after a change, and the message for the user."""

    pack: Pack
    message: str


class NewGate(NamedTuple):
    """A gate for a pack, and the features to extend it."""

    gate: bytes
    """Content of gate.npz."""
    features: bytes | None = None
    """Content of gate-features.npz: features of the training prompts, for the next skill."""


def new_pack(
    directory: Path, base: str, base_sha256: str, *, description: str = "", license: str = "Apache-2.0"
) -> Pack:
    """Create an empty pack, named after its directory.

    Args:
        directory: directory of the pack; created if needed.
        base: name or path of the base.
        base_sha256: SHA-256 of the base.
        description: one line.
        license: licence of the pack.

    Raises:
        UsageError: the directory already has a pack, or its name is not a valid pack name.
    """
    if (directory / MANIFEST).exists():
        raise UsageError(f"{directory} is already a pack; add skills with 'loramix pack add'.")
    name = safe_name(directory.absolute().name, "pack")
    reference = BaseReference(name=base, sha256=base_sha256)
    manifest = Manifest(format=1, name=name, description=description, license=license, base=reference)
    return Pack(directory, write_manifest(directory, manifest))


def add_skill(
    directory: Path,
    name: str,
    adapter: bytes | Path,
    *,
    description: str,
    max_tokens: int,
    example: str | None = None,
    instruction: str | None = None,
    card: str | None = None,
    labels: Labels | None = None,
    replace_existing: bool = False,
    keep_gate: bool = False,
    gate: NewGate | None = None,
) -> Change:
    """Add a skill to a pack with a new gate; without a new gate the old one is removed.

    Args:
        directory: the pack.
        name: the new skill.
        adapter: the GGUF LoRA's content, or its path.
        description: one line for listings.
        max_tokens: maximum tokens of an answer.
        example: an example prompt.
        instruction: how the skill is asked, with ``{input}``.
        card: Markdown text on data, results and limits.
        labels: all answers of a skill that classifies.
        replace_existing: replace a skill of the same name.
        keep_gate: keep the gate and the position of a replaced skill, because its prompts stay the same;
            ignored if the pack has no skill of this name.
        gate: gate for the new list of skills, the new one last.

    Raises:
        UsageError: an invalid skill name, or one that the pack already has.
        InvalidArtifact: not a GGUF file, or an entry or gate that `Pack.load` would refuse.
        NotFound: no such pack or adapter file.
        Busy: another process is changing the pack.
    """
    check_skill_name(name)
    if isinstance(adapter, Path):
        if not adapter.is_file():
            raise NotFound(f"no adapter at {adapter}; give a GGUF LoRA file.")
        adapter = adapter.read_bytes()
    if not adapter.startswith(b"GGUF"):
        raise InvalidArtifact(f"the adapter of {name} is not a GGUF file; convert it with 'loramix convert'.")
    with _changing(directory) as before:
        old = next((skill for skill in before.skills if skill.name == name), None)
        if old and not replace_existing:
            found = f"pack {before.name} already has a skill {name}; remove it with 'loramix skill remove'"
            raise UsageError(f"{found}, or use --replace.")
        files = NewFiles(before, directory)
        entry = SkillEntry(
            name=name,
            description=description,
            file=files.put(f"skills/{name}.gguf", adapter),
            sha256=digest_of(adapter),
            max_tokens=max_tokens,
            card=None if card is None else files.put(f"skills/{name}.md", card.encode(errors="replace")),
            example=example,
            instruction=instruction,
            follows=old.follows if old else (),
            own_words=bool(old and old.own_words),
            labels=labels.texts if labels else (),
            label_temperature=labels.temperature if labels else None,
        )
        if old and keep_gate:
            after = replace(before, skills=tuple(entry if s.name == name else s for s in before.skills))
            message = f"skill {name} replaced" + (", and its gate stays." if before.gate else ".")
        else:
            others = tuple(skill for skill in before.skills if skill is not old)
            after = _with_gate(replace(before, skills=(*others, entry)), gate, files, directory)
            message = _message(f"skill {name} added", before, after)
        return Change(_swap(directory, before, after, files), message)


def remove_skill(directory: Path, name: str) -> Change:
    """Remove a skill and its files from a pack; the gate then routes its prompts to the base.

    An unusable gate is removed as well.

    Raises:
        UnknownSkill: the pack has no such skill.
        NotFound: no such pack.
        Busy: another process is changing the pack.
    """
    with _changing(directory) as before:
        pack = Pack(directory, before)
        pack.skill(name)
        files, gate = NewFiles(before, directory), _gate_without(pack, name)
        after = replace(before, skills=tuple(s for s in before.skills if s.name != name))
        after = _with_gate(after, gate, files, directory)
        message = _message(f"skill {name} removed", before, after)
        return Change(_swap(directory, before, after, files), message)


def set_gate(directory: Path, gate: bytes, features: bytes | None = None) -> Pack:
    """Set the gate of a pack.

    Args:
        directory: the pack.
        gate: content of a gate.npz, for this pack's base and skills.
        features: content of its gate-features.npz.

    Raises:
        InvalidArtifact: not a gate, or one for other skills.
        WrongBase: a gate for another base.
        NotFound: no such pack.
        Busy: another process is changing the pack.
    """
    with _changing(directory) as before:
        files = NewFiles(before, directory)
        return _swap(directory, before, _with_gate(before, NewGate(gate, features), files, directory), files)


def put_pack(directory: Path, source: Pack) -> Pack:
    """Replace the pack in ``directory`` with ``source``, or create it.

    Args:
        directory: directory of the pack; may not exist yet.
        source: a pack that passed `Pack.check`.

    Raises:
        InvalidArtifact: a file of the source changed, or the directory has an invalid manifest.
        Busy: another process is changing the pack.
    """
    fresh = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(directory):
            there = (directory / MANIFEST).is_file()
            before = read_manifest(directory) if there else replace(source.manifest, skills=(), gate=None)
            files = NewFiles(before, directory)
            skills = [
                replace(
                    skill,
                    file=files.put(skill.file, source.adapter_bytes(skill.name)),
                    card=skill.card
                    and files.put(skill.card, safe_join(source.directory, skill.card).read_bytes()),
                )
                for skill in source.skills
            ]
            after = replace(source.manifest, skills=tuple(skills), gate=None)
            if (gate := source.gate_path) is not None:
                new = NewGate(gate.read_bytes(), source.gate_features())
                after = _with_gate(after, new, files, directory)
            return _swap(directory, before, after, files)
    except BaseException:
        if fresh:
            shutil.rmtree(directory, ignore_errors=True)
        raise


def check_skill_name(name: str) -> str:
    """Return ``name`` if a skill may have it.

    Raises:
        UsageError: not a safe file name, or a reserved word.
    """
    if safe_name(name, "skill") in RESERVED_NAMES:
        raise UsageError(f"{name!r} is a reserved word and cannot be a skill; choose another name.")
    return name


@contextmanager
def _changing(directory: Path) -> Iterator[Manifest]:
    """Yield the manifest with the pack locked against other processes."""
    Pack.load(directory.absolute())  # fails before a lock file is created if there is no pack
    with _locked(directory):
        yield read_manifest(directory)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        with FileLock(directory / ".lock", timeout=0.5):
            yield
    except Timeout:
        raise Busy(f"another process is changing {directory}; run this again when it is done.") from None


def _with_gate(after: Manifest, gate: NewGate | None, files: NewFiles, directory: Path) -> Manifest:
    """Return ``after`` with the gate, or without one."""
    if gate is None:
        return replace(after, gate=None)
    check_gate(read_gate(gate.gate, "the gate"), after, directory)
    reference = GateReference(file=files.put("gate.npz", gate.gate), sha256=digest_of(gate.gate))
    if (features := gate.features) is not None:
        name = files.put("gate-features.npz", features)
        reference = replace(reference, features=name, features_sha256=digest_of(features))
    return replace(after, gate=reference)


def _gate_without(pack: Pack, skill: str) -> NewGate | None:
    """Return a pack's gate and bank without a skill; None if no skill is left or they are invalid."""
    try:
        gate, bank = pack.gate(), pack.gate_bank()
    except LoramixError:
        return None
    if gate is None or len(pack.skills) == 1:
        return None
    return NewGate(gate.without(skill).to_bytes(), None if bank is None else bank.without(skill).to_bytes())


def _swap(directory: Path, before: Manifest, after: Manifest, files: NewFiles) -> Pack:
    """Write new files, then the manifest, then delete old files, so that one of the packs is always complete."""
    check_manifest(after, directory)  # reject before anything is written
    held = digests(before).keys()
    try:
        for name, content in files.contents.items():
            write_bytes(directory / name, content)
    except BaseException:  # e.g. a full disk: delete files that no manifest names
        for name in files.contents.keys() - held:
            (directory / name).unlink(missing_ok=True)
        raise
    pack = Pack(directory, write_manifest(directory, after))
    for file in digests(before).keys() - digests(after).keys():
        safe_join(directory, file)
        (directory / file).unlink(missing_ok=True)  # deletes a link, not its target
    return pack


def _message(what: str, before: Manifest, after: Manifest) -> str:
    if after.gate is not None:
        return f"{what}, and the gate knows it."
    if not after.skills:
        return f"{what}."
    dropped = "its gate is removed, " if before.gate else ""
    return f"{what}; {dropped}run 'loramix train gate' so that prompts find their skill."
