"""How people ask, beyond the recipes and `phrasings/`: the lists in ``phrasings/early/``."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from loramix.errors import InvalidRecipe
from loramix.train.recipe import decode_toml

DIRECTORY = Path(__file__).parent / "phrasings" / "early"
DEV = 0.14
"""Share of all wordings that no training sees: what is chosen is chosen on them."""
_SLOT = re.compile(r"\{(\w+)\}")


class Styles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``styles.toml``: what stands around a request, whatever it asks for."""

    openings: list[str]
    closings: list[str]
    voice_starts: list[str]
    voice_middles: list[str]
    voice_ends: list[str]
    first_here: list[str]
    """Announcements of a text whose request comes after it."""
    then: list[str]
    """What stands between that text and the request."""


class Turns(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``turns.toml``: follow-ups."""

    again: list[str]
    """With ``{input}``: the same for another text."""
    chat: list[str]
    """Remarks and questions about the answer, which no skill serves; what was done stays in mind."""
    base: list[str]
    """Tasks that no skill serves, about what was said."""
    refine: dict[str, list[str]]
    """By skill: the same again, otherwise."""
    switch: dict[str, list[str]]
    """By skill: something else with the text at hand."""
    answers: dict[str, list[str]]
    """``texts``: answers of the base."""


class Embedded(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``embedded.toml``: instructions inside texts."""

    notes: list[str]
    """With ``{order}``."""
    orders: list[str]
    texts: list[str]
    """Whole texts with an instruction in them."""
    frames: list[str]
    """With ``{before}``, the request, and ``{input}``, the text in marks."""


class Asks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Short asks for one of several skills, by their form; ``{it}`` is what they are about."""

    do: list[str]
    """Commands."""
    ask: list[str]
    """Questions, with their mark."""
    get: list[str]
    """Nouns."""
    tag: list[str]
    """Keywords."""
    answer: list[str] = []
    """What the skill's answer is called; empty: no step works on it."""


class Frames(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What joins asks, and puts them next to a text."""

    two: list[str]
    three: list[str]
    places: list[str]
    """With ``{asks}`` and ``{input}``."""
    around: list[str]
    """With the text between two asks."""
    fields: list[str]
    """Forms to fill in."""


class Composed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``composed.toml``: the parts of requests for several skills, with marks."""

    partners: dict[str, list[str]] = msgspec.field(name="with")
    """By a skill that needs texts of its own: skills that can work on them too."""
    asks: dict[str, Asks]
    frames: Frames


class Whole(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``composed_whole.toml``: whole requests with marks, which say what they ask for."""

    templates: list[str]
    """For several skills."""
    singles: list[str]
    """For one skill, though they look like two; or with a wish that no skill serves, and so for none."""


@dataclass(frozen=True, slots=True)
class Wordings:
    """All lists; by skill and ``none`` where they are tables."""

    asks: Mapping[str, list[str]]
    long: Mapping[str, list[str]]
    tongues: Mapping[str, list[str]]
    styles: Styles
    turns: Turns
    embedded: Embedded
    composed: Composed
    whole: Whole
    grammar: Mapping[str, list[str]]
    tasks: list[str]
    """General tasks that no skill serves."""
    messages: Mapping[str, list[str]]
    """By skill: whole messages as people type them, with a text or task of their own."""


@cache
def load_wordings(directory: Path = DIRECTORY) -> Wordings:
    """Read the lists that ship with Loramix, or a directory of the same form.

    Raises:
        InvalidRecipe: a file that is not TOML, or not of that form.
    """

    def read(name: str, kind: type[Any]) -> Any:
        return decode_toml(directory / f"{name}.toml", kind)

    lists = dict[str, list[str]]
    found = Wordings(
        read("asks", lists),
        read("long", lists),
        read("tongues", lists),
        read("styles", Styles),
        read("turns", Turns),
        read("embedded", Embedded),
        read("composed", Composed),
        read("composed_whole", Whole),
        read("grammar", lists),
        read("tasks", lists)["tasks"],
        read("messages", lists),
    )
    for name, groups in (
        ("long", found.long),
        ("tongues", found.tongues),
        ("turns", {"again": found.turns.again}),
        ("composed_whole", {"": [*found.whole.templates, *found.whole.singles]}),
    ):
        for template in (t for group in groups.values() for t in group):
            if template.count("{input}") != 1:
                raise InvalidRecipe(f"{directory / name}.toml: {template!r} needs '{{input}}' once.")
    return found


def is_dev(wording: str, share: float = DEV) -> bool:
    """Whether a wording is kept out of training; the same for all who ask."""
    digest = hashlib.sha256(wording.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:4], "little") < share * 2**32


def of_part(wordings: Sequence[str], *, dev: bool | None) -> list[str]:
    """The wordings of training, or those kept out of it; all of a list so short that a part would be empty.

    With None, all wordings.
    """
    if dev is None:
        return list(wordings)
    return [wording for wording in wordings if is_dev(wording) == dev] or list(wordings)


def sentence(
    grammar: Mapping[str, Sequence[str]], words: Sequence[str], rng: random.Random, *, dev: bool | None
) -> str:
    """A request about a text that no skill serves, from the parts in ``grammar.toml``.

    Args:
        grammar: ``sentences`` with ``{part}`` slots, and a list for each part but ``word``.
        words: of the text, for ``{word}``.
        rng: draws.
        dev: whether the sentence is one that training does not see.
    """
    template = rng.choice(of_part(grammar["sentences"], dev=dev))

    def part(match: re.Match[str]) -> str:
        name = match[1]
        return rng.choice(words) if name == "word" else rng.choice(grammar[name])

    return _SLOT.sub(part, template)
