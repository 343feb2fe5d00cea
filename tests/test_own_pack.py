"""Packs that ship are read-only: what changes them goes to a copy or to a new pack, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from loramix import Engine
from loramix.cli import main
from loramix.errors import Busy, InvalidArtifact, UsageError
from loramix.pack.edit import remove_skill
from loramix.pack.own import copy_pack, target_of
from loramix.pack.pack import Pack

NAME = "shipped-pack"


def loramix(*words: Any) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def tree(directory: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(p.relative_to(directory)): (p.read_bytes(), p.stat().st_mode) for p in files}


def skills(pack: str | Path) -> list[str]:
    return [skill.name for skill in Pack.load(pack).skills]


@pytest.fixture
def shipped(tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny pack as one that ships, with a card; afterwards it must be what it was."""
    root = tmp_path / "site-packages" / "packs"
    directory = Path(shutil.copytree(tiny_pack, root / NAME, ignore=shutil.ignore_patterns(".lock")))
    manifest = directory / "pack.toml"
    text = manifest.read_text().replace('name = "tiny"', f'name = "{NAME}"', 1)
    first, found, rest = text.partition('file = "skills/sentiment.gguf"')
    assert found
    manifest.write_text(f'{first}{found}\ncard = "skills/sentiment.md"{rest}')
    (directory / "skills" / "sentiment.md").write_text("# Sentiment\n")
    monkeypatch.setattr("loramix.pack.pack.SHIPPED", root)
    monkeypatch.setenv("LORAMIX_DATA", str(tmp_path / "data"))
    return directory


@pytest.fixture(autouse=True)
def unchanged(request: pytest.FixtureRequest) -> Any:
    """Whatever a test does, the shipped pack stays as it was, to the last bit of a mode."""
    directory = request.getfixturevalue("shipped")
    before = tree(directory)
    yield
    assert tree(directory) == before


@pytest.fixture
def packs(tmp_path: Path) -> Path:
    return tmp_path / "data" / "packs"


def test_changes_of_a_shipped_pack_gather_in_one_copy(shipped: Path, packs: Path) -> None:
    first = loramix("skill", "remove", "sentiment", "--pack", NAME)
    assert first.exit_code == 0, first.output
    assert f"ships with Loramix and stays as it is; this changes a copy of it, my-{NAME}" in first.stderr
    assert f"--pack my-{NAME}" in first.stderr and "removed" in first.stdout
    assert skills(f"my-{NAME}") == ["summarize"]

    adapter = shipped / "skills" / "sentiment.gguf"
    words = ["--description", "x", "--max-tokens", 4]
    second = loramix("pack", "add", NAME, "mood", adapter, *words)
    assert second.exit_code == 0, second.output
    assert f"this changes your copy of it, my-{NAME}" in second.stderr
    third = loramix("pack", "add", packs / f"my-{NAME}", "tone", adapter, *words)
    assert third.exit_code == 0 and not third.stderr, third.output
    assert skills(f"my-{NAME}") == ["summarize", "mood", "tone"]
    assert skills(NAME) == ["sentiment", "summarize"]
    assert loramix("pack", "check", f"my-{NAME}").exit_code == 0


def test_what_is_the_same_is_shared_and_text_is_not(shipped: Path, packs: Path) -> None:
    copy = copy_pack(Pack.load(NAME), packs / "mine").directory
    manifest = Pack.load(copy).manifest
    assert manifest.name == "mine" and manifest.skills == Pack.load(NAME).manifest.skills
    for file in ("skills/sentiment.gguf", "skills/summarize.gguf", "gate.npz"):
        assert (copy / file).samefile(shipped / file), file
    card = copy / "skills" / "sentiment.md"
    with card.open("a") as file:  # as an editor that writes in place
        file.write("mine\n")
    adapter = shipped / "skills" / "summarize.gguf"
    words = ["--description", "x", "--max-tokens", 4, "--replace"]
    done = loramix("pack", "add", copy, "sentiment", adapter, *words)
    assert done.exit_code == 0, done.output
    assert (copy / Pack.load(copy).skill("sentiment").file).read_bytes() == adapter.read_bytes()


def test_where_there_are_no_hard_links_files_are_copied(
    shipped: Path, packs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("loramix.paths.os.link", refuse)
    done = loramix("pack", "copy", NAME, packs / "mine")
    assert done.exit_code == 0, done.output
    copy = packs / "mine" / "skills" / "sentiment.gguf"
    original = shipped / "skills" / "sentiment.gguf"
    assert copy.read_bytes() == original.read_bytes() and not copy.samefile(original)
    assert loramix("pack", "check", "mine").exit_code == 0


@pytest.mark.parametrize("to", ["other", "./here/other"])
def test_a_copy_under_another_name(
    to: str, packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for skill in ("sentiment", "summarize"):
        done = loramix("pack", "remove", NAME, skill, "--to", to)
        assert done.exit_code == 0, done.output
    where = packs / "other" if to == "other" else tmp_path / "here" / "other"
    assert skills(where) == [] and Pack.load(where).name == "other"
    assert not (packs / f"my-{NAME}").exists()


def test_a_pack_of_ones_own_changes_in_place_or_as_a_copy(pack: Path, packs: Path) -> None:
    assert loramix("skill", "remove", "sentiment", "--pack", pack).stderr == ""
    done = loramix("skill", "remove", "summarize", "--pack", pack, "--to", "spare")
    assert done.exit_code == 0, done.output
    assert skills(pack) == ["summarize"] and skills("spare") == []


@pytest.mark.parametrize(
    "to, says",
    [
        (NAME, "ships with Loramix"),
        ("taken", "not a copy of"),
        ("../x/..", "not usable"),
        ("No!", "not usable"),
    ],
)
def test_names_that_a_copy_cannot_have(to: str, says: str, pack: Path, packs: Path) -> None:
    copy_pack(Pack.load(pack), packs / "taken")
    done = loramix("skill", "remove", "sentiment", "--pack", NAME, "--to", to)
    assert done.exit_code == 2 and says in done.stderr, done.output
    assert sorted(path.name for path in packs.iterdir()) == ["taken"]
    assert skills("taken") == ["sentiment", "summarize"]


def test_a_change_that_fails_leaves_no_copy(shipped: Path, packs: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.gguf"
    text.write_text("hello")
    words = ["--description", "x", "--max-tokens", 4]
    adapter = shipped / "skills" / "sentiment.gguf"
    for change in (
        ["skill", "remove", "nosuch", "--pack", NAME],
        ["pack", "add", NAME, "mood", text, *words],
        ["pack", "add", NAME, "sentiment", adapter, *words],  # it is there already
    ):
        assert loramix(*change).exit_code in (1, 2)
        assert not packs.exists() or not list(packs.iterdir()), change


def test_a_file_that_was_changed_is_not_copied(shipped: Path, packs: Path) -> None:
    broken = packs / "broken"
    shutil.copytree(shipped, broken)
    (broken / "gate.npz").write_bytes(b"other")
    with pytest.raises(InvalidArtifact, match="SHA-256"):
        copy_pack(Pack.load(broken), packs / "mine")
    assert not (packs / "mine").exists() and [path.name for path in packs.iterdir()] == ["broken"]


def test_a_copy_that_another_process_makes_meanwhile(packs: Path) -> None:
    target = target_of(NAME)
    with pytest.raises(Busy), target.changing() as directory:
        remove_skill(directory, "sentiment")
        copy_pack(Pack.load(NAME), target.directory)
    assert skills(f"my-{NAME}") == ["sentiment", "summarize"]
    assert [path.name for path in packs.iterdir()] == [f"my-{NAME}"]


def test_a_directory_that_cannot_be_written(pack: Path, packs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    monkeypatch.setattr(
        "loramix.pack.own.os.access", lambda path, mode: Path(path) != pack and access(path, mode)
    )
    before = tree(pack)
    done = loramix("skill", "remove", "sentiment", "--pack", pack)
    assert done.exit_code == 0 and "cannot be written" in done.stderr
    assert skills("my-tiny") == ["summarize"] and tree(pack) == before


def test_packs_that_are_there_take_no_other_base(pack: Path, tmp_path: Path) -> None:
    from tiny import write_base

    other = write_base(tmp_path / "other.gguf", seed=5)
    with pytest.raises(UsageError, match="--base is only for a new pack"):
        target_of(str(pack), base=str(other), make=True)
    assert target_of(str(pack), base=Pack.load(pack).manifest.base.name).directory == pack


ROWS = [
    {"split": "dev" if i % 5 == 0 else "train", "input": f"zzzz {i}", "target": "ZZ" if i % 2 else "YY"}
    for i in range(30)
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "shout.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.train
def test_a_new_pack_finds_its_first_skill_and_its_second(
    data: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr("loramix.train.gate_update.FIRST_PROMPTS", 60)
    monkeypatch.chdir(tmp_path)
    add = ["--data", data, "--pack", "./mypack", "--base", "tiny.gguf"]
    shutil.copy(tiny_base, tmp_path / "tiny.gguf")
    first = loramix("skill", "add", "shout", *add)
    assert first.exit_code == 0, first.output
    assert "creates a new pack, mypack" in first.stderr and "the gate knows it" in first.stdout
    with Engine.open("./mypack", n_ctx=256, n_threads=1) as engine:
        assert engine.route("shout: zzzz 8").mix == {"shout": 1}
        assert engine.route("What is the capital of Portugal?").mix == {}
    asked = tmp_path / "asks.txt"
    asked.write_text("gggg hhhh {input}\nhhhh gggg {input}\nhgh hgh: {input}\n")
    second = loramix("skill", "add", "growl", *add, "--instructions", asked)
    assert second.exit_code == 0, second.output
    assert skills("./mypack") == ["shout", "growl"]
    monkeypatch.chdir(tmp_path.parent)  # the base is found from anywhere
    with Engine.open(tmp_path / "mypack", n_ctx=256, n_threads=1) as engine:
        assert engine.route("gggg hhhh zzzz 2").mix == {"growl": 1}
        assert engine.route("shout: zzzz 8").mix == {"shout": 1}


@pytest.mark.train
def test_a_training_that_fails_leaves_no_pack(
    data: Path, tiny_base: Path, tmp_path: Path, packs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("loramix.train.skill.train_skill", killed)
    made = set(tmp_path.iterdir())
    for where in (["--pack", "./mypack", "--base", tiny_base], ["--pack", NAME]):
        assert loramix("skill", "add", "shout", "--data", data, *where).exit_code == 130
        assert loramix("skill", "add", "Sh out", "--data", data, *where).exit_code == 2
        assert set(tmp_path.iterdir()) == made and not packs.exists()


@pytest.mark.parametrize(
    "where, says",
    [
        ("nosuch", "--pack ./nosuch"),
        ("./full", "is not a pack"),
        ("./Bad Name", "not usable"),
        ("./nogguf", "GGUF"),
    ],
)
def test_places_where_no_pack_can_be_made(
    where: str, says: str, data: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    base = data if where == "./nogguf" else tiny_base
    done = loramix("skill", "add", "shout", "--data", data, "--pack", where, "--base", base)
    assert done.exit_code in (1, 2) and says in done.stderr, done.output
    assert len(done.stderr.strip().splitlines()) == 1
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["letter.txt"]
