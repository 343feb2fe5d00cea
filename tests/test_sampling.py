"""Drawing tokens: each filter keeps what its definition says, and a seed repeats."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramix.errors import UsageError
from loramix.runtime.sampling import PARTIAL_SORT, Sampler, Sampling, score

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=40).map(
    lambda x: np.asarray(x, np.float32)
)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    wide = logits.astype(np.float64) / temperature
    odds = np.exp(wide - wide.max())
    return odds / odds.sum()


def drawn(logits: np.ndarray, draws: int = 60, **options: Any) -> set[int]:
    sampler = Sampler(Sampling(seed=0, **{"temperature": 1.0, **options}))
    return {sampler.pick(logits, []) for _ in range(draws)}


@settings(max_examples=200)
@given(LOGITS)
def test_greedy_takes_the_first_of_the_likeliest(logits: np.ndarray) -> None:
    assert Sampler(Sampling()).pick(logits, []) == int(np.flatnonzero(logits == logits.max())[0])


@settings(max_examples=100)
@given(LOGITS, st.integers(1, 10))
def test_top_k_keeps_the_k_likeliest(logits: np.ndarray, k: int) -> None:
    bound = np.sort(logits)[::-1][min(k, len(logits)) - 1]
    found = drawn(logits, top_k=k)
    assert all(logits[token] >= bound for token in found) and len(found) <= k


@settings(max_examples=100)
@given(LOGITS, st.floats(0.05, 0.95))
def test_top_p_keeps_the_fewest_that_reach_p(logits: np.ndarray, p: float) -> None:
    probability = softmax(logits)
    order = np.argsort(-probability, kind="stable")
    reach = int(np.searchsorted(np.cumsum(probability[order]), p - 1e-9)) + 1
    least = probability[order[min(reach, len(order) - 1)]]
    assert all(probability[token] >= least - 1e-9 for token in drawn(logits, top_p=p))


@settings(max_examples=100)
@given(LOGITS, st.floats(0.05, 1.0))
def test_min_p_drops_what_is_unlikely(logits: np.ndarray, share: float) -> None:
    probability = softmax(logits)
    assert all(probability[t] >= share * probability.max() - 1e-9 for t in drawn(logits, min_p=share))


def test_draws_follow_the_distribution_and_the_temperature() -> None:
    logits = np.log(np.asarray([0.5, 0.3, 0.2], np.float32))
    for temperature in (0.5, 1.0, 2.0):
        sampler = Sampler(Sampling(temperature=temperature, seed=1))
        counts = np.bincount([sampler.pick(logits, []) for _ in range(4000)], minlength=3) / 4000
        assert np.abs(counts - softmax(logits, temperature)).max() < 0.03


def test_a_seed_repeats() -> None:
    logits = np.zeros(50, np.float32)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.pick(logits, []) for _ in range(20)]

    assert draws(3) == draws(3) != draws(4)
    assert draws(None) != draws(None)


def test_repeat_penalty_weakens_recent_tokens_only() -> None:
    logits = np.asarray([2.0, 1.9, -1.0], np.float32)
    sampler = Sampler(Sampling(repeat_penalty=1.5, repeat_last_n=2))
    assert sampler.pick(logits, []) == 0
    assert sampler.pick(logits, [0]) == 1
    assert sampler.pick(logits, [0, 2, 2]) == 0  # beyond the last two
    assert logits.tolist() == [2.0, np.float32(1.9), -1.0]


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 5.0])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_p": 0.2}, {"min_p": 0.02}, {"top_k": 3000}])
def test_a_large_vocabulary_is_drawn_from_as_if_all_of_it_were_sorted(
    spread: float, options: dict[str, Any]
) -> None:
    """What is drawn lies among the likeliest few, behind them, or at their end where many are equal."""
    logits = np.random.default_rng(5).normal(0, spread, 6 * PARTIAL_SORT).astype(np.float32)
    p = softmax(logits)
    order = np.argsort(-logits, kind="stable")[: options.get("top_k", len(p))]
    order = order[p[order] >= options.get("min_p", 0.0) * p.max()]
    sums = np.cumsum(p[order]) / p[order].sum()
    order = order[: int(np.searchsorted(sums, options.get("top_p", 1.0))) + 1]
    sums = np.cumsum(p[order]) / p[order].sum()
    sampler, draws = Sampler(Sampling(temperature=1.0, seed=2, **options)), np.random.default_rng(2)
    places = [int(np.searchsorted(sums, draws.random())) for _ in range(60)]
    assert [sampler.pick(logits, []) for _ in range(60)] == [int(order[place]) for place in places]
    if spread < 1 and not options:
        assert max(places) > PARTIAL_SORT > min(places)  # both ways were taken


def test_presence_and_frequency_count_the_answer_alone() -> None:
    logits = np.asarray([3.0, 2.5, 2.0, 0.0], np.float32)
    prompt, before = [0, 0, 1, 2, 3], logits.copy()

    def best(answer: list[int], **options: float) -> int:
        return Sampler(Sampling(**options)).pick(logits, prompt + answer, len(prompt))  # type: ignore[arg-type]

    assert best([], presence_penalty=2, frequency_penalty=2) == 0
    assert best([0], presence_penalty=0.6) == 1
    assert best([0, 0, 0], presence_penalty=0.6) == 1  # once, however often it is there
    assert best([0, 1], presence_penalty=1.5) == 2
    assert best([0], frequency_penalty=0.4) == 0
    assert best([0, 0], frequency_penalty=0.4) == 1
    assert best([1], presence_penalty=-1) == best([1, 1], frequency_penalty=-0.5) == 1
    assert (logits == before).all()  # the caller's are left alone
    assert Sampler(Sampling(presence_penalty=2)).pick(logits, [0]) == 1


def test_scores() -> None:
    logits = np.log(np.asarray([0.25, 0.5, 0.125, 0.125], np.float32))
    found = score(logits, 3, 3)
    assert found.log_probability == pytest.approx(np.log(0.125), abs=1e-6)
    assert [token for token, _ in found.top] == [1, 0, 2]  # of equals the first
    assert [p for _, p in found.top] == pytest.approx(np.log([0.5, 0.25, 0.125]), abs=1e-6)
    assert score(logits, 0, 0).top == []


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "top_k", "repeat_penalty", "seed"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "1", True, 10**30])
def test_values_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        Sampling(**{name: value})


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("value", [-2.1, 2.1, float("nan"), float("-inf"), "1", False])
def test_penalties_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        Sampling(**{name: value})
