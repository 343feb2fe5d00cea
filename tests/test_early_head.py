"""The early head in NumPy: parity with PyTorch on random weights, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.nn import functional as F

from loramix.errors import InvalidArtifact
from loramix.models.early_head import EarlyHead, HeadInfo, bucket, expected

SIZES = {"small": (24, 1, 8, [0]), "deep": (96, 3, 32, [4]), "two layers": (48, 2, 16, [0, 4])}


def random_head(
    d: int, depth: int, width: int, layers: list[int], **more: Any
) -> tuple[HeadInfo, dict[str, np.ndarray]]:
    info = HeadInfo(["a", "b", "c"], layers, width, d, depth, tags=["other", "text"], **more)
    rng = np.random.default_rng(d)
    arrays = {}
    for name, shape in expected(info).items():
        values = rng.normal(0, 0.15, shape)
        if name == "std" or (name.startswith(("norm", "0.norm")) and name.endswith("weight")):
            values = 1 + values
        arrays[name] = values.astype(np.float32)
    return info, arrays


def in_torch(
    info: HeadInfo, arrays: dict[str, np.ndarray], states: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same head, written again with PyTorch's own functions in float64."""
    a = {name: torch.from_numpy(array).double() for name, array in arrays.items()}
    x, length, d = torch.from_numpy(states).double(), len(states), info.d

    def linear(y: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(y, a[f"{name}.weight"].T, a[f"{name}.bias"])

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(y, (d,), a[f"{name}.weight"], a[f"{name}.bias"])

    places = torch.from_numpy(bucket(np.arange(length)))
    h = (
        linear(((x - a["mean"]) / a["std"]).clamp(-8, 8), "project")
        + a["start"][places]
        + a["end"][places.flip(0)]
    )
    for i in range(info.depth):
        q, k, v = linear(norm(h, f"{i}.norm1"), f"{i}.qkv").view(length, 3, 4, d // 4).permute(1, 2, 0, 3)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(length, d)
        h = h + linear(mixed, f"{i}.o")
        h = h + linear(F.gelu(linear(norm(h, f"{i}.norm2"), f"{i}.f1"), approximate="tanh"), f"{i}.f2")
    h = norm(h, "norm")
    weight = linear(h, "query").softmax(0)
    pooled = torch.cat([torch.einsum("tq,td->qd", weight, h).flatten(), h[-1], h.mean(0)])
    return linear(pooled, "out"), linear(h, "tag")


@pytest.mark.parametrize("length", [1, 17, 192])
@pytest.mark.parametrize("size", SIZES)
def test_it_computes_what_pytorch_does(size: str, length: int) -> None:
    d, depth, width, layers = SIZES[size]
    info, arrays = random_head(d, depth, width, layers)
    states = np.random.default_rng(length).normal(0, 3, (length, width * len(layers))).astype(np.float32)
    found = EarlyHead(info, arrays)(states)
    logits, tags = in_torch(info, arrays, states)
    assert np.abs(found.logits - logits.numpy()).max() < 1e-4
    assert np.abs(found.tags - tags.numpy()).max() < 1e-4
    assert found.attention.shape == (length,) and abs(found.attention.sum() - 1) < 1e-5
    assert found.pooled.shape == (6 * d,)


def test_its_temperature_changes_probabilities_but_not_the_choice() -> None:
    info, arrays = random_head(*SIZES["small"], temperature=4.0)
    head = EarlyHead(info, arrays)
    logits = np.array([3.0, -1.0, 0.5, 2.0], np.float32)
    assert head.probabilities(logits).argmax() == 0
    assert head.probabilities(logits).max() < np.exp(logits).max() / np.exp(logits).sum()
    assert abs(head.probabilities(logits).sum() - 1) < 1e-6


def test_it_reads_the_first_and_last_tokens_of_a_long_prompt() -> None:
    info, arrays = random_head(*SIZES["small"], first=5, last=3)
    head = EarlyHead(info, arrays)
    assert head.window(range(8)) == list(range(8))
    assert head.window(range(100)) == [0, 1, 2, 3, 4, 97, 98, 99]


def test_distances_are_exact_near_by_and_few_far_away() -> None:
    found = bucket(np.arange(5000))
    assert found[:17].tolist() == list(range(17))
    assert (np.diff(found) >= 0).all() and found.max() == 47 and len(set(found[17:192])) < 16


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    info, arrays = random_head(*SIZES["small"])
    save_file(arrays, tmp_path / "head.safetensors")
    fields = {field: getattr(info, field) for field in HeadInfo.__struct_fields__}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


def test_a_stored_head_is_the_same(stored: Path) -> None:
    info, arrays = random_head(*SIZES["small"])
    states = np.random.default_rng(1).normal(size=(9, 8)).astype(np.float32)
    assert np.array_equal(EarlyHead.load(stored)(states).logits, EarlyHead(info, arrays)(states).logits)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"d": 26}, "impossible sizes"),
        ({"depth": 0}, "impossible sizes"),
        ({"threshold": 1.5}, "threshold"),
        ({"layers": []}, "layers"),
        ({"d": 48}, "'project.weight' is of shape"),
        ({"skills": ["a"]}, "'out.weight' is of shape"),
        ({"unheard": 1}, "unheard"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(stored: Path, change: dict[str, Any], says: str) -> None:
    path = stored / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InvalidArtifact, match=says):
        EarlyHead.load(stored)


@pytest.mark.parametrize("damage", ["cut", "nan", "missing array", "no file"])
def test_damaged_weights_are_refused(stored: Path, damage: str) -> None:
    path = stored / "head.safetensors"
    _, arrays = random_head(*SIZES["small"])
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "no file":
        path.unlink()
    elif damage == "nan":
        arrays["0.o.bias"][3] = np.nan
        save_file(arrays, path)
    else:
        del arrays["end"]
        save_file(arrays, path)
    with pytest.raises(InvalidArtifact, match="again"):
        EarlyHead.load(stored)
