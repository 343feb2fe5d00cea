"""Training a pack of two skills on the tiny base, and the prompts its gate learns from."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from tiny_skill import write_skill

pytest.importorskip("torch")

from loramix.cli import main
from loramix.errors import InvalidRecipe, NotFound
from loramix.pack.manifest import write_manifest
from loramix.pack.pack import Pack
from loramix.train.gate_data import BASE, PHRASINGS, Prompt, collect, load_phrasings, templates_of
from loramix.train.recipe import load_recipe, shipped

pytestmark = pytest.mark.train


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Recipes and data of two skills."""
    directory = tmp_path / "data"
    directory.mkdir()
    for name in ("mood", "taste"):
        write_skill(directory, name)
    return directory


def train_pack(data_dir: Path, base: Path, out: Path, *names: str) -> Result:
    recipes = [part for name in names for part in ("--skill", str(data_dir / f"{name}.toml"))]
    command = ["train", "pack", str(out / "pack"), "--data-dir", str(data_dir), *recipes, "--base", str(base)]
    return CliRunner().invoke(main, [*command, "--out", str(out / "runs"), "--no-gate"])


def test_a_pack_is_trained_and_only_what_changed_again(
    data_dir: Path, tiny_base: Path, tmp_path: Path
) -> None:
    first = train_pack(data_dir, tiny_base, tmp_path, "mood")
    assert first.exit_code == 0, first.output
    assert "mood (1 of 1)" in first.stderr
    mood = (tmp_path / "pack" / "skills" / "mood.gguf").read_bytes()
    held = Pack.load(tmp_path / "pack")
    assert held.skill("mood").labels == ("good", "bad")
    bare = msgspec.structs.replace(held.skill("mood"), labels=())  # as a version without labels wrote it
    write_manifest(held.directory, msgspec.structs.replace(held.manifest, skills=(bare,)))

    second = train_pack(data_dir, tiny_base, tmp_path, "mood", "taste")
    assert second.exit_code == 0, second.output
    assert "mood (1 of 2): trained before" in second.stderr and "taste (2 of 2): loss" in second.stderr
    pack = Pack.load(tmp_path / "pack")
    assert [(skill.name, skill.labels) for skill in pack.skills] == [
        (name, ("good", "bad")) for name in ("mood", "taste")
    ]
    assert (tmp_path / "pack" / "skills" / "mood.gguf").read_bytes() == mood
    card = (tmp_path / "pack" / "skills" / "taste.md").read_text()
    assert "what taste is" in card and "`good`, `bad`" in card and "By hand." in card and "8 rows" in card
    pack.check(tiny_base)


def test_another_recipe_is_not_taken_for_done(data_dir: Path, tiny_base: Path, tmp_path: Path) -> None:
    assert train_pack(data_dir, tiny_base, tmp_path, "mood").exit_code == 0
    path = data_dir / "mood.toml"
    path.write_text(path.read_text().replace("what mood is", "how it was"))
    assert "trained before" in train_pack(data_dir, tiny_base, tmp_path, "mood").stderr
    path.write_text(path.read_text().replace("r = 2", "r = 4"))
    result = train_pack(data_dir, tiny_base, tmp_path, "mood")
    assert result.exit_code == 2 and "another recipe, data or base" in result.stderr


def test_nothing_is_trained_where_data_are_missing(data_dir: Path, tiny_base: Path, tmp_path: Path) -> None:
    (data_dir / "taste.jsonl").unlink()
    result = train_pack(data_dir, tiny_base, tmp_path, "mood", "taste")
    assert result.exit_code == 1 and "taste.jsonl" in result.stderr
    assert not (tmp_path / "runs" / "mood").exists()


def test_a_skill_named_twice(data_dir: Path, tiny_base: Path, tmp_path: Path) -> None:
    result = train_pack(data_dir, tiny_base, tmp_path, "mood", "mood")
    assert result.exit_code == 2 and "name each skill once" in result.stderr


def of(prompts: list[Prompt], name: str) -> list[Prompt]:
    return [prompt for prompt in prompts if prompt.target == {name: 1.0}]


def test_prompts_for_the_gate(data_dir: Path, tmp_path: Path) -> None:
    none = tmp_path / "none.jsonl"
    rows = [{"split": split, "text": f"order {split}"} for split in ("train", "test")]
    none.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = collect(["mood", "taste"], data_dir, [none], per_skill=60)
    own = of(prompts, "mood")
    assert len(own) == 60 and {prompt.group for prompt in own} == {"mood of {input}?", "{input} mood"}
    crossed = [prompt for prompt in own if "taste" in prompt.text]
    assert 3 < len(crossed) < 40  # "mood of" what was written for the other skill
    texts = [prompt.text for prompt in of(prompts, BASE)]
    assert "order train" in texts and "order test" not in texts
    # what skills outside of the pack serve is for none of this pack's
    others = [recipe for name in shipped() if (recipe := load_recipe(name)).any_text]
    foreign = {template for recipe in others for template, _ in templates_of(recipe, load_phrasings())}
    assert len(foreign & {prompt.group for prompt in of(prompts, BASE)}) == 30
    assert collect(["mood", "taste"], data_dir, [none], per_skill=60) == prompts


def test_composed_prompts_are_for_both(data_dir: Path) -> None:
    for name, place in (("sentiment", "mood"), ("summarize", "taste")):
        text = (data_dir / f"{place}.jsonl").read_text()
        (data_dir / f"{name}.jsonl").write_text(text)
    prompts = collect(["sentiment", "summarize"], data_dir, [], per_skill=40)
    both = [prompt for prompt in prompts if len(prompt.target) == 2]
    assert len(both) == 10 and all(prompt.target == {"sentiment": 0.5, "summarize": 0.5} for prompt in both)


def test_a_skill_without_recipe(data_dir: Path) -> None:
    (data_dir / "mood.toml").unlink()
    with pytest.raises(NotFound, match="mood"):
        collect(["mood", "taste"], data_dir, [])


def normal(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def test_no_phrasing_stands_on_both_sides() -> None:
    """What the held-out file asks is nowhere in recipes or phrasings, letter case and punctuation aside."""
    trained = [t for name in shipped() for group in load_recipe(name).instructions.values() for t in group]
    for path in PHRASINGS.glob("*.toml"):
        trained += [text for group in tomllib.loads(path.read_text()).values() for text in group]
    held_path = Path(__file__).parent.parent / "benchmarks" / "heldout.toml"
    held = [
        t for part in tomllib.loads(held_path.read_text()).values() for group in part.values() for t in group
    ]
    assert len(held) > 600 and len(trained) > 1000
    assert not {normal(text) for text in trained} & {normal(text) for text in held}


def test_phrasings_are_usable() -> None:
    found = load_phrasings()
    for name, groups in found.skills.items():
        own = [t for group in load_recipe(name).instructions.values() for t in group]
        more = [t for group in groups.values() for t in group]
        assert all(text.count("{input}") == 1 for text in more), name
        assert not set(own) & set(more), name
        assert len(set(more)) == len(more), name
    for names, templates in found.composed.items():
        assert set(names.split("+")) <= set(shipped())
        assert all(text.count("{input}") == 1 for text in templates)
    assert all(text.count("{input}") == 1 for text in found.none.templates)
    assert not any("{input}" in text for text in found.none.prompts)


def test_phrasings_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "none.toml").write_text("templates = 3")
    with pytest.raises(InvalidRecipe, match=r"none\.toml"):
        load_phrasings(tmp_path)
