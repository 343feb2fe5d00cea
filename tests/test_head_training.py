"""Training of the gate's head: states from the child process, the loop, its checkpoints, and NumPy's parity."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch")

from loramix.errors import NativeError
from loramix.models.early_head import EarlyHead
from loramix.models.gate_window import FIRST_TOKENS, LAST_TOKENS, READ_TOKENS
from loramix.models.head_info import HeadInfo
from loramix.models.message_reading import TEXT
from loramix.runtime.children import token_states
from loramix.runtime.state_parts import PART, Turns, part_file
from loramix.runtime.token_states import token_tags
from loramix.train import head_fit
from loramix.train.gate_pieces import OTHER, UNKNOWN, Piece, Request, Turn, user
from loramix.train.gate_run import calibrated, difference, drained, turns_of
from loramix.train.head_average import SHARES, averaged, loss_on
from loramix.train.head_fit import FitSettings, decide, fit, rate_at, tag_weights, unlike
from loramix.train.head_model import TorchHead
from loramix.train.head_states import Joined, TokenStates

pytestmark = pytest.mark.train
T = TypeVar("T")
WIDTH = 12
INFO = HeadInfo(
    skills=["a", "b"], layers=[1], width=WIDTH, d=16, depth=1, tags=["other", "text", "a", "b", "base"]
)
FAST = FitSettings(passes=6, batch=16, rate=5e-3)


def finished(loop: Generator[Any, None, T]) -> T:
    while True:
        try:
            next(loop)
        except StopIteration as end:
            found: T = end.value
            return found


def prompts(count: int, seed: int = 0) -> TokenStates:
    """Prompts of 5 to 14 tokens; one token somewhere decides, and its tag says so."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 15, count).astype(np.int64)
    states = rng.normal(0, 1, (int(lengths.sum()), WIDTH))
    tags = np.ones(len(states), np.int8)
    targets = np.zeros((count, 3), np.float32)
    for i, start in enumerate(np.cumsum(lengths) - lengths):
        kind = int(rng.integers(3))
        place = start + int(rng.integers(1, lengths[i]))
        states[place, kind] += 12.0
        tags[place], targets[i, kind] = 2 + kind, 1.0
    return TokenStates([states.astype(np.float16)], lengths, targets, tags)


def test_a_head_finds_the_token_that_decides() -> None:
    data, unseen = prompts(400), prompts(200, seed=1)
    head = finished(fit(data, np.arange(400), INFO, FAST))
    logits, pooled = decide(head, unseen, np.arange(200))
    assert (logits.argmax(1) == unseen.targets.argmax(1)).mean() > 0.9
    assert pooled.shape == (200, 6 * INFO.d)
    served = EarlyHead(INFO, head.arrays())
    assert difference(head, served, unseen, np.arange(10)) < 1e-4
    first = served(unseen.batch(np.asarray([3])).states[0].numpy())
    np.testing.assert_allclose(first.pooled, pooled[3], atol=1e-4)
    info, scores = calibrated(INFO, logits, unseen.targets)
    assert scores.accuracy > 0.9 and 0.3 <= info.temperature <= 4 and 0.2 <= info.threshold <= 0.95
    assert info.metrics["held_out_accuracy"] == scores.accuracy


def test_the_seed_decides_and_an_interruption_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_fit, "SAVE_EVERY", 4)
    data, rows = prompts(96), np.arange(96)
    short = replace(FAST, passes=2)
    whole = finished(fit(data, rows, INFO, short)).arrays()
    again = finished(fit(data, rows, INFO, short)).arrays()
    other = finished(fit(data, rows, INFO, replace(short, seed=1))).arrays()
    loop = fit(data, rows, INFO, short, checkpoints=tmp_path)
    for _ in range(6):
        next(loop)
    loop.close()
    resumed = fit(data, rows, INFO, short, checkpoints=tmp_path)
    assert next(resumed).step == 5, "it goes on after the checkpoint of step 4"
    after = finished(resumed).arrays()
    for key, array in whole.items():
        np.testing.assert_array_equal(array, again[key], err_msg=key)
        np.testing.assert_allclose(after[key], array, atol=1e-6, err_msg=key)
    assert np.abs(whole["out.weight"] - other["out.weight"]).max() > 1e-3
    longer = fit(data, rows, INFO, replace(short, passes=3), checkpoints=tmp_path)
    assert next(longer).step == 1, "the checkpoint of another training is not used"


def test_few_prompts_get_as_many_steps_in_smaller_batches() -> None:
    settings = FitSettings()
    for count in (380, 700, 1600, 30_000):
        size = head_fit.batch_size(count, settings)
        assert size <= settings.batch and settings.passes * count / size >= head_fit.FEWEST_STEPS
    assert head_fit.batch_size(30_000, settings) == settings.batch
    assert head_fit.batch_size(20, settings) == head_fit.SMALLEST_BATCH, "never so small that steps are noise"


def test_a_training_begins_with_a_head_of_other_orders() -> None:
    data, rows = prompts(96), np.arange(96)
    old = EarlyHead(INFO, finished(fit(data, rows, INFO, FAST)).arrays())
    info = msgspec.structs.replace(
        INFO, skills=["b", "a"], tags=["other", "text", "b", "a", "base", "answer"]
    )
    assert unlike(old.info, info) == ""
    moved = TokenStates(data.layers, data.lengths, data.targets[:, [1, 0, 2]], data.tags)
    begun = TorchHead(info, old.arrays["mean"], old.arrays["std"])
    begun.load(old.arrays, old.info.skills, old.info.tags)
    logits, pooled = decide(begun, moved, rows[:20])
    for row in rows[:20]:
        found = old(data.batch(np.asarray([row])).states[0].numpy())
        np.testing.assert_allclose(logits[row], found.logits[[1, 0, 2]], atol=1e-4)
        np.testing.assert_allclose(pooled[row], found.pooled, atol=1e-4)
    arrays, places = begun.arrays(), [0, 1, 3, 2, 4]
    np.testing.assert_array_equal(arrays["tag.weight"][:, :5], old.arrays["tag.weight"][:, places])
    assert np.abs(arrays["tag.weight"][:, 5]).max() > 0
    slow = replace(FAST, passes=1, rate=1e-6)
    after = finished(fit(moved, rows, info, slow, start=old)).arrays()
    np.testing.assert_allclose(after["out.weight"], arrays["out.weight"], atol=1e-4)


def test_a_head_of_other_sizes_is_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for change, what in (
        ({"skills": ["a"]}, "decides between a, b"),
        ({"layers": [2]}, "layers"),
        ({"depth": 2}, "depth"),
        ({"base_sha256": "0" * 64}, "base_sha256"),
        ({"base_classes": 2}, "classes of the base"),
    ):
        assert what in unlike(INFO, msgspec.structs.replace(INFO, **change))
    # a checkpoint of a training that began otherwise is not used
    monkeypatch.setattr(head_fit, "SAVE_EVERY", 2)
    data, rows, short = prompts(96), np.arange(96), replace(FAST, passes=1)
    old = EarlyHead(INFO, finished(fit(data, rows, INFO, short, checkpoints=tmp_path)).arrays())
    assert next(fit(data, rows, INFO, short, start=old, checkpoints=tmp_path)).step == 1


def test_the_rate_rises_and_falls() -> None:
    rates = [rate_at(step, 100, FAST) for step in range(100)]
    assert max(rates) == pytest.approx(FAST.rate, rel=0.02) and rates.index(max(rates)) in (14, 15)
    assert rates[0] < 0.1 * FAST.rate and 0 < rates[-1] < 0.01 * FAST.rate


def test_tokens_are_left_out_but_never_the_last_one() -> None:
    data = prompts(20)
    rng = np.random.default_rng(0)
    batch = data.batch(np.arange(20), dropped=0.5, rng=rng)
    whole = data.batch(np.arange(20))
    assert batch.lengths.sum() < 0.7 * whole.lengths.sum()
    for i in range(20):
        kept = batch.places[i, : batch.lengths[i]].numpy()
        assert kept[-1] == data.lengths[i] - 1 and (np.diff(kept) > 0).all()
        np.testing.assert_array_equal(batch.states[i, : len(kept)].numpy(), whole.states[i][kept].numpy())
        np.testing.assert_array_equal(batch.tags[i, : len(kept)].numpy(), whole.tags[i][kept].numpy())
    assert (whole.tags[0, int(whole.lengths[0]) :] == -1).all()


def test_arrays_one_after_the_other() -> None:
    parts = [np.full((n, 2), n) for n in (3, 1, 4)]
    rows = Joined(parts)
    assert [rows[slice(a, b)].tolist() for a, b in ((0, 1), (1, 3), (3, 4), (4, 8))] == [
        [[3, 3]], [[3, 3]] * 2, [[1, 1]], [[4, 4]] * 4
    ]  # fmt: skip


def test_tags_follow_the_bytes_of_the_pieces() -> None:
    turns: Turns = [
        ("user", [("Do it: ", 3), ("ça va", 1)]),
        ("assistant", [("yes", 0)]),
        ("user", [("?", -1)]),
    ]
    spelled = [b"<u>", b"Do", b" it", b":", b" \xc3", b"\xa7a", b" va", b"<e>", b"yes", b"<u>", b"?", b"<e>"]
    assert token_tags(turns, spelled).tolist() == [0, 3, 3, 3, 1, 1, 1, 0, 0, 0, -1, 0]
    changed: Turns = [("user", [("Do it: ", 3), ("ca va", 1)])]
    assert token_tags(changed, spelled).tolist() == [-1] * len(spelled)


def request(text: str, *, turns: int = 1) -> Request:
    before = [
        t for i in range(turns - 1) for t in (user(Piece(f"say {i}", "a")), Turn("assistant", (Piece("so"),)))
    ]
    last = user(Piece("Do this: ", "b"), Piece(text, TEXT), Piece(" now", OTHER), Piece("?", UNKNOWN))
    return Request((*before, last), {"b": 1.0}, "g", "k")


def test_states_come_in_parts_and_are_kept(tiny_base: Path, tmp_path: Path) -> None:
    requests = [request(f"text {i}", turns=1 + i % 3) for i in range(PART + 3)]
    requests[7] = request("long " * 200)
    turns = [turns_of(r, ["a", "b"]) for r in requests]
    assert list(token_states(tiny_base, turns, [0, 2], tmp_path)) == [PART, PART + 3]
    targets = np.zeros((len(requests), 3), np.float32)
    data = TokenStates.load(tmp_path, [0, 2], targets)
    assert data.lengths[7] == READ_TOKENS == FIRST_TOKENS + LAST_TOKENS
    assert (
        len(data.tags) == data.lengths.sum() and data.batch(np.asarray([7, PART + 1])).states.shape[2] == 128
    )
    tags = data.batch(np.asarray([0])).tags[0].numpy()
    assert set(tags) == {0, 1, 3, -1} and (tags == 1).sum() == len("text 0")
    assert set(data.batch(np.asarray([2])).tags[0].tolist()) == {0, 1, 2, 3, -1}
    # a part that is there is not computed again
    part_file(tmp_path, 1, "tokens").unlink()
    part_file(tmp_path, 0, "L2").write_bytes(b"mine")
    assert list(token_states(tiny_base, turns, [0, 2], tmp_path)) == [PART, PART + 3]
    assert part_file(tmp_path, 0, "L2").read_bytes() == b"mine"
    one = TokenStates.load(tmp_path, [0], targets).batch(np.asarray([PART])).states
    assert one.numpy() == pytest.approx(data.batch(np.asarray([PART])).states[..., :64].numpy())


def test_a_child_that_fails_says_why(tiny_base: Path, tmp_path: Path) -> None:
    turns = [turns_of(request("text"), ["a", "b"])]
    with pytest.raises(NativeError, match="layer 9 cannot be read"):
        list(token_states(tiny_base, turns, [9], tmp_path / "x"))
    assert not list((tmp_path / "x").glob("*.npz"))


def test_rare_tags_count_more() -> None:
    weight = tag_weights(np.asarray([1] * 100 + [0] * 25 + [2] * 4 + [-1] * 50, np.int8), 4)
    assert weight[2] / weight[1] == pytest.approx(25**0.25) and weight[0] / weight[1] == pytest.approx(2**0.5)
    assert float(weight[:3] @ weight.new_tensor([25, 100, 4])) == pytest.approx(129)
    assert bool(weight.isfinite().all())


def test_the_mean_with_the_head_before_is_chosen_on_unseen_prompts() -> None:
    data, unseen = prompts(240), prompts(90, seed=5)
    rows, held = np.arange(240), np.arange(90)
    first = finished(fit(data, rows, INFO, replace(FAST, passes=2)))
    start = EarlyHead(first.info, first.arrays())

    def losses(trained_on: TokenStates) -> tuple[float, float, float]:
        head = finished(fit(trained_on, rows, INFO, FAST, start=start))
        mean = drained(averaged(start, head, unseen, held, FAST), lines.append)
        before, after, found = (loss_on(one, unseen, held, FAST) for one in (first, head, mean))
        return before, after, found

    lines: list[str] = []
    before, after, mean = losses(data)
    assert mean <= after < before and lines[0].count(": ") == len(SHARES) + 1
    wrong = replace(data, targets=np.roll(data.targets, 1, axis=1))
    before, after, mean = losses(wrong)
    assert after > 2 * before and mean < after / 2, "most of what the head had learned is kept"
