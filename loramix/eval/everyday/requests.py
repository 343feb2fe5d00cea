"""The everyday requests: prompts as people type them, each with a check for its answer."""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec

from loramix.errors import InvalidData
from loramix.formats.textfile import read_lines, read_text

DATA = Path(__file__).parent / "data"
SPLITS = ("dev", "test")
CHECKS = (
    "label", "entities", "query", "command", "slots", "mentions", "references", "sentence", "title",
)  # fmt: skip


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One prompt to one skill, and one check of its answer (one of `CHECKS`)."""

    skill: str
    prompt: str
    label: str | None = None
    """The correct label."""
    accept: tuple[str, ...] = ()
    """Other labels of the skill that are right too."""
    also: tuple[str, ...] = ()
    """How a base that does not know the labels may say the right one."""
    entities: tuple[str, ...] | None = None
    """All names of the text, as ``type: name``."""
    database: str = ""
    """Tables that ``query`` runs on, by their name in ``databases.toml``."""
    query: str | None = None
    """A query with the right result."""
    ordered: bool = False
    """Whether the result's order counts."""
    command: str | None = None
    """A pattern that right commands match."""
    slots: dict[str, str] | None = None
    """Intent and slots."""
    loose: tuple[str, ...] = ()
    """Beginnings of a slot's value that may be left out."""
    mentions: tuple[str, ...] | None = None
    """Patterns of what a text must say."""
    short: bool = False
    """Whether that text must be one line."""
    references: tuple[str, ...] | None = None
    """Right translations."""
    sentence: tuple[str, ...] | None = None
    """Patterns of what a summary in one sentence must say."""
    title: tuple[str, ...] | None = None
    """Patterns of what a title must say."""

    @property
    def check(self) -> str:
        """The check in `CHECKS` that scores the answer."""
        return next(name for name in CHECKS if getattr(self, name) is not None)


def read_requests(path: Path) -> list[Request]:
    """Read requests, one JSON object a line.

    Args:
        path: ``dev.jsonl`` or ``test.jsonl`` in `DATA`, or a file of the same form.

    Raises:
        InvalidData: a line is not a request, or does not have exactly one check.
    """
    found = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            request = msgspec.json.decode(line, type=Request)
        except msgspec.MsgspecError as error:
            raise InvalidData(f"{path}, line {number}: {error}; fix or delete that line.") from None
        if sum(getattr(request, name) is not None for name in CHECKS) != 1:
            raise InvalidData(f"{path}, line {number}: needs exactly one of {', '.join(CHECKS)}.")
        found.append(request)
    return found


def databases() -> dict[str, str]:
    """Return the SQL scripts that create the tables, by name."""
    return dict(tomllib.loads(read_text(DATA / "databases.toml")))
