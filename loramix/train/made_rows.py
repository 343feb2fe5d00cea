"""Training rows generated from templates: everyday texts with a known right answer.

The templates are in ``made/NAME.toml``: ``[values]`` lists the values of ``{placeholder}``, ``[rows]`` the
templates. ``all`` has rows with one target and its requests; other keys are labels with their texts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args

import msgspec

from loramix.errors import InvalidRecipe
from loramix.formats.textfile import read_text
from loramix.train.data import Row
from loramix.train.made_sql import MADE, sql_rows
from loramix.train.recipe import MadeName

_PLACE = re.compile(r"\{([a-z]+)(_\d)?(?:\.(\w+))?\}")
Value = str | dict[str, str]


class Templates(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``made/NAME.toml``."""

    each: int
    """Maximum number of rows per template."""
    values: dict[str, list[Value]]
    rows: dict[str, list[str | list[str]]]


def template_rows(name: str) -> list[Row]:
    """Generate all rows of a template file, deterministically.

    Args:
        name: name in ``made/NAME.toml``.

    Raises:
        InvalidRecipe: a placeholder has no values.
    """
    path = MADE / f"{name}.toml"
    templates = msgspec.toml.decode(read_text(path), type=Templates)
    found: dict[str, Row] = {}
    for label, rows in templates.rows.items():
        for row in rows:
            target, inputs = (label, [row]) if isinstance(row, str) else (row[0], row[1:])
            rng = random.Random(f"{name}-{target}-{inputs[0]}")
            for i in range(templates.each):
                # take the wordings in turn, so that each is used
                pair = filled([inputs[i % len(inputs)], target], templates.values, rng, path)
                found.setdefault(pair[0], Row("train", pair[0], pair[1], references=(pair[1],)))
    return list(found.values())


def filled(
    texts: Sequence[str], values: Mapping[str, Sequence[Value]], rng: random.Random, path: Path = MADE
) -> list[str]:
    """Fill placeholders in several texts; equal placeholders get equal values.

    Args:
        texts: texts with ``{name}``, ``{name_2}`` for another value of that name, or ``{name.part}`` for a part.
        values: values by name.
        rng: source of the random choice.
        path: path of the template file, for messages.

    Raises:
        InvalidRecipe: a placeholder has no values.
    """
    drawn: dict[str, list[Value]] = {}

    def value(match: re.Match[str]) -> str:
        name, place, part = match[1], int((match[2] or "_1")[1:]) - 1, match[3]
        if name not in values:
            raise InvalidRecipe(f"{path}: no values for {match[0]}; add them.")
        chosen = drawn.setdefault(name, rng.sample(list(values[name]), min(3, len(values[name]))))[place]
        return chosen[part] if isinstance(chosen, dict) else chosen

    return [_PLACE.sub(value, text) for text in texts]


def made_rows(name: MadeName) -> list[Row]:
    """Generate the rows of one kind, all of split ``train``.

    Args:
        name: a key of `KINDS`.
    """
    return KINDS[name](name)


KINDS: dict[MadeName, Callable[[str], list[Row]]] = {
    **dict.fromkeys(get_args(MadeName), template_rows),
    "sql": lambda name: sql_rows(),
}
"""Generators by name."""
