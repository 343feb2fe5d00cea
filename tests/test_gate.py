"""The gate: its maths in NumPy and torch, its file, and what must not be loaded."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from loramix.errors import InvalidArtifact, LoramixError, NativeError, NotFound, SelfCheckFailed
from loramix.models.head_info import MAX_GATE_BYTES
from loramix.models.mixing import top1
from loramix.models.old_gate import GateInfo, NumpyGate


def gate_info(**changes: Any) -> GateInfo:
    """A small gate's metadata: K = 3, one hidden layer, M = 3."""
    values: dict[str, Any] = {
        "skills": ["sentiment", "summarize", "title"],
        "threshold": 0.5,
        "layers": [4],
        "pooling": "mean",
        "base_sha256": "ab" * 32,
        "gate_temperature": 1.5,
        "hidden": [8],
        "members": 3,
        "metrics": {"accuracy": 0.97},
    }
    return GateInfo(**(values | changes))


def gate_arrays(info: GateInfo, n_features: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights, of the size training gives."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for key, shape in info.shapes(n_features).items():
        values = rng.standard_normal(shape)
        arrays[key] = (np.exp(values) if key == "std" else values / shape[-1] ** 0.5).astype(np.float32)
    return arrays


def small_gate(**changes: Any) -> NumpyGate:
    info = gate_info(**changes)
    return NumpyGate(info, gate_arrays(info))


def reference(gate: NumpyGate, row: np.ndarray) -> np.ndarray:
    """The forward of one row and one member at a time, in float64."""
    a = {key: value.astype(np.float64) for key, value in gate.arrays.items()}
    answers = []
    for m in range(gate.info.members):
        h = (row.astype(np.float64) - a["mean"]) / a["std"]
        for i in range(len(gate.info.hidden) + 1):
            if i:
                h = 0.5 * h * (1 + np.tanh((2 / np.pi) ** 0.5 * (h + 0.044715 * h**3)))
            h = h @ a[f"w{i}"][m] + a[f"b{i}"][m]
        odds = np.exp((h - h.max()) / gate.info.gate_temperature)
        answers.append(odds / odds.sum())
    return np.mean(answers, axis=0)


# --- maths -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [{}, {"hidden": []}, {"hidden": [8, 5]}, {"members": 1}, {"skills": []}, {"skills": ["title"]}]
)
def test_forward_is_the_reference(shape: dict[str, Any]) -> None:
    gate = small_gate(**shape)
    features = np.random.default_rng(1).standard_normal((50, 12)).astype(np.float32)
    found = gate.probabilities(features)
    assert found.dtype == np.float32 and found.shape == (50, len(gate.info.skills) + 1)
    np.testing.assert_allclose(found, [reference(gate, row) for row in features], atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)
    for row, expected in zip(features, found, strict=True):
        np.testing.assert_allclose(gate.probabilities(row), expected, atol=1e-6)


def test_without_a_skill_its_share_is_the_bases_and_the_others_stay() -> None:
    gate = small_gate(skills=["a", "b", "c"])
    features = np.random.default_rng(2).standard_normal((50, 12)).astype(np.float32)
    before = gate.probabilities(features)
    once = NumpyGate.from_bytes(gate.without("b").to_bytes())
    assert (once.info.skills, once.info.base_classes) == (["a", "c"], 2)
    np.testing.assert_allclose(once.probabilities(features)[:, :2], before[:, [0, 2]], atol=1e-6)
    np.testing.assert_allclose(once.probabilities(features)[:, 2], before[:, 1] + before[:, 3], atol=1e-6)
    twice = once.without("a")
    np.testing.assert_allclose(twice.probabilities(features)[:, 0], before[:, 2], atol=1e-6)
    assert twice.probabilities(features[0]).shape == (2,)
    assert gate.info.skills == ["a", "b", "c"]


def test_large_features_do_not_overflow() -> None:
    gate = small_gate()
    assert np.isfinite(gate.probabilities(np.full(12, 1e6, np.float32))).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_features_that_are_not_finite_are_refused(value: float) -> None:
    features = np.zeros(12, np.float32)
    features[3] = value
    with pytest.raises(NativeError, match="features"):
        small_gate().probabilities(features)


@pytest.mark.parametrize("shape", [(11,), (2, 13), (), (1, 1, 12)])
def test_features_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        small_gate().probabilities(np.zeros(shape))


def test_a_decision_is_fast() -> None:
    info = gate_info(hidden=[128], layers=[4, 8, 12], skills=[f"s{i}" for i in range(10)])
    gate = NumpyGate(info, gate_arrays(info, 1728))
    rows = np.random.default_rng(2).standard_normal((500, 1728)).astype(np.float32)
    seconds = []
    for row in rows:
        start = time.thread_time()
        top1(gate.probabilities(row), info.skills, info.threshold)
        seconds.append(time.thread_time() - start)
    # the budget is 0.2 ms
    assert np.median(seconds) < 1e-3


def test_numpy_side_never_imports_torch() -> None:
    code = (
        "import sys, loramix.models.old_gate, loramix.models.mixing, loramix.pack.edit, "
        "loramix.convert.gate; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- file ------------------------------------------------------------------------------------------------


def test_file_round_trip_is_bit_equal(tmp_path: Path) -> None:
    gate = small_gate()
    path = tmp_path / "new" / "gate.npz"
    gate.save(path)
    first = path.read_bytes()
    again = NumpyGate.load(path)
    again.save(path)  # over the file it came from
    assert path.read_bytes() == first == small_gate().to_bytes()
    assert again.info == gate.info and again.n_features == 12
    assert all((again.arrays[key] == gate.arrays[key]).all() for key in gate.arrays)
    assert [file.name for file in path.parent.iterdir()] == ["gate.npz"]
    with np.load(path, allow_pickle=False) as plain:  # an ordinary npz for anyone
        assert set(plain.files) == {"info", *gate.arrays}


def test_a_gate_that_cannot_be_loaded_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(InvalidArtifact):
        small_gate(metrics={"accuracy": float("nan")}).save(tmp_path / "gate.npz")
    assert not list(tmp_path.iterdir())


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="loramix train gate"):
        NumpyGate.load(tmp_path / "gate.npz")


def npz(changes: dict[str, Any], *, compress: int = zipfile.ZIP_STORED) -> bytes:
    """A gate file with members replaced: an array, raw bytes, or None to leave it out."""
    gate = small_gate()
    members: dict[str, Any] = {"info": np.frombuffer(gate.info.to_json(), np.uint8), **gate.arrays} | changes
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as archive:
        for key, value in members.items():
            if value is None:
                continue
            if isinstance(value, np.ndarray):
                member = io.BytesIO()
                np.save(member, value)
                value = member.getvalue()
            archive.writestr(f"{key}.npy", value)
    return buffer.getvalue()


def info_with(**changes: Any) -> np.ndarray:
    document = msgspec.to_builtins(gate_info()) | changes
    return np.frombuffer(msgspec.json.encode(document), np.uint8)


def npy_header(text: str, body: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + body


def huge_shape() -> bytes:
    return npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }\n", b"\0" * 64)


def patched_size() -> bytes:
    """A directory that claims 4 GB for one member."""
    data = bytearray(npz({}))
    at = data.rindex(b"PK\1\2")
    data[at + 24 : at + 28] = struct.pack("<I", 0xFFFFFFF0)
    return bytes(data)


def twice() -> bytes:
    buffer = io.BytesIO(npz({}))
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning):
        archive.writestr("b0.npy", b"")
    return buffer.getvalue()


def long_directory() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i in range(2000):
            archive.writestr(f"w{i}.npy", b"")
    return buffer.getvalue()


W0 = gate_arrays(gate_info())["w0"]
MALFORMED: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "not a zip": lambda: b"GGUF" * 100,
    "a bare pickle": lambda: pickle.dumps({"w0": [1.0]}),
    "text before the zip": lambda: b"x" * 7 + npz({})[:-22],
    "trailing bytes": lambda: npz({}) + b"\0",
    "over the cap": lambda: b"\0" * (MAX_GATE_BYTES + 1),
    "compressed": lambda: npz({}, compress=zipfile.ZIP_DEFLATED),
    "zip bomb": lambda: npz({"w0": np.zeros((3, 4_000_000), np.float32)}, compress=zipfile.ZIP_DEFLATED),
    "declared larger than the file": patched_size,
    "a member twice": twice,
    "thousands of members": long_directory,
    "no info": lambda: npz({"info": None}),
    "info of floats": lambda: npz({"info": np.zeros(3, np.float32)}),
    "info is not JSON": lambda: npz({"info": np.frombuffer(b"{", np.uint8)}),
    "info nested deep": lambda: npz({"info": np.frombuffer(b"[" * 50_000, np.uint8)}),
    "info key unknown": lambda: npz({"info": info_with(code="import os")}),
    "info of format 2": lambda: npz({"info": info_with(format=2)}),
    "threshold above 1": lambda: npz({"info": info_with(threshold=1.5)}),
    "threshold null": lambda: npz({"info": info_with(threshold=None)}),
    "temperature 0": lambda: npz({"info": info_with(gate_temperature=0)}),
    "members negative": lambda: npz({"info": info_with(members=-1)}),
    "hidden huge": lambda: npz({"info": info_with(hidden=[10**9])}),
    "sha with a newline": lambda: npz({"info": info_with(base_sha256="ab" * 32 + "\n")}),
    "skill climbs": lambda: npz({"info": info_with(skills=["../x", "b", "c"])}),
    "skill reserved": lambda: npz({"info": info_with(skills=["base", "b", "c"])}),
    "skill twice": lambda: npz({"info": info_with(skills=["a", "a", "c"])}),
    "a skill more than classes": lambda: npz({"info": info_with(skills=["a", "b", "c", "d"])}),
    "missing mean": lambda: npz({"mean": None}),
    "missing weight": lambda: npz({"w1": None}),
    "unknown array": lambda: npz({"extra": np.zeros(3, np.float32)}),
    "a layer too many": lambda: npz(
        {"w2": np.zeros((3, 4, 4), np.float32), "b2": np.zeros((3, 4), np.float32)}
    ),
    "name that climbs": lambda: npz({"../w0": W0}),
    "NaN": lambda: npz({"w0": np.where(W0[0, 0, 0] == W0, np.float32(np.nan), W0)}),
    "infinity": lambda: npz({"b0": np.full((3, 8), np.inf, np.float32)}),
    "std of zero": lambda: npz({"std": np.zeros(12, np.float32)}),
    "std negative": lambda: npz({"std": np.full(12, -1, np.float32)}),
    "mean of no features": lambda: npz({"mean": np.zeros(0, np.float32)}),
    "mean of two axes": lambda: npz({"mean": np.zeros((12, 1), np.float32)}),
    "wrong shape": lambda: npz({"w0": W0[:, :, :7]}),
    "transposed": lambda: npz({"w0": W0.transpose(0, 2, 1)}),
    "Fortran order": lambda: npz({"w0": np.asfortranarray(W0)}),
    "float64": lambda: npz({"w0": W0.astype(np.float64)}),
    "float16": lambda: npz({"w0": W0.astype(np.float16)}),
    "big-endian": lambda: npz({"w0": W0.astype(">f4")}),
    "shape beyond the bytes": lambda: npz({"w0": huge_shape()}),
    "header is code": lambda: npz({"w0": npy_header("__import__('os').getcwd()\n")}),
    "header nested deep": lambda: npz({"w0": npy_header("(" * 60_000 + "\n")}),
    "header cut": lambda: npz({"w0": b"\x93NUMPY\x01"}),
    "member is no array": lambda: npz({"w0": b"hello"}),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_gates_are_refused(case: str) -> None:
    data = MALFORMED[case]()
    start = time.thread_time()
    with pytest.raises(InvalidArtifact, match="loramix train gate"):
        NumpyGate.from_bytes(data)
    assert time.thread_time() - start < 1.0


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    array = np.array([Canary(canary)], dtype=object)
    data = npz({"w0": array})
    (tmp_path / "gate.npz").write_bytes(data)
    with pytest.raises(InvalidArtifact):
        NumpyGate.load(tmp_path / "gate.npz")
    with pytest.raises(InvalidArtifact):
        NumpyGate.from_bytes(pickle.dumps(Canary(canary)))
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))  # noqa: S301 - the canary does sing
    assert canary.exists()


def test_truncated_and_flipped_files_load_or_are_refused() -> None:
    good = npz({})
    for cut in np.linspace(0, len(good) - 1, 64, dtype=int):
        with pytest.raises(InvalidArtifact):
            NumpyGate.from_bytes(good[:cut])
    rng = np.random.default_rng(3)
    for _ in range(2000):
        data = bytearray(good)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        with contextlib.suppress(LoramixError):
            NumpyGate.from_bytes(bytes(data))


@pytest.mark.parametrize(
    ("key", "value"),
    [("w0", None), ("w0", W0.astype(np.float64)), ("w9", W0), ("b0", np.full((3, 8), np.nan, np.float32))],
)
def test_arrays_are_checked_without_a_file_too(key: str, value: Any) -> None:
    arrays = gate_arrays(gate_info()) | {key: value}
    with pytest.raises(InvalidArtifact):
        NumpyGate(gate_info(), {k: v for k, v in arrays.items() if v is not None})


# --- torch -----------------------------------------------------------------------------------------------


@pytest.fixture
def torch_gate() -> Any:
    torch = pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    from loramix.models.old_gate_torch import Gate

    arrays = gate_arrays(gate_info(), 40)
    gate = Gate(
        gate_info(hidden=[32]), torch.from_numpy(arrays["mean"]), torch.from_numpy(arrays["std"]), seed=1
    )
    with torch.no_grad():  # as decided as a trained gate
        gate.w1.mul_(8)
    return gate


@pytest.mark.train
def test_torch_and_numpy_agree(torch_gate: Any, tmp_path: Path) -> None:
    import torch

    from loramix.convert.gate import convert_gate

    torch_gate.save(tmp_path)
    assert convert_gate(tmp_path, tmp_path / "gate.npz") <= 1e-5
    gate = NumpyGate.load(tmp_path / "gate.npz")
    rows = np.random.default_rng(4).standard_normal((1000, 40)).astype(np.float32)
    with torch.no_grad():
        logits = torch_gate(torch.from_numpy(rows))
        expected = torch_gate.probabilities(torch.from_numpy(rows)).numpy()
    assert logits.shape == (1000, 3, 4)
    found = gate.probabilities(rows)
    assert np.abs(found - expected).max() <= 1e-5
    order = np.argsort(-expected, axis=1, kind="stable")
    assert (order == np.argsort(-found, axis=1, kind="stable")).all()
    assert len(set(order[:, 0])) > 1


@pytest.mark.train
def test_torch_gate_saves_and_loads(torch_gate: Any, tmp_path: Path) -> None:
    import torch

    from loramix.models.old_gate_torch import Gate

    torch_gate.calibrate(gate_temperature=0.7, threshold=0.4, metrics={"ece": 0.02})
    torch_gate.save(tmp_path)
    again = Gate.load(tmp_path)
    assert again.info == torch_gate.info and again.info.threshold == 0.4
    rows = torch.randn(20, 40)
    assert (again.probabilities(rows) == torch_gate.probabilities(rows)).all()
    assert len({tuple(member.flatten().tolist()) for member in torch_gate.w0}) == 3  # members differ
    assert {file.name for file in tmp_path.iterdir()} == {"gate.json", "gate.safetensors"}


@pytest.mark.train
def test_torch_gate_trains_in_few_steps(torch_gate: Any) -> None:
    import torch

    rows, labels = torch.randn(64, 40), torch.arange(64) % 4
    optimizer = torch.optim.AdamW(torch_gate.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        logits = torch_gate(rows)  # (B, M, K+1)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.train
@pytest.mark.parametrize(
    "damage", ["no json", "no tensors", "cut tensors", "other widths", "a pickle", "unknown key", "NaN"]
)
def test_damaged_torch_gates_are_refused(torch_gate: Any, tmp_path: Path, damage: str) -> None:
    import torch

    from loramix.convert.gate import convert_gate

    torch_gate.save(tmp_path)
    document, tensors = tmp_path / "gate.json", tmp_path / "gate.safetensors"
    expected: type[LoramixError] = InvalidArtifact
    if damage == "no json":
        document.unlink()
        expected = NotFound
    elif damage == "no tensors":
        tensors.unlink()
        expected = NotFound
    elif damage == "cut tensors":
        tensors.write_bytes(tensors.read_bytes()[:-8])
    elif damage == "other widths":
        document.write_bytes(msgspec.json.encode(gate_info(hidden=[31])))
    elif damage == "a pickle":
        tensors.write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
    elif damage == "unknown key":
        document.write_text(document.read_text().replace('"format"', '"fromat"'))
    else:
        from safetensors.torch import load, save

        weights = load(tensors.read_bytes())
        weights["w0"][0, 0, 0] = torch.nan
        tensors.write_bytes(save(weights))
    with pytest.raises(expected):
        convert_gate(tmp_path, tmp_path / "gate.npz")
    assert not (tmp_path / "gate.npz").exists() and not (tmp_path / "ran").exists()


@pytest.mark.train
def test_a_gate_that_decides_otherwise_is_not_written(
    torch_gate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loramix.convert.gate import convert_gate

    torch_gate.save(tmp_path)
    # another approximation of GELU: a mistake of some 1e-2
    monkeypatch.setattr(
        "loramix.models.old_gate_torch.F.gelu", lambda x, approximate: x * (1.702 * x).sigmoid()
    )
    with pytest.raises(SelfCheckFailed, match="nothing was written"):
        convert_gate(tmp_path, tmp_path / "gate.npz")
    assert not (tmp_path / "gate.npz").exists()


@pytest.mark.train
def test_unsaveable_torch_gate_keeps_the_old_files(torch_gate: Any, tmp_path: Path) -> None:
    import torch

    torch_gate.save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with torch.no_grad():
        torch_gate.b0.fill_(torch.inf)
    with pytest.raises(InvalidArtifact):
        torch_gate.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
