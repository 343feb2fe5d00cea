"""The simulation of routing agrees with queueing theory where that has formulas, and with a schedule by hand."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from replicas import Costs, Replica, Request, simulate
from routers import ROUTERS, least_loaded, two_choices
from simulate_routing import Traffic

ONE, OTHER = "one", "other"
QUEUE = Costs(prompt=0.0, prompt_token=1.0, single=0.0, step=(0.0, 0.0))
"""A replica as a queue with one server: it works for as many seconds as the prompt has tokens, on one at a time."""
SEEDS = range(4)


def poisson(rate: float, count: int, seed: int, service: str = "exponential") -> list[Request]:
    """Arrivals of a Poisson process, with service times of mean 1."""
    rng = np.random.default_rng(seed)
    work = rng.exponential(1.0, count) if service == "exponential" else np.ones(count)
    return [
        Request(float(at), ONE, i, float(seconds), 1)
        for i, (at, seconds) in enumerate(zip(np.cumsum(rng.exponential(1 / rate, count)), work, strict=True))
    ]


def mean_wait(answered: list[Request]) -> float:
    return statistics.fmean(request.start - request.arrival for request in answered[len(answered) // 10 :])


def erlang_c(servers: int, load: float) -> float:
    """Probability that a request waits in M/M/c."""
    last = load**servers / math.factorial(servers) * servers / (servers - load)
    return last / (sum(load**k / math.factorial(k) for k in range(servers)) + last)


@pytest.mark.parametrize("load", [0.5, 0.7])
def test_one_replica_waits_as_m_m_1(load: float) -> None:
    waits = [mean_wait(simulate(poisson(load, 15_000, seed), QUEUE, 1, lambda *_: 0)) for seed in SEEDS]
    assert statistics.fmean(waits) == pytest.approx(load / (1 - load), rel=0.1)


def test_one_replica_with_equal_service_times_waits_as_m_d_1() -> None:
    answered = simulate(poisson(0.7, 40_000, 2, "equal"), QUEUE, 1, lambda *_: 0)
    assert mean_wait(answered) == pytest.approx(0.7 / (2 * (1 - 0.7)), rel=0.1)


def test_each_wait_follows_from_the_one_before() -> None:
    answered = simulate(poisson(0.8, 2_000, 1), QUEUE, 1, lambda *_: 0)
    for before, request in itertools.pairwise(answered):  # Lindley's recursion
        assert request.start == pytest.approx(max(request.arrival, before.start + before.prompt), abs=1e-6)


@pytest.mark.parametrize(("servers", "load"), [(2, 0.6), (8, 0.7)])
def test_the_replica_that_is_free_first_waits_as_m_m_c(servers: int, load: float) -> None:
    def free_first(request: Request, replicas: list[Replica]) -> int:
        # where a single queue would send the request: to the replica that ends its work first
        index = min(range(servers), key=free.__getitem__)
        free[index] = max(free[index], request.arrival) + request.prompt
        return index

    waits = []
    for seed in SEEDS:
        free = [0.0] * servers
        waits.append(mean_wait(simulate(poisson(servers * load, 15_000, seed), QUEUE, servers, free_first)))
    expected = erlang_c(servers, servers * load) / (servers * (1 - load))
    assert statistics.fmean(waits) == pytest.approx(expected, rel=0.1)


def test_two_choices_take_as_long_as_the_supermarket_model() -> None:
    load, n = 0.9, 100
    answered = simulate(poisson(load * n, 40_000, 4), QUEUE, n, two_choices(n, 0, {}))
    expected = sum(load ** (2**i - 2) for i in range(1, 12))  # Mitzenmacher 2001, for many servers
    measured = statistics.fmean(r.end - r.arrival for r in answered[len(answered) // 10 :])
    assert measured == pytest.approx(expected, rel=0.05)


COSTS = Costs(0.0, 0.01, 0.1, (0.0, 0.15, 0.2, 0.25), change=0.05, cache_tokens=1000)


def batch(*mixes: str, answer: int = 3) -> list[Request]:
    return [Request(0.0, mix, i, 10, answer) for i, mix in enumerate(mixes)]


def end(requests: list[Request]) -> float:
    return max(request.end for request in simulate(requests, COSTS, 1, lambda *_: 0))


def test_answers_of_one_mix_share_steps() -> None:
    assert end(batch(ONE)) == pytest.approx(0.1 + 2 * 0.1)
    # the second prompt with a token of the first, then a step of both and a change of mix, then a token of the second
    assert end(batch(ONE, ONE)) == pytest.approx(0.1 + 0.2 + 0.25 + 0.1)
    assert end(batch(ONE, OTHER)) == pytest.approx(0.1 + 0.2 + 0.2 + 0.1)


def test_a_later_turn_is_prefilled_from_where_the_earlier_ended() -> None:
    def talk() -> tuple[Request, Request]:
        first, second = Request(0.0, ONE, 7, 50, 1), Request(0.0, ONE, 7, 60, 1, earlier=51)
        first.next, first.pause = second, 1.0
        return first, second

    first, second = talk()
    simulate([first], COSTS, 1, lambda *_: 0)
    assert second.arrival == first.end + 1.0
    assert second.end - second.arrival == pytest.approx(0.01 * (60 - 51))
    first, second = talk()
    turns: Iterator[int] = iter((0, 1))
    simulate([first], COSTS, 2, lambda *_: next(turns))  # to another replica
    assert second.end - second.arrival == pytest.approx(0.01 * 60)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("n", [1, 3])
def test_each_router_answers_every_turn_once(name: str, n: int) -> None:
    traffic = Traffic({"one": [(20, 3), (40, 1)], "other": [(10, 8)]}, seed=0, turns=3)
    requests = list(traffic.requests(rate=2.0, horizon=50))
    answered = simulate(requests, COSTS, n, ROUTERS[name](n, 0, traffic.shares))
    expected = 0
    for turn in requests:
        while turn is not None:
            expected, turn = expected + 1, turn.next
    assert len(answered) == len(set(map(id, answered))) == expected > 50
    assert all(request.arrival <= request.start < request.first <= request.end for request in answered)


def test_traffic_has_the_rate_and_the_shares() -> None:
    traffic = Traffic({name: [(10, 1)] for name in "abcd"}, seed=1, turns=2)
    firsts = list(traffic.requests(rate=10.0, horizon=1000))
    assert len(firsts) * 2 == pytest.approx(10 * 1000, rel=0.05)
    for mix, share in traffic.shares.items():
        assert sum(r.mix == mix for r in firsts) / len(firsts) == pytest.approx(share, abs=0.02)
    assert sorted(traffic.shares.values())[-1] == pytest.approx(1 / (1 + 1 / 2 + 1 / 3 + 1 / 4))


def test_more_load_waits_longer_and_least_loaded_is_at_least_as_good_as_two_choices() -> None:
    waits = {}
    for load in (0.5, 0.9):
        for router in (least_loaded, two_choices):
            answered = simulate(poisson(4 * load, 10_000, 5), QUEUE, 4, router(4, 0, {}))
            waits[load, router] = mean_wait(answered)
    assert waits[0.5, two_choices] < waits[0.9, two_choices]
    assert (
        waits[0.5, least_loaded] < waits[0.5, two_choices]
        and waits[0.9, least_loaded] < waits[0.9, two_choices]
    )
