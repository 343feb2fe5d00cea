"""The committed results of the example of styles: figures, weights, pictures, and the gate that routes words."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_readme import ROOT

sys.path.append(str(ROOT))  # `python -m pytest` does it as well

from examples.styles import fonts, mixes, table, words
from loramix.models.early_head import EarlyHead

RESULTS = ROOT / "examples" / "styles" / "results"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "results.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def gate() -> EarlyHead:
    return EarlyHead.from_bytes((RESULTS / "gate.npz").read_bytes())


def tensors(path: Path) -> dict[str, np.ndarray]:
    """The float32 tensors of a safetensors file, by name in alphabetical order."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    about = json.loads(data[8 : 8 + size])
    about.pop("__metadata__", None)
    found = {}
    for name, entry in sorted(about.items()):
        assert entry["dtype"] == "F32"
        first, last = (8 + size + at for at in entry["data_offsets"])
        found[name] = np.frombuffer(data[first:last], np.float32).reshape(entry["shape"])
    return found


def test_the_bars_are_met(results: dict[str, Any]) -> None:
    bars = table.bars(results)
    assert len(bars) == 8
    assert [name for name, *_, met in bars if not met] == []


def test_the_page_is_made_of_the_figures(results: dict[str, Any]) -> None:
    page = (RESULTS / "table.md").read_text(encoding="utf-8")
    assert page == table.table(results)
    assert page.count("LoRA Switch") == page.count("searched scales (") == len(mixes.PAIRS) + 1


def test_the_base_was_frozen_and_is_the_committed_one(results: dict[str, Any]) -> None:
    digest = hashlib.sha256()
    for name, value in tensors(RESULTS / "base.safetensors").items():
        digest.update(name.encode() + value.tobytes())
    assert digest.hexdigest() == results["base_sha256"]
    for adapter in results["adapters"].values():
        assert adapter["base_before"] == adapter["base_after"] == results["base_sha256"]


@pytest.mark.parametrize("style", fonts.STYLES)
def test_an_adapter_fits_the_base(style: str, results: dict[str, Any]) -> None:
    path = RESULTS / "adapters" / f"{style}.safetensors"
    assert path.stat().st_size == results["adapters"][style]["size_bytes"] < 700_000
    base, adapter = tensors(RESULTS / "base.safetensors"), tensors(path)
    down = {name.removesuffix(".lora_A.weight"): a for name, a in adapter.items() if ".lora_A." in name}
    assert 2 * len(down) == len(adapter) and len(down) > 30
    for name, a in down.items():
        b, w = adapter[f"{name}.lora_B.weight"], base[f"{name}.weight"]
        assert (b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)).size == w.size
        assert np.abs(b).max() > 0


def test_the_results_are_whole_and_small() -> None:
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    for name, rows in (("grid.png", 5), ("grids.png", 5), ("sheet.png", 8)):
        data = (RESULTS / name).read_bytes()
        assert data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82")
        assert struct.unpack(">I", data[20:24])[0] >= rows * 64


@pytest.mark.parametrize(
    ("text", "styles", "letter"),
    [
        ("a bold italic R", ("bold", "italic"), "R"),
        ("draw a handwritten 7", ("hand",), "7"),
        ("a plain g", (), "G"),
        ("the letter K, hollow and slanted with serifs", ("italic", "outline", "serif"), "K"),
        ("", (), None),
    ],
)
def test_words_name_styles_and_a_letter(
    text: str, styles: tuple[str, ...], letter: str | None, gate: EarlyHead
) -> None:
    assert words.styles_of(gate, text) == styles and words.letter_of(text) == letter


def test_the_gate_names_all_styles_in_other_wordings(gate: EarlyHead, results: dict[str, Any]) -> None:
    # another CPU may decide a near tie otherwise
    found = words.all_named(gate)
    assert found == pytest.approx(results["gate"]["all_named"], abs=0.01) and found > 0.95
    request = words.requests(words.HELD_OUT_FORMS, 20, 3)
    assert {len(words.named(row)) for row in request} == {0, 1, 2, 3}
    assert not set(words.FORMS) & set(words.HELD_OUT_FORMS)


@pytest.mark.train
def test_a_gate_of_few_requests_fits_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(words, "COUNT", 60)
    small = words.train()
    assert small.info.tags == [*fonts.STYLES, "other"]
    assert EarlyHead.from_bytes(small.to_bytes())(words.states(["bold", "x"])).tags.shape == (2, 7)


@pytest.mark.diffusers
@pytest.mark.parametrize("pair", [("bold", "italic"), ("serif", "outline")])
def test_merged_weights_draw_the_same(pair: tuple[str, str], results: dict[str, Any], tmp_path: Path) -> None:
    from examples.styles.measure import Studio

    studio = Studio(RESULTS, tmp_path, tmp_path)
    weights = results["blends"]["+".join(pair)]["searched"]["weights"]
    assert studio.merged_difference(weights) <= table.BARS["pixel"]
