"""``loramix train gate``: a head on the tiny base from two skills' own recipes, written to the pack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

pytest.importorskip("torch")

from loramix.cli import main
from loramix.defaults import BASE
from loramix.models.early_head import EarlyHead
from loramix.pack.pack import Pack
from loramix.train import gate_run
from loramix.train.gate import candidates, default_count, default_layer
from loramix.train.head_fit import FitSettings

pytestmark = pytest.mark.train


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows of the tiny pack's two skills; their recipes ship."""
    directory = tmp_path / "data"
    directory.mkdir()
    for name in ("sentiment", "summarize"):
        rows = [
            {"split": "dev" if i % 4 == 0 else "train", "input": f"{name} {i} was so so", "target": "good"}
            for i in range(40)
        ]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Few passes, and how many prompts each training had."""
    seen: list[int] = []
    real = gate_run.fit

    def quick(data: Any, rows: Any, info: Any, settings: FitSettings, **options: Any) -> Any:
        seen.append(len(rows))
        return real(data, rows, info, gate_run.replace(settings, passes=1.0), **options)

    monkeypatch.setattr(gate_run, "fit", quick)
    return seen


def train_gate(pack: Path, data: Path, out: Path, *options: str) -> Result:
    command = ["train", "gate", str(pack), "--data-dir", str(data), "--out", str(out), "--per-skill", "20"]
    return CliRunner().invoke(main, [*command, *options])


def test_a_gate_is_trained_into_the_pack(pack: Path, data: Path, tmp_path: Path, short: list[int]) -> None:
    people = tmp_path / "people.jsonl"
    lines = [{"text": f"what about {i}?", "template": f"w{i}"} for i in range(30)]
    people.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = train_gate(pack, data, tmp_path / "run", "--none", str(people))
    assert done.exit_code == 0, done.output
    assert "states at the inputs of layers [1]" in done.stderr and "right on unseen wordings" in done.stderr
    changed = Pack.load(pack)
    gate, bank = changed.gate(), changed.gate_bank()
    assert isinstance(gate, EarlyHead) and gate.info.skills == ["sentiment", "summarize"]
    assert gate.info.tags == ["other", "text", "sentiment", "summarize", BASE, "answer"]
    assert bank is not None and bank.classes == ("sentiment", "summarize", BASE)
    assert gate.info.metrics["prompts"] == short[0] == len(bank.codes) > 150
    assert not (tmp_path / "run" / "states").exists(), "states are large"


def test_an_interrupted_training_reads_no_prompt_again(
    pack: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (pack / "gate.npz").read_bytes()

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gate_run, "fit", killed)
        assert train_gate(pack, data, tmp_path / "run").exit_code != 0
    states = sorted((tmp_path / "run" / "states").rglob("*.npz"))
    times = [path.stat().st_mtime_ns for path in states]
    assert states and (pack / "gate.npz").read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr("loramix.train.gate.shutil.rmtree", lambda *_, **__: None)
        assert train_gate(pack, data, tmp_path / "run").exit_code == 0
    assert [path.stat().st_mtime_ns for path in states] == times


def test_a_gate_is_trained_further(pack: Path, data: Path, tmp_path: Path, short: list[int]) -> None:
    refused = train_gate(pack, data, tmp_path / "run", "--continue", "--search")
    assert refused.exit_code == 2 and "--search compares new gates" in refused.stderr
    assert train_gate(pack, data, tmp_path / "run").exit_code == 0
    before = Pack.load(pack).gate()
    done = train_gate(pack, data, tmp_path / "run", "--continue")
    assert done.exit_code == 0, done.output
    after = Pack.load(pack).gate()
    assert isinstance(before, EarlyHead) and isinstance(after, EarlyHead) and len(short) == 2
    for name in ("mean", "std"):
        np.testing.assert_array_equal(before.arrays[name], after.arrays[name])
    moved = np.abs(before.arrays["out.weight"] - after.arrays["out.weight"]).max()
    assert 0 < moved < 0.1, "it begins with the gate, not with random numbers"


def test_another_gate_cannot_be_trained_further(pack: Path, data: Path, tmp_path: Path) -> None:
    gate = (pack / "gate.npz").read_bytes()
    done = train_gate(pack, data, tmp_path / "run", "--continue")
    assert done.exit_code == 2 and "train without --continue" in done.stderr
    assert (pack / "gate.npz").read_bytes() == gate


def test_a_search_compares_layers(
    pack: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramix.train.gate.candidates", lambda _: [(0,), (0, 2)])
    done = train_gate(pack, data, tmp_path / "run", "--search")
    assert done.exit_code == 0, done.output
    rows = [line for line in done.stderr.splitlines() if line.startswith("| 0")]
    assert [row.split("|")[1].strip() for row in rows] == ["0", "0, 2"]
    gate = Pack.load(pack).gate()
    assert isinstance(gate, EarlyHead) and gate.info.layers in ([0], [0, 2])


def test_a_skill_without_training_rows(pack: Path, data: Path, tmp_path: Path) -> None:
    (data / "sentiment.jsonl").write_text('{"split": "test", "input": "a", "target": "good"}\n')
    before = (pack / "gate.npz").read_bytes()
    done = train_gate(pack, data, tmp_path / "run")
    assert (
        done.exit_code == 1 and "no rows of split 'train'" in done.stderr and "Traceback" not in done.output
    )
    assert (pack / "gate.npz").read_bytes() == before


def test_what_is_read_follows_the_base_and_the_pack() -> None:
    assert [default_layer(n) for n in (3, 22, 24, 30)] == [1, 3, 3, 4]
    for depth in (1, 3, 24, 30):
        sets = candidates(depth)
        assert len(set(sets)) == len(sets) and all(len(set(layers)) == len(layers) for layers in sets)
        assert max(max(layers) for layers in sets) <= max(1, depth // 3)
    assert default_count(2) < default_count(6) < default_count(12) == default_count(60) == 700


def test_a_pack_without_skills_has_nothing_to_choose(tiny_base: Path, tmp_path: Path) -> None:
    from loramix.models import bases
    from loramix.pack.edit import new_pack

    pack = new_pack(tmp_path / "empty", str(tiny_base), bases.digest(tiny_base))
    done = train_gate(pack.directory, tmp_path, tmp_path / "run")
    assert done.exit_code == 2 and "'empty' has no skills" in done.stderr and "skill add" in done.stderr
