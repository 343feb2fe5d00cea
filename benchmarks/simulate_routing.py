"""Which replica should answer a request? A discrete-event simulation with measured service times.

    python benchmarks/simulate_routing.py [--replicas 4 --replicas 32 --replicas 256] [--seeds 5]

Replicas work like the server: answers of one mix share a decoding step, mixes take turns, one prompt is prefilled at
a time, and KV of earlier turns is kept by mix. What each of these takes comes from "service times" in results.json
(service_times.py). Writes "routing of requests" to results.json, with the times of each router in relation to those
of Serve's default for the same arrivals.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import statistics
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import click
import numpy as np
from evaluate import RESULTS, save
from routers import DEFAULT, ROUTERS, Router

from loramix.models.mixing import Mix
from loramix.runtime.mix_turns import Turns

LOADS = (0.5, 0.8, 1.0)
"""Requests a second and replica, in relation to what a replica answers at most if mixes come at random."""
TURNS, PAUSE_S = 4, 10.0
"""Mean number of turns of a conversation, and mean seconds between an answer and the next turn."""
HORIZON_S, WARM_UP = 200.0, 0.3
"""Simulated seconds at 32 and more replicas, with fewer ones longer; the share of them that is not counted."""
STUDENT = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5 % quantile of Student's t by degrees of freedom."""


class Costs(NamedTuple):
    """What a replica's work takes, in seconds."""

    prompt: float
    """Routing and prefill of a prompt, apart from its tokens."""
    prompt_token: float
    single: float
    """A token of the only answer of a mix."""
    step: tuple[float, ...]
    """A step of the batch, by number of answers; as many as there are run at once."""
    change: float = 0.0
    """A change of mix in the batch."""
    contexts: int = 3
    """Mixes whose only answer has a context of its own."""
    cache_tokens: int = 0
    """Tokens whose KV is kept."""

    @classmethod
    def measured(cls, found: Mapping[str, Any]) -> Costs:
        """Costs from the results of service_times.py."""
        slope, intercept = np.polyfit(
            [int(n) for n in found["prefill_ms"]], list(found["prefill_ms"].values()), 1
        )
        rows = {int(n): ms for n, ms in found["step_ms"].items()}
        steps = np.interp(range(max(rows) + 1), list(rows), list(rows.values()))
        return cls(
            prompt=(max(intercept, 0.0) + found["routing_ms"]) / 1000,
            prompt_token=slope / 1000,
            single=found["single_ms"] / 1000,
            step=tuple(steps / 1000),
            change=found["change_of_mix_ms"] / 1000,
            cache_tokens=int(found["kv_store_tokens"]),
        )


@dataclass(slots=True, eq=False)
class Request:
    """One turn of a conversation; most have a single turn."""

    arrival: float
    mix: Mix
    conversation: int
    prompt: float
    """Tokens, those of earlier turns included."""
    answer: int
    earlier: float = 0.0
    """Tokens of earlier turns at the beginning of the prompt."""
    pause: float = 0.0
    """Seconds after this answer until the next turn."""
    next: Request | None = None
    start: float = 0.0
    first: float = 0.0
    """When the first token is there."""
    end: float = 0.0
    left: int = 0


class Replica:
    """An engine and its scheduler."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.waiting: deque[Request] = deque()
        self.answers: dict[Mix, list[Request]] = {}
        self.ending: list[Request] = []
        self.ongoing = 0
        """Waiting and running requests."""
        self.mixes: Counter[Mix] = Counter()
        """The same by mix."""
        self._turns = Turns()
        self._mix: Mix | None = None
        self._kv: OrderedDict[tuple[Mix, int], float] = OrderedDict()

    def add(self, request: Request) -> bool:
        """Add a request; return whether the replica was idle."""
        self.waiting.append(request)
        self.ongoing += 1
        self.mixes[request.mix] += 1
        return self.ongoing == 1

    def step(self, now: float) -> float:
        """Prefill one prompt, decode a token of each answer whose turn it is, and return the seconds of both."""
        costs, seconds = self.costs, 0.0
        self.ending, joining = [], None
        if self.waiting and sum(map(len, self.answers.values())) < len(costs.step) - 1:
            joining = self.waiting.popleft()
            joining.start = now
            new = joining.prompt - self._kv.get((joining.mix, joining.conversation), 0.0)
            seconds += costs.prompt + costs.prompt_token * new
            joining.first, joining.left = now + seconds, joining.answer
            self._advance([joining])
        sizes = {mix: len(group) for mix, group in self.answers.items()}
        for mix in [mix for mix, size in sizes.items() if size == 1][: costs.contexts]:
            del sizes[mix]
            seconds += costs.single
            self._advance(self.answers[mix])
        if sizes:
            mix = self._turns.next(sizes, self._mix)
            seconds += costs.step[sizes[mix]] + costs.change * (mix != self._mix)
            self._mix = mix
            self._advance(self.answers[mix])
        if joining is not None and joining.left:
            self.answers.setdefault(joining.mix, []).append(joining)
        return seconds

    def _advance(self, group: Sequence[Request]) -> None:
        for request in group:
            request.left -= 1
            if request.left <= 0:
                self.ending.append(request)

    def finish(self, now: float) -> list[Request]:
        """End the answers that got their last token in the step that ends now."""
        for request in self.ending:
            request.end = now
            self.ongoing -= 1
            self.mixes[request.mix] -= 1
            if request in (group := self.answers.get(request.mix, [])):
                group.remove(request)
                if not group:
                    del self.answers[request.mix]
            self._keep(request)
        return self.ending

    def _keep(self, request: Request) -> None:
        key = (request.mix, request.conversation)
        self._kv[key] = request.prompt + request.answer
        self._kv.move_to_end(key)
        while self._kv and sum(self._kv.values()) > self.costs.cache_tokens:
            self._kv.popitem(last=False)


def simulate(requests: Sequence[Request], costs: Costs, n_replicas: int, router: Router) -> list[Request]:
    """Answer all requests and their later turns.

    Args:
        requests: first turns, by arrival.
        costs: what work takes.
        n_replicas: number of replicas.
        router: chooses the replica, by index.

    Returns:
        All turns that were answered, with their times.
    """
    replicas = [Replica(costs) for _ in range(n_replicas)]
    count, answered = itertools.count(), []
    events: list[tuple[float, int, Request | None, int]] = [
        (request.arrival, next(count), request, 0) for request in requests
    ]
    heapq.heapify(events)
    while events:
        now, _, arriving, index = heapq.heappop(events)
        if arriving is not None:
            index = router(arriving, replicas)
            if not replicas[index].add(arriving):
                continue
        else:
            for request in replicas[index].finish(now):
                answered.append(request)
                if (turn := request.next) is not None:
                    turn.arrival = now + request.pause
                    heapq.heappush(events, (turn.arrival, next(count), turn, 0))
        if replicas[index].ongoing:
            heapq.heappush(events, (now + replicas[index].step(now), next(count), None, index))
    return answered


class Traffic:
    """Requests to skills of unequal popularity (Zipf's law), with the lengths of the everyday requests.

    Args:
        tokens: prompt and answer tokens of requests by skill.
        seed: of popularity and requests.
        turns: mean number of turns of a conversation.
    """

    def __init__(self, tokens: Mapping[str, Sequence[tuple[int, int]]], seed: int, turns: float) -> None:
        self._rng, self._turns = np.random.default_rng(seed), turns
        names = [str(name) for name in self._rng.permutation(sorted(tokens))]
        self.shares = {Mix.of({name: 1.0}): 1 / rank for rank, name in enumerate(names, 1)}
        total = sum(self.shares.values())
        self.shares = {mix: share / total for mix, share in self.shares.items()}
        self._mixes, self._lengths = list(self.shares), [tokens[name] for name in names]

    def requests(self, rate: float, horizon: float) -> Iterator[Request]:
        """Yield first turns; with all later turns they arrive at ``rate`` a second."""
        rng, now = self._rng, 0.0
        shares = list(self.shares.values())
        for conversation in itertools.count():
            now += rng.exponential(self._turns / rate)
            if now > horizon:
                return
            skill = int(rng.choice(len(shares), p=shares))
            first = last = None
            earlier = 0.0
            for _ in range(rng.geometric(1 / self._turns)):
                prompt, answer = self._lengths[skill][int(rng.integers(len(self._lengths[skill])))]
                turn = Request(now, self._mixes[skill], conversation, earlier + prompt, answer, earlier)
                turn.pause = rng.exponential(PAUSE_S)
                earlier = min(turn.prompt + answer, 1500.0)
                first = first or turn
                if last is not None:
                    last.next = turn
                last = turn
            assert first is not None
            yield first


def capacity(traffic: Traffic, costs: Costs) -> float:
    """Requests a second of one replica that always has some waiting, of random mixes, without reuse of KV."""
    turns: list[Request] = []
    for first in traffic.requests(1.0, 400.0):
        turn: Request | None = first
        while turn is not None:
            turns.append(turn)
            turn = turn.next
    for request in turns:
        request.arrival, request.next = 0.0, None
    np.random.default_rng(0).shuffle(turns)
    answered = simulate(turns, costs._replace(cache_tokens=0), 1, lambda *_: 0)
    return len(answered) / max(request.end for request in answered)


def times(answered: Sequence[Request], horizon: float) -> dict[str, float]:
    """Mean and 99th percentile of seconds to the end, and mean seconds to the first token."""
    counted = [r for r in answered if WARM_UP * horizon < r.arrival < horizon]
    whole = np.array([r.end - r.arrival for r in counted])
    first = np.array([r.first - r.arrival for r in counted])
    return {"mean_s": whole.mean(), "p99_s": float(np.quantile(whole, 0.99)), "first_s": first.mean()}


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean of independent runs, and half the width of its 95 % interval."""
    n = len(values)
    half = STUDENT[n - 1] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return {"mean": statistics.fmean(values), "half": half}


def compare(
    found: Mapping[str, Any], n_replicas: int, load: float, turns: float, seeds: int
) -> dict[str, Any]:
    """All routers at the same arrivals: figures by router, ratios to the default by seed."""
    costs = Costs.measured(found)
    horizon = HORIZON_S * max(1.0, 32 / n_replicas)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in ROUTERS}
    for seed, name in itertools.product(range(seeds), ROUTERS):
        traffic = Traffic(found["tokens"], seed, turns)
        rate = load * n_replicas * capacity(traffic, costs)
        router = ROUTERS[name](n_replicas, seed, traffic.shares)
        answered = simulate(list(traffic.requests(rate, horizon)), costs, n_replicas, router)
        runs[name].append(times(answered, horizon))
    return {
        name: {
            **{what: statistics.fmean(run[what] for run in done) for what in done[0]},
            "ratio": interval([a["mean_s"] / b["mean_s"] for a, b in zip(done, runs[DEFAULT], strict=True)]),
            "ratio_p99": interval(
                [a["p99_s"] / b["p99_s"] for a, b in zip(done, runs[DEFAULT], strict=True)]
            ),
        }
        for name, done in runs.items()
    }


@click.command()
@click.option("--replicas", multiple=True, type=int, default=(4, 32, 256), show_default=True)
@click.option("--seeds", type=click.IntRange(2, len(STUDENT)), default=5, show_default=True)
def main(replicas: tuple[int, ...], seeds: int) -> None:
    """Simulate, and write the results to results.json."""
    found = json.loads(RESULTS.read_text())["service times"]
    result: dict[str, Any] = {}
    for kind, turns in (("single prompts", 1.0), ("conversations", float(TURNS))):
        for n, load in itertools.product(replicas, LOADS):
            result.setdefault(kind, {})[f"{n} replicas, load {load}"] = compare(found, n, load, turns, seeds)
            click.echo(f"{kind}, {n} replicas, load {load}", err=True)
    save("routing of requests", result)


if __name__ == "__main__":
    main()
