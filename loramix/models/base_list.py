"""Lists the bases that can be used by name: known bases, and bases pulled from the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loramix.defaults import DEFAULT_PACK
from loramix.errors import LoramixError
from loramix.models import bases, hub
from loramix.models.known_bases import BASES


@dataclass(frozen=True, slots=True)
class Listed:
    """One base by name."""

    name: str
    """As options, packs and ``loramix pull`` take it."""
    architecture: str
    """Empty where its file cannot be read."""
    size_bytes: int
    """Of the GGUF that is run; 0 where it was pulled and is gone."""
    license: str
    """Empty where the file does not say."""
    path: Path | None
    """Where the GGUF is; None where it is not on this machine, or not made from its installed wheels yet."""
    ready: bool
    """It can be run without a network."""
    default: bool


def list_bases() -> list[Listed]:
    """The known bases first, in their own order, then what else was pulled, by name.

    Raises:
        InvalidArtifact: the record of what was pulled is damaged.
    """
    known = [_known(name) for name in BASES]
    taken = {row.path for row in known if row.path}
    pulled = [_pulled(name, Path(str(record.get("path", "")))) for name, record in bases.records().items()]
    return known + sorted((row for row in pulled if row.path not in taken), key=lambda row: row.name)


def _known(name: str) -> Listed:
    base, path = BASES[name], bases.find(name)
    size = path.stat().st_size if path else base.size_bytes
    return Listed(
        name, base.architecture, size, base.license, path, bases.is_here(name), default=name == DEFAULT_PACK
    )


def _pulled(text: str, path: Path) -> Listed:
    from loramix.formats.validate import read_base

    place = hub.parse(text)
    name = text.removesuffix("@main") if place and place.revision == "main" else text
    if not path.is_file():
        return Listed(name, "", 0, "", None, ready=False, default=False)
    try:
        file, shape = read_base(path)
    except LoramixError:  # what runs it says why
        return Listed(name, "", path.stat().st_size, "", path, ready=False, default=False)
    license_ = file.metadata.get("general.license", "")
    license_ = license_ if isinstance(license_, str) else ""
    return Listed(
        name, shape.architecture.name, path.stat().st_size, license_[:80], path, ready=True, default=False
    )
