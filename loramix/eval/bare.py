"""What counts of a bare base's output: it is not told the format of an answer, and often talks around it."""

from __future__ import annotations

import re

from loramix.train.metrics import normal
from loramix.train.recipe import Recipe

_FENCE = re.compile(r"```\w*\n?(.*?)(?:```|$)", re.DOTALL)
_BULLET = re.compile(r"^(?:•\s+|\d+\)\s+|[-*\d. ]+)", re.MULTILINE)


def code(text: str) -> str:
    """Return the first fenced block of a text, or the whole text.

    Args:
        text: an answer, perhaps with Markdown.
    """
    fenced = _FENCE.search(text)
    return (fenced[1] if fenced else text).strip()


def one_line(text: str) -> str:
    """Return a list of names as one line, the names separated by semicolons and without the marks of their lines.

    Args:
        text: an answer, a name a line.
    """
    return _BULLET.sub("", text).replace("\n", "; ")


def tidy(text: str, recipe: Recipe) -> str:
    """Extract the answer from a bare base's output.

    That is the one label that it names; else the first fenced block, which may have several lines; else a list of
    names as one line, or the first line.

    Args:
        text: the output.
        recipe: recipe of the skill, for its labels and measures.
    """
    if recipe.labels:
        words = set(re.findall(r"[\w-]+", text.casefold()))
        named = [label for label in recipe.labels if normal(label) in words]
        return named[0] if len(named) == 1 else text
    if "```" in text and (block := code(text)):
        return block
    if "entity_f1" in recipe.metrics:
        return one_line(text.strip())
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
