"""A gate that gets one more class: the others' logits stay, in the file that is served."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from loramix.models.gate import Gate
from loramix.models.gate_bank import Bank
from loramix.models.gate_numpy import NumpyGate
from loramix.train.gate import converted, gate_info
from loramix.train.gate_extend import extend, kept_logits
from loramix.train.gate_fit import fit

pytestmark = pytest.mark.train
CENTRES = np.random.default_rng(5).normal(0, 2, (4, 24)).astype(np.float32)


def bank_of(classes: list[str], kinds: list[int], seed: int) -> tuple[Bank, np.ndarray]:
    """Forty prompts a kind around its centre; a kind without a class is for the base."""
    rng = np.random.default_rng(seed)
    features = np.concatenate([CENTRES[k] + rng.normal(0, 0.6, (40, 24)) for k in kinds]).astype(np.float32)
    targets = np.zeros((len(features), len(classes)), np.float32)
    names = ["a", "b", "new", "base"]
    for row, kind in enumerate(np.repeat(kinds, 40)):
        targets[row, classes.index(names[kind] if names[kind] in classes else "base")] = 1.0
    groups = np.arange(len(features), dtype=np.int32) // 4
    return Bank.of(features, targets, groups, classes), features


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> NumpyGate:
    bank, features = bank_of(["a", "b", "base"], [0, 1, 3], 0)
    gate = fit(features, bank.targets, gate_info(["a", "b"], [0], "last", "0" * 64))
    gate.calibrate(gate_temperature=0.8, threshold=0.6, metrics={})
    return NumpyGate.from_bytes(converted(gate, tmp_path_factory.mktemp("gate"))[0])


def test_a_new_class_leaves_the_others_logits_alone(old: NumpyGate, tmp_path: Path) -> None:
    bank, features = bank_of(["a", "b", "new", "base"], [0, 1, 2, 3], 1)
    gate, changes = extend(old, bank, kept_logits(old, bank), 2)
    with torch.no_grad():
        before = Gate.from_arrays(old.info, old.arrays)(torch.from_numpy(features)).numpy()
        after = gate(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(after[..., [0, 1, 3]], before, atol=1e-4)
    served = NumpyGate.from_bytes(converted(gate, tmp_path)[0])
    assert served.info.skills == ["a", "b", "new"]
    assert (served.info.threshold, served.info.gate_temperature) == (0.6, pytest.approx(0.8))
    fresh, unseen = bank_of(["a", "b", "new", "base"], [0, 1, 2, 3], 2)
    right = served.probabilities(unseen).argmax(1) == fresh.targets.argmax(1)
    assert right.mean() > 0.95
    assert changes.own > 0.9 and changes.others > 0.95


def test_a_skill_that_was_taken_out_can_be_taught_again(old: NumpyGate, tmp_path: Path) -> None:
    gone = old.without("a")
    bank, features = bank_of(["b", "new", "base"], [0, 1, 2, 3], 3)
    gate, changes = extend(gone, bank, kept_logits(gone, bank), 1)
    served = NumpyGate.from_bytes(converted(gate, tmp_path)[0])
    assert (served.info.skills, served.info.base_classes) == (["b", "new"], 2)
    np.testing.assert_allclose(
        gate.probabilities(torch.from_numpy(features)).detach(), served.probabilities(features), atol=1e-5
    )
    fresh, unseen = bank_of(["b", "new", "base"], [0, 1, 2, 3], 4)
    assert (served.probabilities(unseen).argmax(1) == fresh.targets.argmax(1)).mean() > 0.95
    assert changes.own > 0.9 and changes.others > 0.95

    bank, _ = bank_of(["b", "new", "a", "base"], [0, 1, 2, 3], 5)
    again = NumpyGate.from_bytes(
        converted(extend(served, bank, kept_logits(served, bank), 2)[0], tmp_path)[0]
    )
    found = again.probabilities(bank_of(["b", "new", "a", "base"], [0, 1, 2, 3], 6)[1]).argmax(1)
    assert (found == np.repeat([2, 0, 1, 3], 40)).mean() > 0.95
