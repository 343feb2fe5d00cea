"""Labels in pack.toml: what is refused, and what is written."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_labels import SETS, set_labels

from loramix import Engine
from loramix.errors import InvalidArtifact
from loramix.pack.manifest import Manifest, read_manifest, write_manifest
from loramix.runtime.labels import LabelTrie


@pytest.mark.parametrize(
    "change",
    [
        {"labels": ["one"]}, {"labels": ["a", "a"]}, {"labels": ["a", ""]}, {"labels": ["a", " b"]},
        {"labels": ["a", "b\n"]}, {"labels": ["a", "b\x1b[2J"]}, {"labels": ["a", "b" * 201]}, {"labels": ["a", 3]},
        {"labels": [f"l{i}" for i in range(1001)]}, {"labels": "ab"}, {"label_temperature": 0.0},
        {"label_temperature": -1.0}, {"label_temperature": 1e9}, {"label_temperature": "hot"},
        {"label_temperature": math.nan}, {"label_temperature": math.inf},
    ],
)  # fmt: skip
def test_an_unusable_manifest_is_refused(pack: Path, change: dict[str, Any]) -> None:
    entry = msgspec.toml.decode((pack / "pack.toml").read_bytes())
    entry["skills"][0] |= change
    (pack / "pack.toml").write_bytes(msgspec.toml.encode(entry))
    with pytest.raises(InvalidArtifact):
        read_manifest(pack)


def test_labels_stay_in_the_manifest(pack: Path, tmp_path: Path) -> None:
    labelled = set_labels(pack, SETS["shared beginnings"], 2.0)
    text = (labelled / "pack.toml").read_text(encoding="utf-8")
    assert '"fear",' in text and "label_temperature = 2.0" in text
    manifest: Manifest = read_manifest(labelled)
    copied = shutil.copytree(labelled, tmp_path / "copy" / "tiny")
    assert write_manifest(copied, manifest) == manifest == read_manifest(copied)
    write_manifest(copied, read_manifest(set_labels(copied, ())))
    assert "label" not in (copied / "pack.toml").read_text(encoding="utf-8")


def test_labels_of_the_same_tokens_are_refused() -> None:
    with pytest.raises(InvalidArtifact, match="'A' and 'a'"):
        LabelTrie([("A", (1, 2)), ("a", (1, 2))])


def test_a_reload_changes_the_labels(pack: Path) -> None:
    labelled = set_labels(pack, SETS["shared beginnings"], 2.0)
    with Engine.open(labelled, n_ctx=256, n_threads=1) as engine:
        assert engine.generate("x", mix="sentiment").text in SETS["shared beginnings"]
        set_labels(labelled, SETS["two"])
        assert engine.reload() and engine.generate("x", mix="sentiment").text in SETS["two"]
        set_labels(labelled, ())
        assert engine.reload() and engine.generate("x", mix="sentiment", max_tokens=4).labels == {}
