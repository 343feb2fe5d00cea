"""A gate that gets one more class: the others' logits stay, in the file that is served."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch")

from loramix.models.early_head import EarlyHead
from loramix.models.gate_bank import Bank
from loramix.models.head_info import HeadInfo, expected
from loramix.train.gate_extend import extend, kept_logits, uncontradicted
from loramix.train.gate_scores import probabilities_of, score, temperature_of, threshold_of

pytestmark = pytest.mark.train
D = 4
CENTRES = np.random.default_rng(5).normal(0, 2, (4, 6 * D)).astype(np.float32)
SPREAD = 0.6
Floats = npt.NDArray[np.float32]


def bank_of(classes: list[str], kinds: list[int], seed: int, like: Bank | None = None) -> tuple[Bank, Floats]:
    """Forty pooled vectors a kind around its centre; a kind without a class is for the base."""
    rng = np.random.default_rng(seed)
    pooled = np.concatenate([CENTRES[k] + rng.normal(0, SPREAD, (40, 6 * D)) for k in kinds]).astype(
        np.float32
    )
    targets = np.zeros((len(pooled), len(classes)), np.float32)
    names = ["a", "b", "new", "base"]
    for row, kind in enumerate(np.repeat(kinds, 40)):
        targets[row, classes.index(names[kind] if names[kind] in classes else "base")] = 1.0
    groups = np.arange(len(pooled), dtype=np.int32) // 4
    return Bank.of(pooled, targets, groups, classes, like.projection if like else None), pooled


@pytest.fixture(scope="module")
def old() -> EarlyHead:
    """A gate whose last linear map tells the kinds a, b and base apart; the rest of it is random."""
    info = HeadInfo(
        skills=["a", "b"], layers=[0], width=8, d=D, depth=1, heads=2, temperature=0.8, threshold=0.6,
        base_sha256="0" * 64,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    arrays = {key: rng.uniform(0.5, 1, shape).astype(np.float32) for key, shape in expected(info).items()}
    centres = CENTRES[[0, 1, 3]] / 10
    arrays["out.weight"] = np.ascontiguousarray(centres.T)
    arrays["out.bias"] = (-0.5 * 10 * np.square(centres).sum(1)).astype(np.float32)
    return EarlyHead(info, arrays)


def said(gate: EarlyHead, pooled: Floats) -> Floats:
    """Calibrated probabilities (N, K+1)."""
    logits = pooled @ gate.arrays["out.weight"] + gate.arrays["out.bias"]
    return np.stack([gate.probabilities(row) for row in logits])


def test_a_new_class_leaves_the_others_logits_alone(old: EarlyHead) -> None:
    bank, _ = bank_of(["a", "b", "new", "base"], [0, 1, 2, 3], 1)
    gate, changes = extend(old, bank, kept_logits(old, bank), 2)
    np.testing.assert_array_equal(gate.arrays["out.weight"][:, [0, 1, 3]], old.arrays["out.weight"])
    np.testing.assert_array_equal(gate.arrays["out.bias"][[0, 1, 3]], old.arrays["out.bias"])
    for key in old.arrays.keys() - {"out.weight", "out.bias"}:
        np.testing.assert_array_equal(gate.arrays[key], old.arrays[key])
    served = EarlyHead.from_bytes(gate.to_bytes())
    assert served.info.skills == ["a", "b", "new"]
    assert (served.info.threshold, served.info.temperature) == (0.6, 0.8)
    fresh, unseen = bank_of(["a", "b", "new", "base"], [0, 1, 2, 3], 2)
    assert (said(served, unseen).argmax(1) == fresh.targets.argmax(1)).mean() > 0.95
    assert changes.own > 0.9 and changes.others > 0.95


def test_a_skill_that_was_taken_out_can_be_taught_again(old: EarlyHead) -> None:
    gone = old.without("a")
    bank, _ = bank_of(["b", "new", "base"], [0, 1, 2, 3], 3)
    gate, changes = extend(gone, bank, kept_logits(gone, bank), 1)
    served = EarlyHead.from_bytes(gate.to_bytes())
    assert (served.info.skills, served.info.base_classes) == (["b", "new"], 2)
    fresh, unseen = bank_of(["b", "new", "base"], [0, 1, 2, 3], 4)
    assert (said(served, unseen).argmax(1) == fresh.targets.argmax(1)).mean() > 0.95
    assert changes.own > 0.9 and changes.others > 0.95

    bank, _ = bank_of(["b", "new", "a", "base"], [0, 1, 2, 3], 5)
    again = EarlyHead.from_bytes(extend(served, bank, kept_logits(served, bank), 2)[0].to_bytes())
    found = said(again, bank_of(["b", "new", "a", "base"], [0, 1, 2, 3], 6)[1]).argmax(1)
    assert (found == np.repeat([2, 0, 1, 3], 40)).mean() > 0.95


def test_prompts_for_none_that_look_like_the_new_skill_are_left_out(old: EarlyHead) -> None:
    first, _ = bank_of(["a", "b", "base"], [0, 1, 2, 3], 7)  # the kind "new" was for none before
    _, pooled = bank_of(["a", "b", "new", "base"], [2], 8)
    targets = np.tile(np.asarray([[0, 0, 1, 0]], np.float32), (40, 1))
    bank = first.extended(pooled, targets, np.arange(40, dtype=np.int32) // 4, ["a", "b", "new", "base"])
    keep = uncontradicted(bank, kept_logits(old, bank), 2, 160)
    assert keep[160:].all() and keep[:80].all(), "the new prompts and those of skills stay"
    assert keep[80:120].mean() < 0.5 and keep[120:160].mean() > 0.9


def test_the_bank_keeps_what_decides(old: EarlyHead) -> None:
    bank, pooled = bank_of(["a", "b", "base"], [0, 1, 3], 9)
    narrow = Bank.of(pooled, bank.targets, bank.groups, bank.classes, keep=old.arrays["out.weight"])
    exact = pooled @ old.arrays["out.weight"] + old.arrays["out.bias"]
    assert np.abs(kept_logits(old, narrow) - exact).max() < 0.05 * np.abs(exact).max()


def test_temperature_and_threshold_follow_from_the_logits() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 3000)
    honest = rng.normal(0, 1, (3000, 3)) + 2.0 * np.eye(3)[truth]
    targets = np.eye(3, dtype=np.float32)[truth]
    for scale in (1.0, 2.0, 4.0):
        logits = (honest * scale).astype(np.float32)
        temperature = temperature_of(logits, targets)
        assert temperature == pytest.approx(0.5 * scale, rel=0.15)
        table = probabilities_of(logits, temperature)
        assert score(table, targets, 0.5).calibration_error < 0.04
        chosen = threshold_of(table, targets)
        found, high = score(table, targets, chosen), score(table, targets, 0.95)
        assert found.skill_to_base < high.skill_to_base and found.none_to_base < high.none_to_base
        assert abs(found.skill_to_base - (1 - found.none_to_base)) < 0.1
