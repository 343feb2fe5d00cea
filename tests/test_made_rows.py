"""Training rows made by rule: placeholders, labels, queries that run, and the recipes that use them."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest

from loramix.errors import InvalidRecipe
from loramix.train.made_rows import KINDS, filled, made_rows
from loramix.train.made_sql import runs
from loramix.train.metrics import is_sentence
from loramix.train.recipe import RECIPES, load_recipe
from loramix.train.sources import data_files, read_sources, sample


@pytest.mark.parametrize("name", sorted(KINDS))
def test_rows_are_whole_different_and_the_same_every_time(name: str) -> None:
    rows = made_rows(name)
    assert rows == made_rows(name) and len(rows) > 300
    assert len({row.input for row in rows}) == len(rows)
    assert {row.split for row in rows} == {"train"}
    # a placeholder without value; commands and code have braces of their own
    left = re.compile(r"\{[a-z]+(_\d)?(\.\w+)?\}")
    assert not [row for row in rows if left.search(row.input) or left.search(row.target)]


@pytest.mark.parametrize("name", ["emotion", "sentiment", "spam"])
def test_labels_are_the_recipe_s_and_even(name: str) -> None:
    counts = Counter(row.target for row in made_rows(name))
    assert set(counts) == set(load_recipe(str(RECIPES / "broad" / f"{name}.toml")).labels)
    assert max(counts.values()) < 2 * min(counts.values())


def test_every_query_runs_on_its_tables() -> None:
    rows = made_rows("sql")
    for row in rows:
        schema = "\n".join(line for line in row.input.splitlines() if re.fullmatch(r"\w+\([\w, ]+\)", line))
        assert schema and row.input.rsplit("\n", 1)[0] == schema
        assert runs(schema, row.target), row
    assert not runs("a(b)", "SELECT c FROM a") and not runs("a(b)", "not sql")
    words = Counter(
        word
        for row in rows
        for word in ("JOIN", "GROUP BY", "HAVING", "DISTINCT", "AVG")
        if word in row.target
    )
    assert min(words.values()) > 30


def test_summaries_are_one_sentence_and_titles_are_none() -> None:
    assert all(is_sentence(row.target) for row in made_rows("summarize"))
    assert not any(row.target.endswith(".") for row in made_rows("title"))


def test_placeholders_keep_their_value_across_texts() -> None:
    values = {"dir": ["a", "b", "c"], "place": [{"en": "bank", "fr": "la banque"}]}
    for seed in range(20):
        first, second = filled(["{dir} to {dir_2}", "{dir_2} from {dir}"], values, random.Random(seed))
        one, two = first.split(" to ")
        assert one != two and second == f"{two} from {one}"
    assert filled(["{place.en}: {place.fr}, '{print $1}'"], values, random.Random(0)) == [
        "bank: la banque, '{print $1}'"
    ]
    with pytest.raises(InvalidRecipe, match="other"):
        filled(["{other}"], values, random.Random(0))


MADE = """
extends = "spam"
name = "spam"
[data]
license = "CC0"
rows = 30
[[data.sources]]
file = "own/spam"
[[data.sources]]
made = "spam"
"""


def test_a_recipe_takes_made_rows_beside_a_file(tmp_path: Path) -> None:
    path = tmp_path / "spam.toml"
    path.write_text(MADE)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "spam.jsonl").write_text(
        "".join(f'{{"split": "train", "input": "text {i}", "target": "ham"}}\n' for i in range(40))
    )
    recipe = load_recipe(str(path))
    assert data_files(recipe, tmp_path) == [tmp_path / "own" / "spam.jsonl"]
    rows = sample(recipe, read_sources(recipe, tmp_path))
    assert Counter(row.source for row in rows) == {"own/spam": 15, "made:spam": 15}


@pytest.mark.parametrize("change", ['file = "own/spam"\nmade = "spam"', "weight = 2", 'made = "jokes"'])
def test_a_source_is_a_file_or_made(tmp_path: Path, change: str) -> None:
    path = tmp_path / "spam.toml"
    path.write_text(MADE.replace('file = "own/spam"', change))
    with pytest.raises(InvalidRecipe, match="made"):
        load_recipe(str(path))


def test_only_rows_of_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "short.toml"
    path.write_text(
        MADE.replace('"spam"', '"summarize"').replace('"own/spam"', '"own/text"\none_sentence = true')
    )
    (tmp_path / "own").mkdir()
    targets = [
        "The old bridge will close next week.",
        "It closes. It opens again in May, they say.",
        "Bridge closed",
    ]
    lines = [
        f'{{"split": "{s}", "input": "{s}{i}", "target": "{t}"}}\n'
        for s in ("train", "dev")
        for i, t in enumerate(targets)
    ]
    (tmp_path / "own" / "text.jsonl").write_text("".join(lines))
    recipe = load_recipe(str(path))
    own = read_sources(recipe, tmp_path)[0]
    assert [row.input for row in own] == ["train0", "dev0", "dev1", "dev2"]
