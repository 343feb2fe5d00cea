"""Adding, importing and removing a skill: the gate follows from the feature bank, and the pack changes at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny import write_peft

pytest.importorskip("torch")

from loramix import Engine
from loramix.cli import main
from loramix.errors import InvalidArtifact, InvalidData
from loramix.formats.validate import read_base
from loramix.models import bases
from loramix.models.gate_bank import Bank, Projection
from loramix.pack.edit import set_gate
from loramix.pack.pack import Pack
from loramix.train.data import Row
from loramix.train.default_recipe import recipe_of_data
from loramix.train.gate_data import BASE
from loramix.train.gate_pieces import Piece, Request, user
from loramix.train.gate_run import Run, drained
from loramix.train.gate_update import requests_for
from loramix.train.head_fit import FitSettings

pytestmark = pytest.mark.train
WORDS = {"sentiment": "aaaa bbbb", "summarize": "cccc dddd", BASE: "eeee ffff"}


@pytest.fixture(scope="module")
def banked(tiny_pack: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pack with a gate that was trained, on three kinds of prompts, and its bank."""
    directory = Path(shutil.copytree(tiny_pack, tmp_path_factory.mktemp("banked") / "tiny"))
    requests = [
        Request((user(Piece(f"{words} {i} {i * 7}", name)),), {name: 1.0}, f"{name} {i % 10}", "test")
        for i in range(72)
        for name, words in WORDS.items()
    ]
    settings = FitSettings(passes=12, batch=16, rate=2e-3, none_weight=1.0)
    shape, digest = read_base(tiny_base)[1], bases.digest(tiny_base)
    run = Run(tiny_base, shape, ["sentiment", "summarize"], digest, tmp_path_factory.mktemp("gate"), settings)
    said: list[str] = []
    data = drained(run.read(requests[:180], requests[180:], [1]), said.append)
    gate, scores = drained(run.gate(data, [1]), said.append)
    assert scores.accuracy > 0.9 and any("NumPy within" in line for line in said)
    set_gate(directory, gate.gate, gate.features)
    return directory


@pytest.fixture
def pack(banked: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(banked, tmp_path / "tiny"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "shout.jsonl"
    rows = [
        {"split": "dev" if i % 5 == 0 else "train", "input": f"zzzz {i}", "target": "ZZ" if i % 2 else "YY"}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def skill(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["skill", *map(str, arguments)])


def snapshot(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def routes(pack: Path) -> dict[str, dict[str, float]]:
    with Engine.open(pack, n_ctx=256, n_threads=1) as engine:
        return {name: engine.route(f"{words} 3 1").mix for name, words in WORDS.items()}


def test_a_skill_comes_and_goes(pack: Path, data: Path, tmp_path: Path) -> None:
    before = routes(pack)
    assert before == {"sentiment": {"sentiment": 1}, "summarize": {"summarize": 1}, BASE: {}}
    asked = tmp_path / "ask.txt"
    asked.write_text("gggg hhhh {input}\n\nhhhh gggg\nhgh hgh: {input}\n")
    arguments = ["--data", data, "--instructions", asked, "--pack", pack, "--out", tmp_path / "run"]
    done = skill("add", "shout", *arguments)
    assert done.exit_code == 0, done.output
    assert "the gate knows it" in done.stdout and "changes the base's logits" in done.stderr
    with Engine.open(pack, n_ctx=256, n_threads=1) as engine:
        assert engine.route("gggg hhhh zzzz 2").mix == {"shout": 1}
        answer = engine.generate("gggg hhhh zzzz 2", max_tokens=2)
        assert answer.route.mix == {"shout": 1}
        assert answer.text in ("YY", "ZZ") and set(answer.labels) == {"YY", "ZZ"}
    assert routes(pack) == before
    assert "ZZ" in (pack / "skills" / "shout.md").read_text()
    again = skill("add", "shout", *arguments)
    assert again.exit_code == 2 and "already has a skill shout" in again.stderr

    gone = skill("remove", "shout", "--pack", pack)
    assert gone.exit_code == 0, gone.output
    assert [entry.name for entry in Pack.load(pack).skills] == ["sentiment", "summarize"]
    assert routes(pack) == before
    with Engine.open(pack, n_ctx=256, n_threads=1) as engine:
        assert engine.route("gggg hhhh zzzz 2").mix == {}  # what was its own is for none now


@pytest.mark.parametrize("kind", ["peft", "gguf"])
def test_somebodys_adapter(kind: str, pack: Path, data: Path, tiny_base: Path, tmp_path: Path) -> None:
    adapter = write_peft(tmp_path / "theirs", seed=11, r=3)
    if kind == "gguf":
        target = tmp_path / "theirs.gguf"
        command = [
            "convert",
            "adapter",
            str(adapter),
            "-o",
            str(target),
            "--base",
            str(tiny_base),
            "--no-check",
        ]
        assert CliRunner().invoke(main, command).exit_code == 0
        adapter = target
    examples = tmp_path / "examples.jsonl"
    examples.write_text('{"input": "zzzz 1", "target": "a"}\n{"input": "zzzz 2", "target": "b"}\n')
    done = skill(
        "import", "theirs", adapter, "--examples", examples, "--pack", pack, "--out", tmp_path / "run"
    )
    assert done.exit_code == 0, done.output
    with Engine.open(pack, n_ctx=256, n_threads=1) as engine:
        assert engine.route("Task: theirs\nInput: zzzz 2\nOutput:").mix == {"theirs": 1}
        assert engine.generate("x", mix="theirs", max_tokens=4).tokens


def test_what_cannot_be_imported_changes_nothing(pack: Path, data: Path, tmp_path: Path) -> None:
    before = snapshot(pack)
    wide = tmp_path / "wide"
    shutil.copytree(write_peft(tmp_path / "good", seed=2), wide)
    config = json.loads((wide / "adapter_config.json").read_text())
    (wide / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    text = tmp_path / "a.gguf"
    text.write_text("hello")
    cases = {
        "DoRA": ["import", "x", wide, "--examples", data],
        "not a GGUF": ["import", "x", text, "--examples", data],
        "no adapter": ["import", "x", tmp_path / "none", "--examples", data],
        "a reserved word": ["import", "base", wide, "--examples", data],
        "no data file": ["add", "x", "--data", tmp_path / "none.jsonl"],
    }
    for says, arguments in cases.items():
        done = skill(*arguments, "--pack", pack, "--out", tmp_path / "run")
        assert done.exit_code in (1, 2) and says in done.stderr, (says, done.output)
        assert "Traceback" not in done.output
    assert skill("remove", "nosuch", "--pack", pack).exit_code == 2
    assert snapshot(pack) == before


def test_killed_while_training_the_pack_stays_and_the_run_goes_on(
    pack: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(pack)
    arguments = ["add", "shout", "--data", data, "--pack", pack, "--out", tmp_path / "run"]

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("loramix.train.gate_update.extend", killed)
        assert skill(*arguments).exit_code != 0
    assert snapshot(pack) == before
    done = skill(*arguments)
    assert done.exit_code == 0, done.output
    assert [entry.name for entry in Pack.load(pack).skills] == ["sentiment", "summarize", "shout"]


def test_recipes_for_data_alone(tmp_path: Path) -> None:
    labels = [Row("train", f"t{i}", "up" if i % 2 else "down") for i in range(20)]
    recipe = recipe_of_data("which-way", labels, None, "smollm2-135m")
    assert recipe.labels == ["down", "up"] and recipe.metrics == ["accuracy"]
    assert all(text.count("{input}") == 1 for text in recipe.instructions["any"])
    assert any("which way" in text for text in recipe.instructions["any"])
    free = recipe_of_data("echo", [Row("train", f"t{i}", f"answer {i}") for i in range(20)], None, "x")
    assert free.labels == [] and free.metrics == ["rouge_l"]
    empty = tmp_path / "ask.txt"
    empty.write_text("\n")
    with pytest.raises(InvalidData):
        recipe_of_data("echo", labels, empty, "x")


def test_a_skill_is_trained_as_its_packs_base_needs() -> None:
    rows = [Row("train", f"t{i}", f"answer {i}") for i in range(20)]
    for name in ("spam", "echo"):
        own, large = (
            recipe_of_data(name, rows, None, base) for base in ("smollm2-135m", "tinyllama-1.1b:Q4_0")
        )
        assert large.training.learning_rate < own.training.learning_rate
        assert (large.lora.r, large.instructions) == (8, own.instructions)


def test_requests_for_a_new_skill() -> None:
    rows = [Row("train", f"text {i}", f"answer {i}") for i in range(30)]
    recipe = recipe_of_data("echo", rows, None, "smollm2-135m")
    found = requests_for(recipe, rows, ["sentiment", "sql", "unknown"])
    kinds = {name: sum(r.target.get(name, 0) for r in found) for name in ("echo", BASE, "sentiment")}
    assert kinds["echo"] > kinds[BASE] > 20 and kinds["sentiment"] > 10
    assert not any("sql" in r.target or "unknown" in r.target for r in found), "sql fits no other text"
    assert any(len(r.turns) > 1 for r in found), "follow-ups belong to it"
    assert found == requests_for(recipe, rows, ["sentiment", "sql", "unknown"])
    assert found != requests_for(recipe, rows, ["sentiment", "sql", "unknown"], seed=1)


def test_a_bank_survives_its_file() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, 20)).astype(np.float32) * np.arange(1, 21, dtype=np.float32)
    targets = np.eye(3, dtype=np.float32)[rng.integers(0, 3, 50)]
    bank = Bank.of(features, targets, np.arange(50, dtype=np.int32), ["a", "b", "base"])
    read = Bank.from_bytes(bank.to_bytes())
    assert read.classes == bank.classes and (read.codes == bank.codes).all()
    assert read.components == pytest.approx(bank.components) and read.targets == pytest.approx(targets)
    exact = Projection.of(features).apply(features)
    weight = rng.normal(size=(20, 3)).astype(np.float32)
    narrow = Projection.of(features, 8, keep=weight)
    back = narrow.apply(features) @ narrow.matrix.T * narrow.std + narrow.mean
    assert narrow.matrix.shape == (20, 8)
    np.testing.assert_allclose(back @ weight, features @ weight, atol=0.02 * np.abs(features @ weight).max())
    assert np.abs(read.components - exact).max() < 0.02 * np.abs(exact).max()
    standard = features / features.std(0)
    distances = [np.linalg.norm(x[:, None] - x, axis=-1) for x in (exact, standard)]
    assert distances[0] == pytest.approx(distances[1], rel=1e-2)  # a rotation


def test_a_bank_without_a_skill() -> None:
    targets = np.asarray([[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0], [0, 0, 1]], np.float32)
    features = np.eye(4, 6, dtype=np.float32)
    bank = Bank.of(features, targets, np.arange(4, dtype=np.int32), ["a", "b", "base"])
    left = bank.without("a")
    assert left.classes == ("b", "base")
    assert left.targets.tolist() == [[0, 1], [1, 0], [1, 0], [0, 1]]
    longer = left.extended(features[:1], np.asarray([[0, 1, 0]]), np.zeros(1, np.int32), ["b", "c", "base"])
    assert longer.targets.tolist() == [[0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert longer.groups.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("damage", ["cut", "zip", "nan", "shape", "object"])
def test_banks_that_cannot_be_used(damage: str) -> None:
    import io

    targets = np.eye(2, dtype=np.float32)
    bank = Bank.of(np.eye(2, 5, dtype=np.float32), targets, np.zeros(2, np.int32), ["a", "base"])
    data = bank.to_bytes()
    with np.load(io.BytesIO(data)) as archive:
        arrays: dict[str, Any] = dict(archive)
    if damage in ("nan", "shape", "object"):
        arrays["scale"] = {
            "nan": np.full(2, np.nan, np.float32),
            "shape": np.ones(3, np.float32),
            "object": np.asarray([{}, {}], object),
        }[damage]
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        data = buffer.getvalue()
    else:
        data = data[:-30] if damage == "cut" else b"PK" + data[5:]
    with pytest.raises(InvalidArtifact):
        Bank.from_bytes(data)
