"""Several sources for one skill: sampling, wording, forms of a schema."""

from __future__ import annotations

import json
import random
import tomllib
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from loramix.commands.train import train
from loramix.errors import InvalidData, InvalidRecipe, NotFound
from loramix.train import lora
from loramix.train.card import write_card
from loramix.train.data import Row, instruct
from loramix.train.frames import framed
from loramix.train.lora import Result
from loramix.train.pack import train_pack
from loramix.train.recipe import RECIPES, Recipe, load_recipe
from loramix.train.sources import (
    by_source,
    data_files,
    dev_rows,
    gather,
    read_sources,
    rows_of,
    sample,
    shares,
)

BROAD = sorted((RECIPES / "broad").glob("*.toml"))
RECIPE = """
name = "mood"
description = "d"
metrics = ["accuracy"]
instructions = { any = ["Mood: {input}"] }
asks = { any = ["what mood is this?"] }
[data]
license = "CC0"
how = "h"
rows = 60
[[data.sources]]
file = "old/mood"
weight = 2
[[data.sources]]
file = "new/mood"
take = ["tweets"]
[[data.sources]]
file = "new/mood"
take = ["films", "books"]
"""


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    old = [{"split": "train", "input": f"old {i}", "target": "sad"} for i in range(100)]
    old += [{"split": "dev", "input": f"old dev {i}", "target": "sad"} for i in range(20)]
    write(tmp_path / "old" / "mood.jsonl", old)
    new = []
    for source, count in (("tweets", 8), ("films", 50), ("books", 50), ("unused", 50)):
        rows = [
            {"split": "dev" if i % 5 == 4 else "train", "input": f"{source} {i}", "target": "glad"}
            for i in range(count)
        ]
        new += [row | {"source": source} for row in rows]
    write(tmp_path / "new" / "mood.jsonl", new)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def test_a_sample_keeps_the_weights_and_uses_up_small_sources(data_dir: Path) -> None:
    recipe = load_recipe(str(data_dir / "recipe.toml"))
    counts = by_source(sample(recipe, read_sources(recipe, data_dir)))
    # 7 tweets are all there are; the other 53 rows go 2 to 1
    assert counts.pop("new/mood:tweets") == 7
    assert counts.pop("old/mood") == 35
    assert set(counts) == {"new/mood:films", "new/mood:books"} and sum(counts.values()) == 18


def test_later_passes_show_other_rows_of_a_large_source(data_dir: Path) -> None:
    recipe = load_recipe(str(data_dir / "recipe.toml"))
    found = read_sources(recipe, data_dir)
    passes = [{row.input for row in sample(recipe, found, n) if row.source == "old/mood"} for n in range(2)]
    assert not passes[0] & passes[1]
    assert [r.input for r in sample(recipe, found, 1)] == [r.input for r in sample(recipe, found, 1)]


@pytest.mark.parametrize(
    ("sizes", "weights", "total", "counts"),
    [
        ([100, 100], [1, 1], 50, [25, 25]),
        ([10, 100, 100], [1, 1, 2], 100, [10, 30, 60]),
        ([10, 20, 5], [1, 1, 1], 100, [10, 20, 5]),
        ([10, 14, 1000], [1, 1, 1], 60, [10, 14, 36]),  # the second is small only once the first is
    ],
)
def test_shares(sizes: list[int], weights: list[float], total: int, counts: list[int]) -> None:
    assert shares(sizes, weights, total) == counts


def test_dev_has_each_source(data_dir: Path) -> None:
    recipe = load_recipe(str(data_dir / "recipe.toml"))
    rows = dev_rows(recipe, read_sources(recipe, data_dir), 16)
    assert {row.split for row in rows} == {"dev"}
    assert Counter(row.source for row in rows) == {
        "old/mood": 5, "new/mood:tweets": 1, "new/mood:films": 5, "new/mood:books": 5,
    }  # fmt: skip
    gathered = gather(recipe, data_dir)
    assert sum(row.split == "train" for row in gathered) == 60


def test_a_pack_trains_on_the_files_of_the_sources(data_dir: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(data_dir / "recipe.toml"))
    assert data_files(recipe, data_dir) == [data_dir / "old" / "mood.jsonl", data_dir / "new" / "mood.jsonl"]
    assert rows_of(recipe, data_dir) == gather(recipe, data_dir)
    single = msgspec.structs.replace(recipe, data=msgspec.structs.replace(recipe.data, sources=()))
    assert len(rows_of(single, data_dir / "old")) == 120
    (data_dir / "new" / "mood.jsonl").unlink()
    with pytest.raises(NotFound, match="new"):
        train_pack(tmp_path / "pack", [recipe], data_dir, tmp_path / "out", base="smollm2-135m")
    assert not (tmp_path / "pack").exists()


def test_train_skill_says_what_it_takes_from_each_source(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Row] = []

    def work(recipe: Recipe, rows: list[Row], base: Path, out: Path, **options: object) -> Result:
        taken.extend(rows)
        return Result(out, 0.5, 0.5, 1.0, "", len(rows))

    monkeypatch.setattr(lora, "train_skill", work)
    words = ["skill", str(data_dir / "recipe.toml"), "--data", str(data_dir), "--base", str(tmp_path)]
    said = CliRunner().invoke(train, words)
    assert said.exit_code == 0, said.output
    assert "    35 rows of old/mood" in said.output and "     7 rows of new/mood:tweets" in said.output
    assert sum(row.split == "train" for row in taken) == 60


def test_an_input_in_two_files_keeps_its_first_split(data_dir: Path) -> None:
    rows = [
        {"split": "train", "input": "old dev 3", "target": "glad", "source": "tweets"},
        {"split": "train", "input": "fresh", "target": "glad", "source": "tweets"},
    ]
    with (data_dir / "new" / "mood.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(str(data_dir / "recipe.toml"))
    trained = {row.input for rows in read_sources(recipe, data_dir) for row in rows if row.split == "train"}
    assert "fresh" in trained and "old dev 3" not in trained


def test_a_source_can_lend_its_texts_to_one_class_and_thin_out_another(data_dir: Path) -> None:
    recipe = load_recipe(str(data_dir / "recipe.toml"))
    old, tweets, films = recipe.data.sources
    old = msgspec.structs.replace(old, target_rates={"sad": 0.2})
    films = msgspec.structs.replace(films, target="calm")
    data = msgspec.structs.replace(recipe.data, sources=(old, tweets, films), rows=1000)
    recipe = msgspec.structs.replace(recipe, data=data)
    found = read_sources(recipe, data_dir)
    chosen = sample(recipe, found)
    assert 5 < sum(row.target == "sad" for row in chosen) < 40
    lent = [row for row in chosen if row.source in ("new/mood:films", "new/mood:books")]
    assert len(lent) == 80 and {row.target for row in lent} == {"calm"} == {
        t for r in lent for t in r.references
    }
    # lent texts have no label of their own, so they measure nothing
    assert {row.source for row in dev_rows(recipe, found, 100)} == {"old/mood", "new/mood:tweets"}


def test_entity_types_are_renamed_in_target_and_references(data_dir: Path) -> None:
    write(
        data_dir / "old" / "mood.jsonl",
        [
            {"split": "train", "input": "a", "target": "group: The Who; person: Roger Daltrey"},
            {"split": "train", "input": "b", "target": "none"},
            {"split": "train", "input": "c", "target": "creative-work: group: a story; group: ABBA"},
        ],
    )
    recipe = load_recipe(str(data_dir / "recipe.toml"))
    source = msgspec.structs.replace(recipe.data.sources[0], rename={"group": "organization"})
    data = msgspec.structs.replace(recipe.data, sources=(source,))
    rows = read_sources(msgspec.structs.replace(recipe, data=data), data_dir)[0]
    assert [row.target for row in rows] == [
        "organization: The Who; person: Roger Daltrey",
        "none",
        "creative-work: group: a story; organization: ABBA",
    ]
    assert all(row.references == (row.target,) for row in rows)


def test_what_cannot_be_sampled(data_dir: Path) -> None:
    recipe = data_dir / "recipe.toml"
    recipe.write_text(RECIPE.replace('"tweets"', '"letters"'))
    with pytest.raises(InvalidData, match="source letters"):
        read_sources(load_recipe(str(recipe)), data_dir)
    recipe.write_text(RECIPE.replace('"old/mood"', '"gone/mood"'))
    with pytest.raises(NotFound, match="gone"):
        read_sources(load_recipe(str(recipe)), data_dir)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (('file = "old/mood"', 'file = "old/mood"\ninstructions = ["some"]'), "'some'"),
        (("weight = 2", "weight = 0"), "weight"),
        (('name = "mood"', 'name = "mood"\nextends = "mooood"'), "mooood"),
    ],
)
def test_sources_that_cannot_be_used(tmp_path: Path, change: tuple[str, str], problem: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace(*change))
    with pytest.raises(InvalidRecipe, match=problem):
        load_recipe(str(path))


def test_a_recipe_that_extends_another_keeps_its_instructions(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('extends = "spam"\nname = "mine"\n[lora]\nr = 3\n[asks]\nany = ["is it bad?"]\n')
    mine, spam = load_recipe(str(path)), load_recipe("spam")
    assert mine.instructions == spam.instructions and mine.labels == ["ham", "spam"]
    assert (mine.name, mine.lora.r, mine.lora.skip_lowest) == ("mine", 3, spam.lora.skip_lowest)
    assert mine.asks == {"any": ["is it bad?"]}


@pytest.mark.parametrize("ask", ["what mood is this?", "name the mood", "tell me how they feel"])
def test_frames_keep_text_and_request(ask: str) -> None:
    text = "  So {ask} this {input}?  \nBraces stay. "
    prompts = {framed(ask, text, random.Random(i)) for i in range(300)}
    assert len(prompts) > 40
    assert all(prompt.count(text) == 1 for prompt in prompts)
    assert all(ask.rstrip("?").casefold() in prompt.casefold() for prompt in prompts)


def test_groups_decide_the_wording(data_dir: Path) -> None:
    recipe = load_recipe(str(BROAD[[path.stem for path in BROAD].index("summarize")]))
    titled = Row("train", "TEXT", "t", groups=("oneline", "title"))
    prompts = {instruct(titled, recipe, random.Random(i)).casefold() for i in range(400)}
    asked = [ask.rstrip("?") for ask in recipe.asks["title"]]
    assert sum(any(ask.casefold() in prompt for ask in asked) for prompt in prompts) > 100
    assert not any("summar" in prompt or "gist" in prompt for prompt in prompts)
    plain = {instruct(Row("train", "TEXT", "t"), recipe, random.Random(i)) for i in range(400)}
    assert plain <= {text.replace("{input}", "TEXT") for text in recipe.instructions["any"]}


RUN = {"rows": 5, "dev_loss": 0.5, "dev_exact": 0.5}


@pytest.mark.parametrize(
    "name, says",
    [
        (
            "spam",
            [
                "`skills_more/spam` (ewt-email)",
                "`skills/emotion`, all `ham`",
                "rows made by rule",
                "7000 rows",
            ],
        ),
        ("sql", ["`skills_more/sql` (spider)", "(wikisql-executable)", "9800 rows"]),
        ("facts", ["`skills/facts`; rows made by rule: 4500 rows"]),
    ],
)
def test_a_card_names_every_source_and_a_command_that_parses(name: str, says: list[str]) -> None:
    card = write_card(load_recipe(str(RECIPES / "broad" / f"{name}.toml")), "base", RUN)
    assert all(words in card for words in says), card
    assert f"`loramix train skill broad/{name} --data DIRECTORY`" in card and ".jsonl" not in card
    assert load_recipe(f"broad/{name}").data.sources


def test_a_card_of_one_source_says_how_the_data_are_made() -> None:
    recipe = load_recipe("spam")
    card = write_card(recipe, "base", RUN)
    assert recipe.data.how in card and "`loramix train skill spam --data FILE`" in card


@pytest.mark.parametrize("path", BROAD, ids=lambda path: path.stem)
def test_broad_recipes_ask_in_words_of_their_own(path: Path) -> None:
    recipe, shipped = load_recipe(str(path)), load_recipe(path.stem)
    assert recipe.name == path.stem and recipe.data.sources and recipe.metrics == shipped.metrics
    assert recipe.fingerprint() != shipped.fingerprint()
    asks = [ask for group in recipe.asks.values() for ask in group]
    assert len(asks) == len(set(asks)) > 8 and not any("{input}" in ask for ask in asks)
    held = tomllib.loads((Path(__file__).parent.parent / "benchmarks" / "heldout.toml").read_text())
    phrasings = {normal(text) for part in held.values() for group in part.values() for text in group}
    assert not {normal(ask) for ask in asks} & phrasings


def normal(text: str) -> str:
    return "".join(letter for letter in text.replace("{input}", "").casefold() if letter.isalnum())
