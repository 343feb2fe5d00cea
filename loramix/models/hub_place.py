"""A place on the Hugging Face hub in the form ``OWNER/REPO[:FILE][@REVISION]``."""

from __future__ import annotations

import re
from typing import NamedTuple

_PLACE = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)(:(?P<file>[^:@\\]+))?(@(?P<revision>[^@\\]+))?", re.ASCII
)


class Place(NamedTuple):
    """A repository on the hub, with an optional file and revision."""

    repository: str
    """``OWNER/REPO``."""
    file: str = ""
    revision: str = "main"

    def __str__(self) -> str:
        return self.repository + (f":{self.file}" if self.file else "") + f"@{self.revision}"


def parse(text: str) -> Place | None:
    """Parse ``OWNER/REPO[:FILE][@REVISION]``; None if the text has another form."""
    found = _PLACE.fullmatch(text)
    if found is None:
        return None
    return Place(found["repository"], found["file"] or "", found["revision"] or "main")
