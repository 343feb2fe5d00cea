"""gate.npz of both formats: what is read, what is refused, and what a pack does with it."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from test_early_head import SIZES, random_head
from tiny import random_gate
from tiny import random_head as tiny_head

from loramix.cli import main
from loramix.errors import InvalidArtifact, WrongBase
from loramix.formats.npz import npz_bytes
from loramix.models.early_head import EarlyHead, HeadInfo
from loramix.models.gate_file import read_gate
from loramix.models.head_info import MAX_GATE_BYTES
from loramix.models.old_gate import NumpyGate
from loramix.pack.edit import remove_skill, set_gate
from loramix.pack.pack import Pack

SHA = "ab" * 32
INFO, ARRAYS = random_head(*SIZES["small"], base_sha256=SHA)
STATES = np.random.default_rng(1).normal(size=(9, 8)).astype(np.float32)


def file_with(changes: dict[str, Any] | None = None, **info: Any) -> bytes:
    """A gate file with arrays replaced (None: left out) and fields of its info replaced."""
    document = json.loads(INFO.to_json()) | info
    arrays: dict[str, Any] = {"info": np.frombuffer(json.dumps(document).encode(), np.uint8), **ARRAYS}
    arrays |= changes or {}
    return npz_bytes({key: array for key, array in arrays.items() if array is not None})


def test_a_stored_head_is_the_same() -> None:
    head = EarlyHead(INFO, ARRAYS)
    read = read_gate(head.to_bytes(), "gate.npz")
    assert isinstance(read, EarlyHead) and read.info == head.info
    assert np.array_equal(read(STATES).logits, head(STATES).logits)
    assert read.to_bytes() == head.to_bytes()


def test_the_old_format_is_read_as_well() -> None:
    assert isinstance(read_gate(random_gate(["a", "b"], SHA), "gate.npz"), NumpyGate)


def test_a_removed_skill_becomes_the_base() -> None:
    head = EarlyHead(INFO, ARRAYS)
    once = read_gate(head.without("b").to_bytes(), "gate.npz")
    assert isinstance(once, EarlyHead) and once.info.skills == ["a", "c"] and once.info.base_classes == 2
    before = head.probabilities(head(STATES).logits)
    after = once.probabilities(once(STATES).logits)
    np.testing.assert_allclose(after, [before[0], before[2], before[1] + before[3]], rtol=1e-5)
    assert once.without("c").without("a").probabilities(once(STATES).logits).sum() == pytest.approx(1)


WIDE = {"d": 1000, "depth": 12, "heads": 4}
MALFORMED: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "cut": lambda: file_with()[:-7],
    "trailing bytes": lambda: file_with() + b"x",
    "too large": lambda: b"\0" * (MAX_GATE_BYTES + 1),
    "safetensors instead": lambda: b"\x10\0\0\0\0\0\0\0" + b"{}" * 40,
    "no info": lambda: file_with({"info": None}),
    "info of floats": lambda: file_with({"info": np.zeros(4, np.float32)}),
    "info no JSON": lambda: file_with({"info": np.frombuffer(b"{", np.uint8)}),
    "info nested deep": lambda: file_with({"info": np.frombuffer(b"[" * 50_000, np.uint8)}),
    "format 3": lambda: file_with(format=3),
    "format a text": lambda: file_with(format="2"),
    "unknown key": lambda: file_with(code="import os"),
    "heads do not divide": lambda: file_with(heads=5),
    "depth 0": lambda: file_with(depth=0),
    "d huge": lambda: file_with(d=10**9),
    "all sizes large": lambda: file_with(width=65536, **WIDE),
    "threshold above 1": lambda: file_with(threshold=1.5),
    "threshold null": lambda: file_with(threshold=None),
    "temperature 0": lambda: file_with(temperature=0),
    "no layer": lambda: file_with(layers=[]),
    "a layer twice": lambda: file_with(layers=[1, 1]),
    "layer below 0": lambda: file_with(layers=[-1]),
    "reads nothing": lambda: file_with(first=0),
    "reads very much": lambda: file_with(last=10**6),
    "skill climbs": lambda: file_with(skills=["../x", "b", "c"]),
    "skill reserved": lambda: file_with(skills=["base", "b", "c"]),
    "skill twice": lambda: file_with(skills=["a", "a", "c"]),
    "a skill too many": lambda: file_with(skills=["a", "b", "c", "d"]),
    "tags without arrays": lambda: file_with(tags=["other", "text", "more"]),
    "sha with a newline": lambda: file_with(base_sha256=SHA + "\n"),
    "missing array": lambda: file_with({"end": None}),
    "unknown array": lambda: file_with({"more": np.zeros(3, np.float32)}),
    "wrong shape": lambda: file_with({"out.bias": np.zeros(5, np.float32)}),
    "bytes for floats": lambda: file_with({"out.bias": np.zeros(4, np.uint8)}),
    "float64": lambda: file_with({"out.bias": np.zeros(4)}),
    "NaN": lambda: file_with({"0.o.bias": np.full(24, np.nan, np.float32)}),
    "infinity": lambda: file_with({"query.weight": np.full((24, 4), np.inf, np.float32)}),
    "std of zero": lambda: file_with({"std": np.zeros(8, np.float32)}),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_gates_are_refused(case: str) -> None:
    with pytest.raises(InvalidArtifact, match="loramix train gate") as caught:
        read_gate(MALFORMED[case](), "gate.npz")
    assert str(caught.value).count("\n") == 0


def test_compressed_gates_are_refused() -> None:
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(file_with())) as source,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for member in source.namelist():
            out.writestr(member, source.read(member))
    with pytest.raises(InvalidArtifact, match="compressed"):
        read_gate(buffer.getvalue(), "gate.npz")


def test_huge_numbers_are_an_error_when_it_decides() -> None:
    """They are finite in the file, so only the result shows them."""
    huge = {**ARRAYS, "out.weight": np.full((144, 4), 3e38, np.float32)}
    head = EarlyHead(INFO, huge, "gate.npz")
    with pytest.raises(InvalidArtifact, match="not finite"):
        head.probabilities(head(STATES).logits)


def test_an_info_that_would_not_be_read_is_not_written() -> None:
    with pytest.raises(InvalidArtifact, match="loramix train gate"):
        HeadInfo(["a"], [1], 8, 8, 1, metrics={"loss": float("nan")}).to_json()


@pytest.fixture
def head_pack(pack: Path) -> Path:
    digest = Pack.load(pack).manifest.base.sha256
    set_gate(pack, tiny_head(["sentiment", "summarize"], digest))
    return pack


def test_a_pack_holds_and_checks_it(head_pack: Path) -> None:
    loaded = Pack.load(head_pack)
    assert isinstance(loaded.gate(), EarlyHead) and loaded.check() == []
    done = CliRunner().invoke(main, ["pack", "check", str(head_pack)])
    assert done.exit_code == 0, done.output
    change = remove_skill(head_pack, "sentiment")
    gate = change.pack.gate()
    assert isinstance(gate, EarlyHead) and gate.info.skills == ["summarize"]


def test_the_check_says_how_to_replace_an_old_gate(pack: Path) -> None:
    set_gate(pack, random_gate(["sentiment", "summarize"], Pack.load(pack).manifest.base.sha256))
    (note,) = Pack.load(pack).check()
    assert "loramix train gate tiny" in note
    done = CliRunner().invoke(main, ["pack", "check", str(pack)])
    assert done.exit_code == 0 and "loramix train gate tiny" in done.output


@pytest.mark.parametrize(
    ("skills", "sha", "error"),
    [
        (["summarize", "sentiment"], None, InvalidArtifact),
        (["sentiment"], None, InvalidArtifact),
        (["sentiment", "summarize"], "0" * 64, WrongBase),
        (["sentiment", "summarize"], "", WrongBase),
    ],
)
def test_a_gate_of_another_pack_is_refused(
    pack: Path, skills: list[str], sha: str | None, error: type[InvalidArtifact]
) -> None:
    own = Pack.load(pack).manifest.base.sha256
    with pytest.raises(error, match="loramix train gate"):
        set_gate(pack, tiny_head(skills, own if sha is None else sha))


def test_a_changed_file_is_refused_by_its_digest(head_pack: Path) -> None:
    path = Pack.load(head_pack).gate_path
    assert path is not None
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InvalidArtifact, match="SHA-256"):
        Pack.load(head_pack).gate()
