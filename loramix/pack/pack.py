"""A pack: a directory with pack.toml, adapters and a gate, each with its SHA-256.

A pack is untrusted: paths stay inside the directory, and methods return exactly the bytes whose digest was
checked. Independent of llama.cpp and torch; `loramix.pack.edit` changes packs.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from loramix.errors import InvalidArtifact, LoramixError, NotFound, UnknownSkill, WrongBase
from loramix.formats.adapter_file import MAX_ADAPTER_BYTES
from loramix.formats.sniff import HEAD, sniff
from loramix.models.gate_file import OLD_FORMAT, Gate, read_gate
from loramix.models.head_info import MAX_GATE_BYTES
from loramix.models.old_gate import NumpyGate
from loramix.pack.manifest import MANIFEST, Manifest, SkillEntry, read_manifest
from loramix.paths import data_dir, is_safe_name, safe_join, safe_name, sha256_file

if TYPE_CHECKING:
    from loramix.models.gate_bank import Bank

MAX_FEATURES_BYTES = 2**28
SHIPPED = Path(__file__).parent.parent / "packs"


class Listing(NamedTuple):
    """A listed pack: ``pack``, or the ``error`` if it cannot be read."""

    name: str
    directory: Path
    pack: Pack | None
    error: LoramixError | None


@dataclass(frozen=True)
class Pack:
    """A pack with a validated manifest; its files are validated when they are read.

    Args:
        directory: directory of pack.toml.
        manifest: content of pack.toml.
    """

    directory: Path
    manifest: Manifest

    @classmethod
    def load(cls, name_or_directory: str | Path) -> Pack:
        """Read a pack's manifest.

        Args:
            name_or_directory: a directory with a pack.toml, or a name, looked up first among the user's packs and
                then among those shipped with Loramix.

        Raises:
            NotFound: there is no such pack; the message lists the available ones.
            InvalidArtifact: the manifest is invalid.
            UsageError: the name is not a valid pack name.
        """
        text = str(name_or_directory)
        if is_directory(text) or (text and (Path(text) / MANIFEST).is_file()):
            candidates = [Path(text)]
        else:
            candidates = [root / safe_name(text, "pack") for root in _roots()]
        for directory in candidates:
            if (directory / MANIFEST).is_file():
                return cls(directory, read_manifest(directory))
        known = ", ".join(sorted({listing.name for listing in list_packs()})) or "none yet"
        raise NotFound(f"no pack {text[:200]!r}: give a directory with a {MANIFEST}, or one of: {known}.")

    @property
    def name(self) -> str:
        """The pack's name."""
        return self.manifest.name

    @property
    def is_shipped(self) -> bool:
        """Whether it is part of Loramix, so that users do not change it."""
        return is_shipped(self.directory)

    @property
    def skills(self) -> tuple[SkillEntry, ...]:
        """The skills, in the manifest's order."""
        return self.manifest.skills

    def skill(self, name: str) -> SkillEntry:
        """Return a skill by name.

        Raises:
            UnknownSkill: the pack has no such skill; the message lists its skills.
        """
        for skill in self.skills:
            if skill.name == name:
                return skill
        known = ", ".join(skill.name for skill in self.skills) or "none"
        raise UnknownSkill(f"no skill {name[:80]!r} in pack {self.name}; it has: {known}.")

    def adapter_path(self, skill: str) -> Path:
        """Return the path of a skill's GGUF adapter; load it with `adapter_bytes`.

        Raises:
            UnknownSkill: the pack has no such skill.
            InvalidArtifact: the path leads outside the pack.
        """
        return safe_join(self.directory, self.skill(skill).file)

    def adapter_bytes(self, skill: str) -> bytes:
        """Return a skill's adapter; the digest is checked on exactly these bytes.

        Raises:
            UnknownSkill: the pack has no such skill.
            NotFound: the file does not exist.
            InvalidArtifact: wrong digest, or a path outside the pack.
        """
        entry = self.skill(skill)
        fix = f"get the pack again, or remove skill {skill} and add it again"
        return self._read(entry.file, entry.sha256, MAX_ADAPTER_BYTES, fix)

    @property
    def gate_path(self) -> Path | None:
        """Path of the gate, or None if the pack has none; load it with `gate`."""
        return safe_join(self.directory, self.manifest.gate.file) if self.manifest.gate else None

    def gate(self) -> Gate | None:
        """Return the gate, validated for this pack's base and skills, or None if the pack has none.

        Raises:
            NotFound: the file does not exist.
            InvalidArtifact: wrong digest, a damaged gate, or a gate for other skills.
            WrongBase: the gate is for another base.
        """
        if (reference := self.manifest.gate) is None:
            return None
        fix = "run 'loramix train gate'"
        data = self._read(reference.file, reference.sha256, MAX_GATE_BYTES, fix)
        gate = read_gate(data, str(self.directory / reference.file))
        check_gate(gate, self.manifest, self.directory)
        return gate

    def gate_features(self) -> bytes | None:
        """Return the features of the gate's training prompts, with their digest checked; None if there are none.

        Raises:
            NotFound: the file does not exist.
            InvalidArtifact: wrong digest, or a path outside the pack.
        """
        gate = self.manifest.gate
        if gate is None or gate.features is None or gate.features_sha256 is None:
            return None
        return self._read(gate.features, gate.features_sha256, MAX_FEATURES_BYTES, "run 'loramix train gate'")

    def gate_bank(self) -> Bank | None:
        """Return the feature bank, or None if the pack has none.

        Raises:
            NotFound: the file does not exist.
            InvalidArtifact: wrong digest, a path outside the pack, or an invalid bank.
        """
        from loramix.models.gate_bank import Bank

        data = self.gate_features()
        return None if data is None else Bank.from_bytes(data, str(self.directory / "gate-features.npz"))

    def check(self, base: Path | None = None) -> list[str]:
        """Check every file of the pack.

        Args:
            base: the base's GGUF; if given, its digest and the adapters' shapes are checked as well.

        Returns:
            Notes for the user on missing optional parts.

        Raises:
            InvalidArtifact: a file is invalid; the message has the fix.
            WrongBase: ``base`` is not the pack's base, or an adapter or the gate is for another base.
            NotFound: a file does not exist.
        """
        notes = [] if self.skills else ["no skills: add one with 'loramix skill add'"]
        for skill in self.skills:
            self.adapter_bytes(skill.name)
            if skill.card is not None and not safe_join(self.directory, skill.card).is_file():
                raise NotFound(f"{self.directory / skill.card} does not exist; get the pack again.")
        self.gate_features()
        gate = self.gate()
        if isinstance(gate, NumpyGate) and not self.is_shipped:
            notes.append(OLD_FORMAT.format(pack=self.name))
        if gate is None:
            notes.append(
                "no gate: skills can be named but are not chosen by prompt; run 'loramix train gate'"
            )
        if base is not None:
            self._check_base(base)
        return notes

    def _check_base(self, base: Path) -> None:
        from loramix.formats.validate import check_adapter, read_base
        from loramix.templates.base_template import check_template

        if not base.is_file():
            raise NotFound(f"no base at {base}; give the GGUF of {self.manifest.base.name}.")
        if (found := sha256_file(base)) != self.manifest.base.sha256:
            raise WrongBase(
                f"{base} has SHA-256 {found[:12]}…, pack {self.name} needs "
                f"{self.manifest.base.sha256[:12]}…: use {self.manifest.base.name}."
            )
        _, shape = read_base(base)
        check_template(base)
        for skill in self.skills:
            name = str(self.directory / skill.file)
            check_adapter(self.adapter_bytes(skill.name), shape, name, base_sha256=found)

    def _read(self, relative: str, sha256: str, limit: int, fix: str) -> bytes:
        path = safe_join(self.directory, relative)
        if not path.is_file():  # a pipe or a device would block or never end
            raise NotFound(f"{self.directory / relative} does not exist; {fix}.")
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise InvalidArtifact(f"{self.directory / relative} is larger than {limit} bytes; {fix}.")
        if (found := hashlib.sha256(data).hexdigest()) != sha256:
            wrong = None if data[:4] in (b"GGUF", b"PK\3\4") else sniff(data[:HEAD], len(data))
            if wrong is not None:
                raise InvalidArtifact(f"{self.directory / relative} cannot be used: {wrong}.")
            raise InvalidArtifact(
                f"{self.directory / relative} has SHA-256 {found[:12]}…, "
                f"{MANIFEST} needs {sha256[:12]}…: {fix}."
            )
        return data


def is_directory(text: str) -> bool:
    """Whether the text is a directory rather than a name: it has a path separator."""
    return any(separator in text for separator in (os.sep, os.altsep) if separator)


def list_packs() -> list[Listing]:
    """List the packs that can be loaded by name, sorted; a user's pack hides a shipped one of the same name."""
    found: dict[str, Path] = {}
    for root in _roots():
        for manifest in root.glob(f"*/{MANIFEST}"):
            if is_safe_name(manifest.parent.name):
                found.setdefault(manifest.parent.name, manifest.parent)
    listings = []
    for name, directory in sorted(found.items()):
        try:
            listings.append(Listing(name, directory, Pack(directory, read_manifest(directory)), None))
        except LoramixError as error:
            listings.append(Listing(name, directory, None, error))
    return listings


def check_gate(gate: Gate, manifest: Manifest, directory: Path) -> None:
    """Check that a gate is for the pack's skills, in their order, and for its base.

    Raises:
        InvalidArtifact: the gate is for other skills.
        WrongBase: the gate is for another base.
    """
    names = [skill.name for skill in manifest.skills]
    if gate.info.skills != names:
        raise InvalidArtifact(
            f"the gate of {directory} chooses between {', '.join(gate.info.skills) or 'nothing'}, "
            f"the pack has {', '.join(names) or 'no skill'}; run 'loramix train gate'."
        )
    if gate.info.base_sha256 != manifest.base.sha256:
        raise WrongBase(
            f"the gate of {directory} is for a base with SHA-256 {gate.info.base_sha256[:12]}…, "
            f"the pack needs {manifest.base.sha256[:12]}…; run 'loramix train gate'."
        )


def is_shipped(directory: Path) -> bool:
    """Whether a directory is part of Loramix."""
    return directory.resolve().is_relative_to(SHIPPED.resolve())


def is_shipped_name(name: str) -> bool:
    """Whether a pack of that name ships with Loramix."""
    return (SHIPPED / safe_name(name, "pack")).is_dir()


def _roots() -> tuple[Path, Path]:
    return data_dir() / "packs", SHIPPED
