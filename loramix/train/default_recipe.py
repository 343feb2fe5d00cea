"""Default recipes for data without one: instructions from a file, or generic wording."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from loramix.errors import InvalidData, NotFound
from loramix.formats.textfile import read_lines
from loramix.prompts import fill
from loramix.train.data import Row
from loramix.train.recipe import RECIPES, Recipe, Source, changed_for, load_recipe, recipe_for


def recipe_of_data(name: str, rows: Sequence[Row], instructions: Path | None, base: str) -> Recipe:
    """Build a recipe for a skill from its data.

    Args:
        name: name of the skill.
        rows: rows of the skill; a small set of short answers is treated as labels.
        instructions: text file with one instruction per line, ``{input}`` where the text goes (otherwise the text
            is appended), or a recipe; None for the shipped recipe of that name, or generic wording.
        base: name of the pack's base.

    Raises:
        InvalidData: there is no usable instruction.
        NotFound: the file does not exist.
    """
    if instructions is not None and instructions.suffix == ".toml":
        return msgspec.structs.replace(load_recipe(str(instructions)), name=name)
    if instructions is None and (RECIPES / f"{name}.toml").is_file():
        return recipe_for(name, base)
    answers = [row.target for row in rows if row.split == "train"]
    labels = sorted(set(answers))
    few = 2 <= len(labels) <= 20 and len(answers) >= 5 * len(labels) and max(map(len, labels)) < 40
    asked = _read_instructions(instructions) if instructions else _plain(name)
    longest = max((len(answer) for answer in answers), default=80)
    recipe = Recipe(
        name=name,
        description=f"{name.replace('_', ' ').replace('-', ' ').capitalize()}.",
        metrics=["accuracy" if few else "rouge_l"],
        data=Source(license="as its data", how="A user's file with split, input and target."),
        instructions={"any": asked},
        labels=labels if few else [],
        any_text=True,
        max_tokens=max(8, min(256, longest // 2)),
        example=fill(asked[0], next((row.input for row in rows), "…"))[:2000],
    )
    return changed_for(recipe, base)


def _read_instructions(path: Path) -> list[str]:
    if not path.is_file():
        raise NotFound(f"no instructions file {path}; write one instruction per line, or omit the option.")
    lines = [line.strip().replace("\\n", "\n") for _, line in read_lines(path)]
    asked = [line if "{input}" in line else f"{line}\n{{input}}" for line in dict.fromkeys(lines) if line]
    if not asked or any(text.count("{input}") != 1 for text in asked):
        raise InvalidData(
            f"{path} needs one instruction per line, each with '{{input}}' at most once; fix it."
        )
    return asked


def _plain(name: str) -> list[str]:
    """Return generic wording with the skill's name, for data without instructions."""
    said = name.replace("_", " ").replace("-", " ")
    return [
        f"{said}: {{input}}",
        f"{said.capitalize()}:\n{{input}}",
        f"{{input}}\n\n{said}?",
        f"Do this: {said}.\n\n{{input}}",
        f"Please do {said} on the following text. {{input}}",
        f"Task: {said}\nInput: {{input}}\nOutput:",
    ]
