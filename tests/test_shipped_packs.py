"""The packs of this repository: small enough, whole, with cards; the one on Qwen answers, and comes from a hub."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hub_server import Hub
from margins import Asked, offences
from test_cli import run

from loramix import Engine
from loramix.models.known_bases import BASES
from loramix.pack.pack import Pack
from loramix.train.recipe import load_recipe, shipped

ROOT = Path(__file__).parent.parent
DEFAULT_PACK = ROOT / "loramix" / "packs" / "smollm2-135m"
QWEN_PACK = ROOT / "packs" / "qwen2.5-coder-0.5b"
PACKS = {DEFAULT_PACK: 40e6, QWEN_PACK: 60e6}


def files(directory: Path) -> dict[str, bytes]:
    """Content by name; locks and other hidden files left out."""
    found = [path for path in directory.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in found}


@pytest.mark.parametrize("directory", PACKS, ids=lambda path: path.name)
def test_a_shipped_pack_is_whole_and_small(directory: Path) -> None:
    pack = Pack.load(directory)
    notes = pack.check(None)
    assert notes == []
    assert sum(map(len, files(directory).values())) <= PACKS[directory]
    assert pack.name == directory.name == pack.manifest.base.name
    assert pack.manifest.base.name in BASES
    named = {name for skill in pack.skills for name in (skill.file, skill.card)}
    assert named == {name for name in files(directory) if name.startswith("skills/")}
    assert {skill.name for skill in pack.skills} <= set(shipped())


@pytest.mark.parametrize("directory", PACKS, ids=lambda path: path.name)
def test_a_card_says_how_its_adapter_was_made(directory: Path) -> None:
    for skill in Pack.load(directory).skills:
        recipe = load_recipe(f"broad/{skill.name}")
        assert (skill.description, skill.max_tokens) == (recipe.description, recipe.max_tokens)
        card = (directory / str(skill.card)).read_text(encoding="utf-8")
        said = ["**Data**", recipe.data.license, "NVIDIA H200", "seed 1", "joint.py --base", "**Limits**"]
        said += [f"`broad/{skill.name}`", "activation `always`", f"| {recipe.metrics[0]} |"]
        said += [f"`loramix train skill broad/{skill.name} --base {directory.name} --data DIRECTORY`"]
        assert [words for words in said if words not in card] == []


def test_the_pack_on_qwen_is_pulled_from_a_hub(standin: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 2**20)
    standin.add("me/qwen", **files(QWEN_PACK))
    done = run("pack", "pull", "me/qwen")
    assert done.exit_code == 0, done.output
    pulled = Pack.load(Path(os.environ["LORAMIX_DATA"]) / "packs" / "qwen2.5-coder-0.5b")
    assert pulled.manifest == Pack.load(QWEN_PACK).manifest
    assert files(pulled.directory) == files(QWEN_PACK)


@pytest.mark.base  # of the real cache
@pytest.mark.qwen
def test_the_pack_on_qwen_answers(qwen_base: Path) -> None:
    asked = {
        "spam": (
            "Is this a scam? You have won a gift card worth 500 dollars! Click the link to claim your prize today.",
            "spam",
        ),
        "sql": (
            "Table orders(id, customer, total, city). Write the SQL: the customers from Lyon",
            "SELECT customer FROM orders WHERE city = 'Lyon'",
        ),
        "entities": (
            "Which people, places and organizations are named here? Angela flew from Berlin to Tokyo to meet the "
            "people of Sony.",
            "person: Angela; location: Berlin; location: Tokyo; organization: Sony",
        ),
    }
    with Engine.open(QWEN_PACK, n_ctx=512, n_threads=1) as engine:
        for skill, (prompt, answer) in asked.items():
            assert offences(engine, Asked(skill, prompt)) == []
            found = engine.generate(prompt)
            assert (found.text, found.route.mix) == (answer, {skill: 1.0})
        summary = engine.route("Summarize in one sentence: The factory in Leeds will close in March.")
        assert summary.mix == {"summarize": 1.0}
        nothing = engine.route("Write a poem about the sea at night.")
        assert nothing.mix == {}  # the base answers what the pack has no skill for
