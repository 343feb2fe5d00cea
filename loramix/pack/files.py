"""New files of a changed pack: names and digests, without overwriting files of the old pack."""

from __future__ import annotations

import hashlib
from pathlib import Path

from loramix.pack.manifest import Manifest
from loramix.paths import safe_join, sha256_file


class NewFiles:
    """New files of a pack, with names that do not collide with files of the old manifest.

    Args:
        before: the old manifest.
        directory: the pack.
    """

    def __init__(self, before: Manifest, directory: Path) -> None:
        self.contents: dict[str, bytes] = {}
        there = {name: safe_join(directory, name) for name, digest in digests(before).items() if not digest}
        cards = {name: sha256_file(path) for name, path in there.items() if path.is_file()}
        self._taken = {**digests(before), **cards}

    def put(self, name: str, content: bytes) -> str:
        """Add a file to write; return its final name."""
        digest = digest_of(content)
        if self._taken.get(name, digest) != digest:
            stem, dot, suffix = name.rpartition(".")
            name = f"{stem}-{digest[:8]}{dot}{suffix}"
        self.contents[name] = content
        return name


def digest_of(content: bytes) -> str:
    """Return the SHA-256 of bytes, as 64 hex digits."""
    return hashlib.sha256(content).hexdigest()


def digests(manifest: Manifest) -> dict[str, str]:
    """Return the digest of each file of a manifest; empty for cards, which have none."""
    found = {skill.file: skill.sha256 for skill in manifest.skills}
    found |= {skill.card: "" for skill in manifest.skills if skill.card}
    if manifest.gate:
        found[manifest.gate.file] = manifest.gate.sha256
        if manifest.gate.features and manifest.gate.features_sha256:
            found[manifest.gate.features] = manifest.gate.features_sha256
    return found
