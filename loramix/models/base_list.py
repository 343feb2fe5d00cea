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
    """Name for options, packs and ``loramix pull``."""
    architecture: str
    """Architecture; empty if the file cannot be read."""
    size_bytes: int
    """Size of the GGUF that is run; 0 if it was pulled and then deleted."""
    license: str
    """Licence; empty if the file does not name it."""
    path: Path | None
    """Path of the GGUF; None if it is not on this machine, or not yet built from its installed wheels."""
    ready: bool
    """Whether it can be run without a network."""
    default: bool


def list_bases() -> list[Listed]:
    """List the known bases in their order, then other pulled bases by name.

    Raises:
        InvalidArtifact: the record of pulled bases is damaged.
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
    except LoramixError:  # the error is reported when the base is used
        return Listed(name, "", path.stat().st_size, "", path, ready=False, default=False)
    license_ = file.metadata.get("general.license", "")
    license_ = license_ if isinstance(license_, str) else ""
    return Listed(
        name, shape.architecture.name, path.stat().st_size, license_[:80], path, ready=True, default=False
    )
