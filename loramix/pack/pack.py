"""Packs: a directory with pack.toml, adapters and a gate, all named with their SHA-256.

A pack may come from a stranger: its paths stay inside the directory, and what is handed on is exactly the
bytes whose digest was compared. Knows nothing of llama.cpp or torch; `pack_edit` changes packs.
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
from loramix.models.gate_numpy import MAX_GATE_BYTES, NumpyGate
from loramix.pack.manifest import MANIFEST, Manifest, SkillEntry, read_manifest
from loramix.paths import data_dir, is_safe_name, safe_join, safe_name, sha256_file

if TYPE_CHECKING:
    from loramix.models.gate_bank import Bank

MAX_FEATURES_BYTES = 2**28
SHIPPED = Path(__file__).parent.parent / "packs"


class Listing(NamedTuple):
    """A pack that was found: ``pack``, or the ``error`` of one that cannot be read."""

    name: str
    directory: Path
    pack: Pack | None
    error: LoramixError | None


@dataclass(frozen=True)
class Pack:
    """A pack whose manifest has been checked; its files are checked when they are read.

    Args:
        directory: where pack.toml is.
        manifest: its content.
    """

    directory: Path
    manifest: Manifest

    @classmethod
    def load(cls, name_or_directory: str | Path) -> Pack:
        """Read a pack's manifest.

        Args:
            name_or_directory: a directory with a pack.toml, or a name: the user's packs first, then ours.

        Raises:
            NotFound: there is no such pack; the message lists those there are.
            InvalidArtifact: a manifest that cannot be used.
            UsageError: a name that no pack can have.
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
    def skills(self) -> tuple[SkillEntry, ...]:
        """The skills, in the manifest's order."""
        return self.manifest.skills

    def skill(self, name: str) -> SkillEntry:
        """The skill of that name.

        Raises:
            UnknownSkill: the pack has no such skill; the message lists those it has.
        """
        for skill in self.skills:
            if skill.name == name:
                return skill
        known = ", ".join(skill.name for skill in self.skills) or "none"
        raise UnknownSkill(f"no skill {name[:80]!r} in pack {self.name}; it has: {known}.")

    def adapter_path(self, skill: str) -> Path:
        """Where a skill's GGUF adapter is; for loading, take `adapter_bytes`.

        Raises:
            UnknownSkill: the pack has no such skill.
            InvalidArtifact: the path leads outside the pack.
        """
        return safe_join(self.directory, self.skill(skill).file)

    def adapter_bytes(self, skill: str) -> bytes:
        """A skill's adapter, read once; the digest was compared on the very bytes returned.

        Raises:
            UnknownSkill: the pack has no such skill.
            NotFound: the file is not there.
            InvalidArtifact: another digest, or a path that leads outside the pack.
        """
        entry = self.skill(skill)
        mend = f"get the pack again, or remove skill {skill} and add it again"
        return self._read(entry.file, entry.sha256, MAX_ADAPTER_BYTES, mend)

    @property
    def gate_path(self) -> Path | None:
        """Where the gate is, or None if the pack has none; for loading, take `gate`."""
        return safe_join(self.directory, self.manifest.gate.file) if self.manifest.gate else None

    def gate(self) -> NumpyGate | None:
        """The gate, checked to be of this pack's base and skills, or None if the pack has none.

        Raises:
            NotFound: the file is not there.
            InvalidArtifact: another digest, a damaged gate, or one for other skills.
            WrongBase: a gate for another base.
        """
        if (reference := self.manifest.gate) is None:
            return None
        mend = "run `loramix train gate`"
        data = self._read(reference.file, reference.sha256, MAX_GATE_BYTES, mend)
        gate = NumpyGate.from_bytes(data, str(self.directory / reference.file))
        check_gate(gate, self.manifest, self.directory)
        return gate

    def gate_features(self) -> bytes | None:
        """Features of the gate's training prompts, or None if the pack has none; the digest was compared.

        Raises:
            NotFound: the file is not there.
            InvalidArtifact: another digest, or a path that leads outside the pack.
        """
        gate = self.manifest.gate
        if gate is None or gate.features is None or gate.features_sha256 is None:
            return None
        return self._read(gate.features, gate.features_sha256, MAX_FEATURES_BYTES, "run `loramix train gate`")

    def gate_bank(self) -> Bank | None:
        """The feature bank, or None if the pack has none.

        Raises:
            NotFound: the file is not there.
            InvalidArtifact: another digest, a path that leads outside the pack, or no usable bank.
        """
        from loramix.models.gate_bank import Bank

        data = self.gate_features()
        return None if data is None else Bank.from_bytes(data, str(self.directory / "gate-features.npz"))

    def check(self, base: Path | None = None) -> list[str]:
        """Check every file of the pack.

        Args:
            base: the base's GGUF; if given, its digest and the adapters' fit to it are checked as well.

        Returns:
            Notes on what is not wrong but missing, for people to read.

        Raises:
            InvalidArtifact: the first file that must not be used, with what to do.
            WrongBase: ``base`` is not the pack's base, or an adapter or the gate is for another.
            NotFound: a file is not there.
        """
        notes = [] if self.skills else ["no skill: add one with `loramix skill add`"]
        for skill in self.skills:
            self.adapter_bytes(skill.name)
            if skill.card is not None and not safe_join(self.directory, skill.card).is_file():
                raise NotFound(f"{self.directory / skill.card} is not there; get the pack again.")
        self.gate_features()
        if self.gate() is None:
            notes.append(
                "no gate: skills can be named but are not chosen by prompt; run `loramix train gate`"
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
                f"{self.manifest.base.sha256[:12]}…: use {self.manifest.base.name}, which it was made for."
            )
        _, shape = read_base(base)
        check_template(base)
        for skill in self.skills:
            name = str(self.directory / skill.file)
            check_adapter(self.adapter_bytes(skill.name), shape, name, base_sha256=found)

    def _read(self, relative: str, sha256: str, limit: int, mend: str) -> bytes:
        path = safe_join(self.directory, relative)
        if not path.is_file():  # a pipe or a device would block or never end
            raise NotFound(f"{self.directory / relative} is not there; {mend}.")
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise InvalidArtifact(f"{self.directory / relative} is larger than {limit} bytes; {mend}.")
        if (found := hashlib.sha256(data).hexdigest()) != sha256:
            wrong = None if data[:4] in (b"GGUF", b"PK\3\4") else sniff(data[:HEAD], len(data))
            if wrong is not None:
                raise InvalidArtifact(f"{self.directory / relative} cannot be used: {wrong}.")
            raise InvalidArtifact(
                f"{self.directory / relative} has SHA-256 {found[:12]}…, "
                f"{MANIFEST} needs {sha256[:12]}…: {mend}."
            )
        return data


def is_directory(text: str) -> bool:
    """Whether a pack is given by its directory, and not by a name: a separator is in it."""
    return any(separator in text for separator in (os.sep, os.altsep) if separator)


def list_packs() -> list[Listing]:
    """Packs that can be loaded by name, sorted; a user's pack hides ours of the same name."""
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


def check_gate(gate: NumpyGate, manifest: Manifest, directory: Path) -> None:
    """Check that a gate chooses between the pack's skills, in their order, on the pack's base.

    Raises:
        InvalidArtifact: other skills.
        WrongBase: another base.
    """
    names = [skill.name for skill in manifest.skills]
    if gate.info.skills != names:
        raise InvalidArtifact(
            f"the gate of {directory} chooses between {', '.join(gate.info.skills) or 'nothing'}, "
            f"the pack has {', '.join(names) or 'no skill'}; run `loramix train gate`."
        )
    if gate.info.base_sha256 != manifest.base.sha256:
        raise WrongBase(
            f"the gate of {directory} is for a base with SHA-256 {gate.info.base_sha256[:12]}…, "
            f"the pack needs {manifest.base.sha256[:12]}…; run `loramix train gate`."
        )


def _roots() -> tuple[Path, Path]:
    return data_dir() / "packs", SHIPPED
