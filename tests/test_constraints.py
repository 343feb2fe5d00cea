"""The pinned versions install on each Python that pyproject.toml allows, the oldest patch release too."""

from __future__ import annotations

import tomllib
from importlib import metadata

from packaging.specifiers import SpecifierSet
from test_readme import ROOT

OLDEST = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")


def pins() -> dict[str, str]:
    """Version by package."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def too_new(pinned: dict[str, str]) -> dict[str, str]:
    """What the installed packages among the pins require of Python, where the oldest is not enough."""
    found = {}
    for name, version in pinned.items():
        try:
            about = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        required = (about.metadata.get_all("Requires-Python") or [""])[0]
        if about.version == version and f"{OLDEST}.0" not in SpecifierSet(required):
            found[name] = required
    return found


def test_no_pin_needs_a_newer_python() -> None:
    pinned = pins()
    assert len(pinned) > 150 and OLDEST == "3.11"
    assert not too_new(pinned)
