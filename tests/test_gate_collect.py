"""Requests of files and made ones together: what training sees, and what it must not see."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from loramix.defaults import BASE
from loramix.errors import InvalidData, NotFound
from loramix.train.data import Row
from loramix.train.gate_collect import collect_from, collect_requests, read_requests, requests_of_people
from loramix.train.gate_requests import Maker
from loramix.train.gate_wordings import is_dev, load_wordings
from loramix.train.recipe import load_recipe

SKILLS = ["sentiment", "summarize", "sql"]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(split: str) -> dict[str, list[Row]]:
    return {name: [Row(split, f"{name} {split} text {i}.", "t") for i in range(20)] for name in SKILLS}


def maker(*, dev: bool = False) -> Maker:
    return Maker({name: load_recipe(name) for name in SKILLS}, rows_of("train"), dev=dev)


@pytest.fixture
def people(tmp_path: Path) -> Path:
    rows = [
        {"text": f"request {i} of wording {i // 3}", "template": f"w{i // 3}", "skill": skill}
        for i, skill in enumerate(["sentiment", "none", "juggle"] * 60)
    ]
    return written(tmp_path / "people.jsonl", rows)


def test_a_line_says_who_serves_it(tmp_path: Path) -> None:
    path = written(
        tmp_path / "r.jsonl",
        [
            {"text": "a"},
            {"text": "b", "skill": "sql", "split": "train", "template": "t"},
            {"instruction": "c", "instances": [{"input": "d"}, {"input": "e"}]},
            {"instruction": "f", "instances": [{"input": ""}]},
        ],
    )
    assert read_requests(path) == [
        ("", BASE, "a", "a"),
        ("train", "sql", "b", "t"),
        ("", BASE, "c\nd", "c\nd"),
        ("", BASE, "f", "f"),
    ]


def test_wordings_fall_whole_into_one_part(people: Path) -> None:
    seen, held = requests_of_people(maker(), people), requests_of_people(maker(dev=True), people)
    assert seen and held and len(seen) > 3 * len(held)
    assert not {r.group for r in seen} & {r.group for r in held}
    assert len(seen) + len(held) == 120, "a request for a skill that is not known is no request for none"
    assert Counter(next(iter(r.target)) for r in seen + held) == {"sentiment": 60, BASE: 60}


def test_a_file_s_own_splits_count(tmp_path: Path) -> None:
    rows = [{"text": f"{split} {i}", "split": split} for split in ("train", "val", "test") for i in range(30)]
    path = written(tmp_path / "c.jsonl", rows)
    seen = " ".join(r.text for r in requests_of_people(maker(), path)).casefold()
    assert len(requests_of_people(maker(), path)) == 30 and "train" in seen and "val " not in seen
    assert {r.text.split()[0] for r in requests_of_people(maker(dev=True), path)} == {"val"}


@pytest.mark.parametrize(
    "line",
    ['{"text": ""}', "[1]", "{", '{"text": 3}', '{"text": "a", "skill": 4}', '{"skill": "sql"}', '"text"'],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InvalidData, match="line 2"):
        read_requests(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="give one with --none"):
        read_requests(tmp_path / "none.jsonl")


def test_training_and_dev_share_no_request(people: Path) -> None:
    recipes = {name: load_recipe(name) for name in SKILLS}
    seen = collect_requests(recipes, rows_of("train"), [people], per_skill=30)
    held = collect_requests(recipes, rows_of("dev"), [people], per_skill=30, dev=True)
    single = [{r.text for r in part if len(r.turns) == 1} for part in (seen, held)]
    assert all(single) and not single[0] & single[1]
    wanted = Counter(name for request in seen for name in request.target)
    assert set(wanted) == {*SKILLS, BASE} and min(wanted.values()) > 30
    kinds = {request.kind.split()[0] for request in seen}
    assert {"turns", "none", "embedded", "composed", "bare", "alone", "people's", "messages"} <= kinds
    typed = load_wordings().messages
    for part, dev in ((seen, False), (held, True)):
        for name in typed.keys() & set(SKILLS):
            of_skill = {r.group for r in part if r.kind == "messages" and r.target == {name: 1.0}}
            assert of_skill == {text for text in typed[name] if is_dev(text) == dev}


def test_a_directory_of_data_is_enough(tmp_path: Path) -> None:
    for name in SKILLS:
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            for split, found in (("train", rows_of("train")), ("dev", rows_of("dev"))):
                for row in found[name]:
                    file.write(json.dumps({"split": split, "input": row.input, "target": row.target}) + "\n")
    held = collect_from(SKILLS, tmp_path, [], per_skill=5, dev=True)
    assert held and not any("train text" in turn.text for request in held for turn in request.turns)
    with pytest.raises(NotFound, match="entities"):
        collect_from([*SKILLS, "entities"], tmp_path, [], per_skill=5)


def test_broad_sources_serve_where_a_skill_has_no_file_of_its_own(tmp_path: Path) -> None:
    for name in ("skills/intent", "sentiment"):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        target = "card arrival" if "intent" in name else "positive"
        lines = [
            {"split": split, "input": f"{name} {split} {i}", "target": target, "source": f"library {i}"}
            for split in ("train", "dev")
            for i in range(60)
        ]
        written(path, lines)
    for dev, split in ((False, "train"), (True, "dev")):
        found = collect_from(["sentiment", "intent"], tmp_path, [], per_skill=5, dev=dev)
        texts = " ".join(turn.text for request in found for turn in request.turns)
        assert f"skills/intent {split}" in texts and f"sentiment {split}" in texts
    with pytest.raises(NotFound, match=r"skills/slots|slots\.jsonl"):
        collect_from(["slots"], tmp_path, [], per_skill=5)
