"""Test rows of the broad recipes by source, greedy, the skill named; resumes where it was stopped.

    python benchmarks/rows_by_source.py PACK OUT.jsonl --data DATA --rows 60 --skill sentiment --minutes 4
    python benchmarks/rows_by_source.py PACK BARE.jsonl --data DATA --rows 12 --bare --five-shot

Beside OUT.jsonl it writes OUT.json: each measure by skill and group of sources, with its 95 % interval.
With --bare the pack's base answers alone; if its answer to a label skill names exactly one label, it counts as that
label.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from loramix import Engine
from loramix.defaults import N_CTX
from loramix.eval.bare import tidy
from loramix.eval.everyday.checks import run_query
from loramix.eval.skills import shots
from loramix.paths import write_text
from loramix.prompts import Message
from loramix.train.data import Row, prompts, read_rows
from loramix.train.metrics import bootstrap, estimate, is_sentence, measure, normal, share
from loramix.train.recipe import Recipe, load_recipe, shipped
from loramix.train.schema_forms import parse
from loramix.train.sources import read_sources

UCI = "test_uci_amazon"


def group_of(skill: str, source: str) -> str:
    """The group of sources in which a row is reported; ``source`` is ``FILE`` or ``FILE:SOURCE``."""
    file, _, tail = source.partition(":")
    if skill == "summarize":
        own = {
            "oneline": "titles",
            "tldr": "sentences: tldr",
            "meqsum": "questions",
            "stackexchange": "questions",
        }
        return own.get(tail, "sentences: other")
    if skill == "shell" and tail:
        return "tldr-pages" if tail == "tldr-pages" else "cheat sheets"
    if skill == "translate_fr":
        return tail or "package texts"
    return "own test" if file == f"skills/{skill}" else "new sources"


def rows_of(recipe: Recipe, data: Path, most: int) -> dict[str, list[tuple[Row, str]]]:
    """Test rows with their prompts, by group, each input once; at most ``most`` a group."""
    groups: dict[str, list[Row]] = defaultdict(list)
    seen = set()
    for source, rows in zip(recipe.data.sources, read_sources(recipe, data), strict=True):
        for row in rows if not source.made and source.target is None else ():
            if row.split == "test" and (row.source, row.input) not in seen:
                seen.add((row.source, row.input))
                groups[group_of(recipe.name, row.source)].append(row)
    if recipe.name == "sentiment":
        file = data / "skills" / "sentiment.jsonl.gz"
        groups["uci_amazon"] = [
            replace(row, split="test", source="skills/sentiment!uci", groups=("any",))
            for row in read_rows(file)
            if row.split == UCI
        ]
    found = {}
    for name, rows in groups.items():
        random.Random(f"test-{recipe.name}-{name}").shuffle(rows)
        chosen = rows[:most]
        found[name] = list(zip(chosen, prompts(chosen, recipe, f"{recipe.name}-test-{name}"), strict=True))
    return found


def same_rows(answer: str, row: Row) -> bool | None:
    """Whether a query returns the target's rows on five databases of random values; None where the target fails."""
    schema = parse(row.input)
    if schema is None:
        return None
    both = row.target + answer
    values: list[Any] = re.findall(r"'([^']*)'", both)
    values += [float(n) if "." in n else int(n) for n in re.findall(r"\b\d+(?:\.\d+)?\b", both)]
    for seed in range(5):
        rng = random.Random(seed)
        script = []
        for table, columns, _ in schema[0]:
            names = ", ".join(f'"{column}"' for column in columns)
            script.append(f'CREATE TABLE "{table}" ({names});')
            for _ in range(25):
                cells = [
                    rng.choice(values) if values and rng.random() < 0.35 else rng.randint(0, 6)
                    for _ in columns
                ]
                script.append(f'INSERT INTO "{table}" VALUES ({", ".join(map(_literal, cells))});')
        wanted = run_query("\n".join(script), row.target)
        if wanted is None:
            return None
        found = run_query("\n".join(script), answer.strip().split(";")[0])
        if found is None:
            return False
        in_order: Callable[[Any], Any] = lambda rows: rows  # noqa: E731
        arrange = in_order if "ORDER BY" in row.target.upper() else lambda rows: sorted(rows, key=repr)
        if arrange(wanted) != arrange(found):
            return False
    return True


def _literal(value: Any) -> str:
    """A number or a text without quotes, as SQL."""
    return f"'{value}'" if isinstance(value, str) else repr(value)


def scores(recipe: Recipe, answered: Sequence[tuple[Row, str]]) -> dict[str, Any]:
    """Each measure's value with its interval, of the rows that were answered."""
    rows, texts = [row for row, _ in answered], [text for _, text in answered]
    found: dict[str, Any] = {"rows": len(rows)}
    for metric in recipe.metrics:
        value = estimate(measure(metric, recipe.labels), texts, rows)
        found[metric] = [value.value, value.low, value.high]
    extra: dict[str, list[bool | None]] = {}
    if recipe.labels:
        extra["is_label"] = [normal(text) in recipe.labels for text in texts]
    if recipe.name == "sql":
        extra["same_rows"] = [same_rows(text, row) for row, text in answered]
    if recipe.name == "summarize":
        extra["one_sentence"] = [is_sentence(text.strip()) for text in texts]
    for name, flags in extra.items():
        known = [[float(flag), 1.0] for flag in flags if flag is not None]
        if known:
            value = bootstrap(np.asarray(known), share)
            found[name] = [value.value, value.low, value.high]
    return found


@click.command()
@click.argument("pack")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="Directory of skills/ and skills_more/."
)
@click.option("--rows", default=60, show_default=True, help="Most rows of a group.")
@click.option("--skill", "skills", multiple=True, help="Only this skill; repeatable.")
@click.option("--minutes", default=60.0, show_default=True, help="Stop asking after this time.")
@click.option("--bare", is_flag=True, help="Ask the pack's base alone.")
@click.option("--five-shot", is_flag=True, help="With --bare: five solved rows of train before each request.")
def main(
    pack: str,
    out: Path,
    data: Path,
    rows: int,
    skills: tuple[str, ...],
    minutes: float,
    bare: bool,
    five_shot: bool,
) -> None:
    """Answer test rows and score all that is answered; groups take turns, so that each has some."""
    until = time.monotonic() + 60 * minutes
    recipes = {name: load_recipe(f"broad/{name}") for name in skills or shipped()}
    groups = {name: rows_of(recipe, data, rows) for name, recipe in recipes.items()}
    solved = {
        name: [row for rows in read_sources(recipe, data) for row in rows]
        for name, recipe in recipes.items()
        if five_shot
    }
    row_of = {
        (name, g, prompt): row
        for name, found in groups.items()
        for g, pairs in found.items()
        for row, prompt in pairs
    }
    known: dict[tuple[str, str, str], str] = {}
    if out.is_file():
        for line in out.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            known[row["skill"], row["group"], row["prompt"]] = row["text"]
    jobs = [
        (turn, name, group, prompt)
        for name, found in groups.items()
        for group, pairs in found.items()
        for turn, (_, prompt) in enumerate(pairs)
    ]
    size = 8192 if five_shot else N_CTX  # five rows may be long
    with out.open("a", encoding="utf-8") as file, Engine.open(pack, n_ctx=size, n_threads=1) as engine:
        for _, name, group, prompt in sorted(jobs, key=lambda job: job[0]):
            if (name, group, prompt) in known or time.monotonic() > until:
                continue
            asked: list[Message] = [{"role": "user", "content": prompt}]
            if five_shot:
                asked = [*shots(recipes[name], solved[name], row_of[name, group, prompt])[:-1], *asked]
            limit = max(24, recipes[name].max_tokens)  # a bare base may write a sentence around a label
            if bare:
                text = tidy(engine.generate(asked, policy="base", max_tokens=limit).text, recipes[name])
            else:
                text = engine.generate(prompt, mix=name).text
            known[name, group, prompt] = text
            row = {"skill": name, "group": group, "prompt": prompt, "text": text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    result: dict[str, dict[str, Any]] = {}
    for name, found in groups.items():
        for group, pairs in found.items():
            answered = [
                (row, known[name, group, prompt]) for row, prompt in pairs if (name, group, prompt) in known
            ]
            if answered:
                result.setdefault(name, {})[group] = scores(recipes[name], answered)
    write_text(out.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
