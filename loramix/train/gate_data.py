"""Prompts for the gate: which skill each was made for, two at once, or none.

The instruction decides, not the look of the text: a skill's phrasings are put on the other skills' texts
too, and instructions that no skill serves are put on all of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from loramix.defaults import BASE
from loramix.errors import InvalidData, NotFound
from loramix.formats.textfile import read_lines
from loramix.prompts import fill
from loramix.train.data import Row, data_file, read_rows, take
from loramix.train.recipe import Recipe, decode_toml, load_recipe, recipe_beside, shipped

CROSSED = 0.3  # share of a skill's prompts that stand on other skills' texts
MAX_CHARACTERS = 500  # of a text: the gate reads the instruction, long texts only cost time


class NonePhrasings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``phrasings/none.toml``: what no skill serves."""

    templates: list[str]
    """Requests about a text, with ``{input}``."""
    prompts: list[str]
    """Requests without a text."""


@dataclass(frozen=True, slots=True)
class Phrasings:
    """The directory ``phrasings/``: how people ask, beyond what the recipes hold."""

    skills: Mapping[str, Mapping[str, list[str]]]
    """By skill and source, as a recipe's instructions."""
    none: NonePhrasings
    composed: Mapping[str, list[str]]
    """Requests for several skills at once, by their names joined with ``+``."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt with what the gate should say of it."""

    text: str
    target: Mapping[str, float]
    """Probability by skill or ``base``; sums to 1."""
    group: str
    """Prompts of one phrasing share it: held out together, they tell how the gate does on unseen wording."""


PHRASINGS = Path(__file__).parent / "phrasings"


def load_phrasings(directory: Path = PHRASINGS) -> Phrasings:
    """Read the phrasings that ship with Loramix, or a directory of the same form.

    Raises:
        InvalidRecipe: a file that is not TOML, or not of that form.
    """
    named = [path for path in sorted(directory.glob("*.toml")) if path.stem not in {"none", "composed"}]
    return Phrasings(
        {path.stem: decode_toml(path, dict[str, list[str]]) for path in named},
        decode_toml(directory / "none.toml", NonePhrasings),
        decode_toml(directory / "composed.toml", dict[str, list[str]]),
    )


def read_none(path: Path) -> list[tuple[str, str]]:
    """Prompts that no skill fits, with their split (empty where the file has none).

    Args:
        path: JSONL of ``text``, or of ``instruction`` with ``instances`` that have an ``input``.

    Raises:
        NotFound: there is no such file.
        InvalidData: a line that cannot be read.
    """
    if not path.is_file():
        raise NotFound(f"no file {path} of prompts that no skill fits; give one with --none FILE.")
    return [(str(row.get("split", "")), text) for _, row, text in request_lines(path)]


def request_lines(path: Path) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Requests of a JSONL file in people's own words.

    Args:
        path: JSONL of ``text``, or of ``instruction`` with ``instances`` that have an ``input``.

    Yields:
        Line number, the whole row, and the text of the request.

    Raises:
        InvalidData: a line that cannot be read.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row["text"] if "text" in row else row["instruction"]
            inputs = [instance["input"] for instance in row.get("instances", [])[:1] if instance["input"]]
            whole = "\n".join([text, *inputs])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InvalidData(
                f"{path}, line {number}: needs 'text' or 'instruction' ({error}); fix it."
            ) from None
        yield number, row, whole


def collect(
    skills: Sequence[str],
    data_dir: Path,
    none_files: Sequence[Path],
    *,
    per_skill: int | None = None,
    seed: int = 0,
) -> list[Prompt]:
    """Prompts to train the gate on.

    Args:
        skills: names of the pack's skills, each with its data ``DATA_DIR/NAME.jsonl.gz`` and its recipe:
            ``DATA_DIR/NAME.toml``, or one that ships with Loramix.
        data_dir: recipes and data; only rows of ``train`` are used.
        none_files: prompts that no skill fits; rows of split ``test`` are left out, and every second
            row of a file without splits.
        per_skill: prompts made for each skill, and twice as many for none; by default so many that all
            skills together have about 8,000.
        seed: of all draws.

    Raises:
        NotFound: a recipe or a data file is missing.
        InvalidRecipe, InvalidData: one that cannot be read.
    """
    count = per_skill or max(400, min(1000, 8000 // len(skills)))
    recipes = {name: recipe_beside(data_dir, name) for name in skills}
    rows = {name: take(read_rows(data_file(data_dir, name)), "train", 3 * count, seed) for name in skills}
    prompts = prompts_of(recipes, rows, count, seed=seed)
    for path in none_files:
        alone = [text for i, (split, text) in enumerate(read_none(path)) if _for_training(split, i)]
        prompts += [Prompt(text, {BASE: 1.0}, text) for text in alone]
    return prompts


def prompts_of(
    recipes: Mapping[str, Recipe], rows: Mapping[str, Sequence[Row]], count: int, *, seed: int = 0
) -> list[Prompt]:
    """Prompts for a gate, from recipes and rows that were read.

    Args:
        recipes: of each skill.
        rows: training rows of each skill.
        count: prompts made for each skill, and as many for none.
        seed: of all draws.
    """
    skills = list(recipes)
    phrasings = load_phrasings()
    rng = random.Random(seed)
    texts = {name: [_cut(row.input) for row in rows[name]] for name in skills}
    general = [name for name in skills if recipes[name].any_text]

    def any_text(own: str = "") -> str:
        """A text of any skill; of those whose texts are plain language, where ``own`` is one of them."""
        among = general if own in general and rng.random() < 0.8 else list(skills)
        return rng.choice(texts[rng.choice(among)])

    prompts: list[Prompt] = []
    for name in skills:
        templates = templates_of(recipes[name], phrasings)
        rng.shuffle(templates)
        by_source = {
            s: [_cut(row.input) for row in rows[name] if not s or row.source == s] for _, s in templates
        }
        crossing = CROSSED if name in general else CROSSED / 3
        for i in range(count):
            template, source = templates[i % len(templates)]
            crossed = (not source and rng.random() < crossing) or not by_source[source]
            text = any_text(name) if crossed else rng.choice(by_source[source])
            prompts.append(Prompt(fill(template, text), {name: 1.0}, template))
    # what other skills serve is for none here, if it can be told: "what does it do?" needs its function
    absent = [load_recipe(name) for name in shipped() if name not in skills]
    foreign = [t for recipe in absent if recipe.any_text for t, _ in templates_of(recipe, phrasings)]
    rng.shuffle(foreign)
    for number, pool in ((count, phrasings.none.templates), (count // 2, foreign)):
        for i in range(number if pool else 0):
            template = pool[i % len(pool)]
            prompts.append(Prompt(fill(template, any_text()), {BASE: 1.0}, template))
    rng = random.Random(f"{seed}-composed")
    for names, together in phrasings.composed.items():
        parts = names.split("+")
        if set(parts) <= set(skills):
            for i in range(count // 4):
                template = together[i % len(together)]
                target = {name: 1.0 / len(parts) for name in parts}
                prompts.append(Prompt(fill(template, any_text(parts[0])), target, template))
    prompts += [Prompt(text, {BASE: 1.0}, text) for text in phrasings.none.prompts]
    return prompts


def _cut(text: str) -> str:
    """A long text's beginning, up to the end of a word."""
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS].rpartition(" ")[0]


def _for_training(split: str, index: int) -> bool:
    return split != "test" if split else index % 2 == 0


def templates_of(recipe: Recipe, phrasings: Phrasings) -> list[tuple[str, str]]:
    """All ways to ask for a skill: (template, source that it is for or empty), each once."""
    more = phrasings.skills.get(recipe.name, {})
    found = {
        (template, "" if source == "any" else source): None
        for group in (recipe.instructions, more)
        for source, templates in group.items()
        for template in templates
    }
    return list(found)
