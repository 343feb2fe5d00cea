"""Reads, validates and writes pack.toml.

A manifest is untrusted: sizes are bounded, types checked, unknown keys rejected, and paths stay in its directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from loramix.defaults import MAX_SKILLS
from loramix.errors import InvalidArtifact
from loramix.formats.textfile import decode_text, wrong_file
from loramix.models.mixing import RESERVED_NAMES
from loramix.paths import is_safe_name, safe_join, write_bytes

MANIFEST = "pack.toml"
MAX_MANIFEST_BYTES = 2**20
MAX_LABELS = 1000

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
# these texts are printed on terminals, so the only control characters are tab and newline
Text = Annotated[str, Meta(max_length=10_000, pattern=r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*\Z")]
# as `Text`, with {input} once
Instruction = Annotated[
    str,
    Meta(
        max_length=2000,
        pattern=r"^(?=(?:(?!\{input\})[\s\S])*\{input\}(?:(?!\{input\})[\s\S])*\Z)[^\x00-\x08\x0b-\x1f\x7f-\x9f]*\Z",
    ),
]
# one line without surrounding space
Label = Annotated[str, Meta(max_length=200, pattern=r"^(?!\s)[^\x00-\x1f\x7f-\x9f]+(?<!\s)\Z")]


def usable_instruction(text: str) -> str | None:
    """Return an instruction that a manifest can hold, else None: too long, or with control characters."""
    try:
        return msgspec.convert(text, Instruction)
    except msgspec.ValidationError:
        return None


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    pass


class BaseReference(_Table, frozen=True):
    """The base model that the adapters and the gate were trained on."""

    name: Text
    sha256: Sha256


class GateReference(_Table, frozen=True):
    """The gate's files, relative to the pack."""

    file: str
    sha256: Sha256
    features: str | None = None
    """Features of its training prompts, with which a skill can be added without the other skills' data."""
    features_sha256: Sha256 | None = None


class SkillEntry(_Table, frozen=True):
    """One skill of a pack; files relative to the pack."""

    name: str
    description: Text
    file: str
    sha256: Sha256
    max_tokens: Annotated[int, Meta(ge=1, le=65536)]
    """Longest answer, in tokens."""
    card: str | None = None
    """Markdown file on the skill's data, results and limits."""
    example: Text | None = None
    """An example prompt."""
    instruction: Instruction | None = None
    """How the skill is asked, with ``{input}`` for the text; without it, it cannot be a step of a plan."""
    follows: tuple[str, ...] = ()
    """Skills on whose answer it works if it is asked for right after them, unless the request names the text."""
    own_words: bool = False
    """Whether a request for this skill alone is asked in its ``instruction`` too, if its text is sure."""
    labels: Annotated[tuple[Label, ...], Meta(max_length=MAX_LABELS)] = ()
    """All answers of a skill that classifies; empty for other skills."""
    label_temperature: Annotated[float, Meta(ge=0.05, le=100)] | None = None
    """Calibration of the labels' probabilities, by default 1; see `loramix.runtime.labels`."""

    @property
    def closed_labels(self) -> Labels:
        """The labels with their temperature."""
        return Labels(self.labels, self.label_temperature)


class Labels(NamedTuple):
    """The labels of a skill and the calibration temperature of their probabilities; see `SkillEntry`."""

    texts: tuple[str, ...] = ()
    temperature: float | None = None


class Manifest(_Table, frozen=True):
    """Content of a pack.toml."""

    format: Literal[1]
    name: str
    description: Text
    license: Text
    base: BaseReference
    gate: GateReference | None = None
    skills: Annotated[tuple[SkillEntry, ...], Meta(max_length=MAX_SKILLS)] = ()


def read_manifest(directory: Path) -> Manifest:
    """Read and check the pack.toml of a directory.

    Raises:
        InvalidArtifact: the manifest is invalid.
    """
    with (directory / MANIFEST).open("rb") as file:
        return decode_manifest(file.read(MAX_MANIFEST_BYTES + 1), directory)


def decode_manifest(data: bytes, directory: Path) -> Manifest:
    """Decode and check the content of a pack.toml.

    Args:
        data: UTF-8 TOML.
        directory: directory of the pack; it may not exist yet.

    Raises:
        InvalidArtifact: not TOML, too long, an unknown key, a wrong type, an unusable name or path.
    """
    path = directory / MANIFEST
    if len(data) > MAX_MANIFEST_BYTES:
        raise InvalidArtifact(f"{path} is larger than {MAX_MANIFEST_BYTES // 2**20} MB; get the pack again.")
    if wrong := wrong_file(data):
        raise InvalidArtifact(f"{path} cannot be used: {wrong}.")
    try:
        manifest = msgspec.toml.decode(decode_text(data, str(path), InvalidArtifact), type=Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InvalidArtifact(f"{path} cannot be used: {error}; fix that, or get the pack again.") from None
    files: list[tuple[str, str]] = [(manifest.gate.file, ".npz")] if manifest.gate else []
    if manifest.gate and manifest.gate.features is not None:
        files.append((manifest.gate.features, ".npz"))
        if manifest.gate.features_sha256 is None:
            raise InvalidArtifact(f"{path} names gate features without their SHA-256; get the pack again.")
    for skill in manifest.skills:
        files.append((skill.file, ".gguf"))
        if skill.card is not None:
            files.append((skill.card, ".md"))
        if len(skill.labels) == 1 or len(set(skill.labels)) != len(skill.labels):
            raise InvalidArtifact(
                f"{path} gives skill {skill.name[:80]!r} one label only, or a label twice; give each label once."
            )
    names = [skill.name for skill in manifest.skills]
    bad = [name for name in names if not is_safe_name(name) or name in RESERVED_NAMES]
    bad += [] if is_safe_name(manifest.name) else [manifest.name]
    if bad or len(set(names)) != len(names):
        raise InvalidArtifact(
            f"{path} has invalid or repeated names: {(bad or names)[0][:80]!r}; rename them."
        )
    for file, suffix in files:
        safe_join(directory, file)
        if not file.endswith(suffix):
            raise InvalidArtifact(f"{path} names {file[:80]!r}, but needs a {suffix} file here; correct it.")
    if len({file.lower() for file, _ in files}) != len(
        files
    ):  # otherwise removing one skill would break another
        raise InvalidArtifact(f"{path} names a file twice; each skill needs its own.")
    return manifest


def check_manifest(manifest: Manifest, directory: Path) -> Manifest:
    """Check a manifest created in code as `read_manifest` would check it.

    Raises:
        InvalidArtifact: `read_manifest` would reject it.
    """
    try:
        data = msgspec.toml.encode(manifest)
    except UnicodeEncodeError:  # command-line arguments that are not UTF-8
        raise InvalidArtifact(
            f"a text for {directory / MANIFEST} is not valid Unicode; enter it again."
        ) from None
    return decode_manifest(data, directory)


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Write pack.toml atomically.

    Args:
        directory: the pack; created if needed.
        manifest: the manifest.

    Returns:
        The manifest as `read_manifest` will return it.

    Raises:
        InvalidArtifact: `read_manifest` would reject it; nothing is written.
    """
    checked = check_manifest(manifest, directory)
    write_bytes(directory / MANIFEST, msgspec.toml.encode(manifest))
    return checked
