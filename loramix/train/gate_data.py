"""Prompts for the gate: which skill each was made for, two at once, or none.

The instruction decides, not the look of the text: a skill's phrasings are put on the other skills' texts
too, and instructions that no skill serves are put on all of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from loramix.errors import InvalidData, InvalidRecipe
from loramix.prompts import fill
from loramix.train.data import Row, read_rows, take
from loramix.train.recipe import Recipe, load_recipe

BASE = "base"
MAX_CHARACTERS = 500  # of a text: the gate reads the instruction, long texts only cost time


class Phrasings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``recipes/gate.toml``: what to ask that no skill, or more than one, serves."""

    none_templates: list[str]
    """Requests about a text, with ``{input}``, that no skill serves."""
    none_prompts: list[str]
    """Requests without a text that no skill serves."""
    composed_templates: dict[str, list[str]]
    """Requests for several skills at once, by their names joined with ``+``."""
    extra: dict[str, list[str]] = {}
    """More phrasings by skill, for the gate alone."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt with what the gate should say of it."""

    text: str
    target: Mapping[str, float]
    """Probability by skill or ``base``; sums to 1."""
    group: str
    """Prompts of one phrasing share it: held out together, they tell how the gate does on unseen wording."""


def load_phrasings(path: Path | None = None) -> Phrasings:
    """Read the phrasings that ship with Loramix, or a file of the same form.

    Raises:
        InvalidRecipe: not TOML, or not of that form.
    """
    path = path or Path(__file__).parent / "recipes" / "gate.toml"
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Phrasings)
    except (msgspec.MsgspecError, ValueError) as error:
        raise InvalidRecipe(f"{path}: {error}; mend that line and run the command again.") from None


def read_none(path: Path) -> list[tuple[str, str]]:
    """Prompts that no skill fits, with their split (empty where the file has none).

    Args:
        path: JSONL of ``text``, or of ``instruction`` with ``instances`` that have an ``input``.

    Raises:
        InvalidData: a line that cannot be read.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            text = row["text"] if "text" in row else row["instruction"]
            inputs = [instance["input"] for instance in row.get("instances", [])[:1] if instance["input"]]
            found.append((str(row.get("split", "")), "\n".join([text, *inputs])))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidData(
                f"{path}, line {number}: needs 'text' or 'instruction' ({error}); mend it."
            ) from None
    return found


def collect(
    skills: Sequence[str], data_dir: Path, none_files: Sequence[Path], *, per_skill: int = 800, seed: int = 0
) -> list[Prompt]:
    """Prompts to train the gate on.

    Args:
        skills: names of the pack's skills, each with a recipe and ``DATA_DIR/NAME.jsonl.gz``.
        data_dir: their data; only rows of ``train`` are used.
        none_files: prompts that no skill fits; rows of split ``test`` are left out, and every second
            row of a file without splits.
        per_skill: prompts made for each skill, and about as many for none.
        seed: of all draws.
    """
    phrasings = load_phrasings()
    recipes = {name: load_recipe(name) for name in skills}
    rng = random.Random(seed)
    rows: dict[str, list[Row]] = {}
    for name in skills:
        whole = take(read_rows(data_dir / f"{name}.jsonl.gz"), "train", None, seed)
        rows[name] = whole[: 3 * per_skill]
    texts = [_cut(row.input) for name in skills for row in rows[name]]
    prompts: list[Prompt] = []
    for name in skills:
        templates = _templates(recipes[name], phrasings)
        for i in range(per_skill):
            template, source = templates[i % len(templates)]
            crossed = not source and rng.random() < 0.3
            own = [_cut(row.input) for row in rows[name] if not source or row.source == source]
            text = rng.choice(texts if crossed or not own else own)
            prompts.append(Prompt(fill(template, text), {name: 1.0}, template))
    for i in range(per_skill * 3 // 4):
        template = phrasings.none_templates[i % len(phrasings.none_templates)]
        prompts.append(Prompt(fill(template, rng.choice(texts)), {BASE: 1.0}, template))
    for names, templates_ in phrasings.composed_templates.items():
        together = names.split("+")
        if not set(together) <= set(skills):
            continue
        for i in range(per_skill // 4):
            template = templates_[i % len(templates_)]
            share = {name: 1.0 / len(together) for name in together}
            prompts.append(Prompt(fill(template, rng.choice(texts)), share, template))
    alone = list(phrasings.none_prompts)
    for path in none_files:
        alone += [text for i, (split, text) in enumerate(read_none(path)) if _for_training(split, i)]
    prompts += [Prompt(text, {BASE: 1.0}, text) for text in alone]
    return prompts


def _cut(text: str) -> str:
    """A long text's beginning, up to the end of a word."""
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS].rpartition(" ")[0]


def _for_training(split: str, index: int) -> bool:
    return split != "test" if split else index % 2 == 0


def _templates(recipe: Recipe, phrasings: Phrasings) -> list[tuple[str, str]]:
    """(template, source that it is for or empty), each once."""
    groups = {**recipe.instructions}
    groups["any"] = [*groups.get("any", []), *phrasings.extra.get(recipe.name, [])]
    for source in groups:
        groups[source] = [*groups[source], *phrasings.extra.get(f"{recipe.name}.{source}", [])]
    return [(t, "" if source == "any" else source) for source, group in groups.items() for t in group]
