"""The calibration error of label skills: by hand, of an evaluation, and in the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from test_eval import DATA
from test_labels import set_labels

from loramix import Engine
from loramix.cli import main
from loramix.eval.answers import AnswerStore, Given
from loramix.eval.calibration import label_calibration
from loramix.train.calibration import adaptive_error, binned
from loramix.train.data import Row


def test_errors_by_hand() -> None:
    confidence = np.asarray([0.95, 0.91, 0.93, 0.55, 0.55, 1.0])
    hit = np.asarray([True, True, False, True, False, True])
    found = binned(confidence, hit, 10)
    assert [b["rows"] for b in found["bins"]] == [2, 4]
    top = abs(0.75 - (0.95 + 0.91 + 0.93 + 1.0) / 4)
    assert found["error"] == pytest.approx((2 * 0.05 + 4 * top) / 6)
    first, second, third = abs(0.5 - 0.55), abs(0.5 - 0.92), abs(1.0 - 0.975)
    assert adaptive_error(confidence, hit, 3) == pytest.approx((first + second + third) / 3)
    assert adaptive_error(confidence[:2], hit[:2], 10) == pytest.approx((0.05 + 0.09) / 2)


def test_well_and_badly_calibrated_answers() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 4000)
    hit = rng.random(4000) < confidence
    assert binned(confidence, hit, 10)["error"] < 0.03 and adaptive_error(confidence, hit, 10) < 0.03
    sure = np.full(4000, 0.99)
    assert binned(sure, hit, 10)["error"] == pytest.approx(0.24, abs=0.03)


def test_answers_without_labels_have_no_calibration() -> None:
    rows = [Row("test", "a", "good", "", ("good",)), Row("test", "b", "bad", "", ("bad",))]
    labels = {"good": 0.8, "bad": 0.2}
    found = label_calibration([Given("good", {}, labels), Given("good", {}, labels)], rows)
    assert found is not None and found["accuracy"] == 0.5 and found["rows"] == 2
    assert found["error"] == pytest.approx(0.3)
    assert label_calibration([Given("good", {}, labels), Given("x", {})], rows) is None
    assert label_calibration([], []) is None


def test_labels_and_temperature_are_part_of_what_gave_an_answer(pack: Path, tmp_path: Path) -> None:
    given = []
    for labels, temperature in (
        ((), None),
        (("good", "bad"), None),
        (("good", "bad"), 3.0),
        (("a", "b"), 3.0),
    ):
        set_labels(pack, labels, temperature)
        with AnswerStore(tmp_path / "a.jsonl") as store, Engine.open(pack, n_ctx=256, n_threads=1) as engine:
            given.append(store.answer(engine, "hello", mix="sentiment", max_tokens=4))
            assert store.answer(engine, "hello", mix="sentiment", max_tokens=4) == given[-1]
    assert given[0].labels is None and given[1].text == given[2].text in ("good", "bad")
    assert given[1].labels != given[2].labels and set(given[3].labels or ()) == {"a", "b"}


def test_an_evaluation_reports_it(tiny_pack: Path, tmp_path: Path) -> None:
    pack = set_labels(Path(shutil.copytree(tiny_pack, tmp_path / "tiny")), ("good", "bad"), 2.0)
    data = tmp_path / "data"
    data.mkdir()
    (data / "sentiment.toml").write_text(DATA.format(name="sentiment"))
    rows: list[dict[str, Any]] = [
        {"split": split, "input": f"{split} {i}", "target": target}
        for split in ("train", "dev", "test")
        for i, target in enumerate(["good", "bad"] * 4)
    ]
    (data / "sentiment.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        "--data-dir",
        str(data),
        "--only",
        "skills",
        "--skill",
        "sentiment",
        "--few",
        "2",
        "--threads",
        "1",
    ]
    done = CliRunner().invoke(main, ["eval", str(pack), *options, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    part = json.loads((tmp_path / "out" / "report.json").read_text())["skills"]["sentiment"]["test"]
    found = part["calibration"]
    assert found["rows"] == 8 and found["accuracy"] == part["pinned"]["accuracy"]["value"]
    with Engine.open(pack, n_ctx=2048, n_threads=1) as engine:
        answers = [
            json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()[1:]
        ]
        assert engine.generate("x", mix="sentiment").text in ("good", "bad")
    sure = [max(row["labels"].values()) for row in answers if row.get("labels")][:8]
    shares = [b["confidence"] * b["rows"] for b in found["bins"]]
    assert sum(shares) == pytest.approx(sum(sure))
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "Calibration of the labels" in text and f"{found['error']:.3f}" in text
