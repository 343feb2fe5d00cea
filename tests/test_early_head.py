"""The early head in NumPy: parity with PyTorch on random weights, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from loramix.models.early_head import EarlyHead, HeadInfo, bucket
from loramix.models.head_info import expected

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
