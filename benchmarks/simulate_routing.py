"""Which replica should answer a request? A discrete-event simulation with measured service times.

    python benchmarks/simulate_routing.py [--replicas 4 --replicas 32 --replicas 256] [--seeds 5]

The replicas are in replicas.py, the routers in routers.py; what work takes comes from "service times" in results.json
(service_times.py). Writes "routing of requests" to results.json, with the times of each router in relation to those
of Serve's default for the same arrivals, and prints the table of docs/scale.md.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
import numpy as np
from evaluate import RESULTS, save
from replicas import Costs, Request, simulate
from routers import DEFAULT, ROUTERS

COUNTS = (4, 32, 256)
LOADS = (0.5, 0.8, 1.0)
"""Requests a second and replica, in relation to what a replica answers at most if mixes come at random."""
KINDS = {"single prompts": 1.0, "conversations": 4.0}
"""Mean number of turns."""
PAUSE_S = 5.0
"""Mean seconds between an answer and the next turn."""
HORIZON_S, HORIZON_TALK_S, WARM_UP = 12.0, 30.0, 0.4
"""Simulated seconds of single prompts and of conversations, with fewer than 64 replicas up to 8 times as long, and
the share of them that is not counted."""
STUDENT = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5 % quantile of Student's t by degrees of freedom."""


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
        total = sum(1 / rank for rank in range(1, len(names) + 1))
        self.shares = {name: 1 / rank / total for rank, name in enumerate(names, 1)}
        self._mixes, self._lengths = list(self.shares), [tokens[name] for name in names]

    def requests(self, rate: float, horizon: float) -> Iterator[Request]:
        """Yield first turns; with all later turns they arrive at ``rate`` a second."""
        rng, now = self._rng, 0.0
        shares = np.cumsum(list(self.shares.values()))[:-1]
        for conversation in itertools.count():
            now += rng.exponential(self._turns / rate)
            if now > horizon:
                return
            skill = int(np.searchsorted(shares, rng.random()))
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


def batch_seconds(found: Mapping[str, Any]) -> float:
    """Simulated seconds of the batch that service_times.py measured: its prompts, sorted by mix."""
    costs = Costs.measured(found)
    lengths = [
        (mix, *pair) for split in found["tokens"].values() for mix in sorted(split) for pair in split[mix]
    ]
    requests = [Request(0.0, mix, i, prompt, answer) for i, (mix, prompt, answer) in enumerate(lengths)]
    return max(request.end for request in simulate(requests, costs, 1, lambda *_: 0))


def times(answered: Sequence[Request], horizon: float) -> dict[str, float]:
    """Mean and 99th percentile of seconds to the end, and mean seconds to the first token."""
    counted = [r for r in answered if WARM_UP * horizon < r.arrival < horizon]
    whole = np.array([r.end - r.arrival for r in counted])
    first = np.array([r.first - r.arrival for r in counted])
    return {
        "mean_s": float(whole.mean()),
        "p99_s": float(np.quantile(whole, 0.99)),
        "first_s": float(first.mean()),
    }


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean of independent runs, and half the width of its 95 % interval."""
    n = len(values)
    half = STUDENT[n - 1] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return {"mean": round(statistics.fmean(values), 4), "half": round(half, 4)}


def run(
    found: Mapping[str, Any], name: str, n_replicas: int, load: float, turns: float, seed: int
) -> dict[str, float]:
    """Times under one router; the arrivals depend on the seed alone."""
    costs = Costs.measured(found)
    horizon = (HORIZON_S if turns == 1 else HORIZON_TALK_S) * max(1.0, min(8.0, 64 / n_replicas))
    rate = load * n_replicas * capacity(Traffic(found["tokens"]["dev"], seed, turns), costs)
    traffic = Traffic(found["tokens"]["dev"], seed, turns)
    router = ROUTERS[name](n_replicas, seed, traffic.shares)
    return times(simulate(list(traffic.requests(rate, horizon)), costs, n_replicas, router), horizon)


def compare(
    found: Mapping[str, Any], n_replicas: int, load: float, turns: float, seeds: int
) -> dict[str, Any]:
    """All routers at the same arrivals: figures by router, ratios to the default by seed."""
    runs = {
        name: [run(found, name, n_replicas, load, turns, seed) for seed in range(seeds)] for name in ROUTERS
    }
    return {
        name: {
            **{what: round(statistics.fmean(row[what] for row in done), 4) for what in done[0]},
            "ratio": interval([a["mean_s"] / b["mean_s"] for a, b in zip(done, runs[DEFAULT], strict=True)]),
            "ratio_p99": interval(
                [a["p99_s"] / b["p99_s"] for a, b in zip(done, runs[DEFAULT], strict=True)]
            ),
        }
        for name, done in runs.items()
    }


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """Lines of a table in Markdown for each kind of traffic: mean seconds of the default, ratios of the others."""
    for kind in KINDS:
        cases = {
            f"{n} at {load}": result[kind][key]
            for n, load in itertools.product(sorted(COUNTS), LOADS)
            if (key := f"{n} replicas, load {load}") in result[kind]
        }
        yield f"\n| {kind} | " + " | ".join(cases) + " |"
        yield "|---" * (len(cases) + 1) + "|"
        yield (
            f"| {DEFAULT} | "
            + " | ".join(f"{case[DEFAULT]['mean_s']:.2f} s" for case in cases.values())
            + " |"
        )
        for name in (name for name in ROUTERS if name != DEFAULT):
            ratios = (case[name]["ratio"] for case in cases.values())
            yield f"| {name} | " + " | ".join(f"{r['mean']:.2f} ± {r['half']:.2f}" for r in ratios) + " |"


@click.command()
@click.option("--replicas", multiple=True, type=int, default=COUNTS, show_default=True)
@click.option("--seeds", type=click.IntRange(2, len(STUDENT)), default=5, show_default=True)
def main(replicas: tuple[int, ...], seeds: int) -> None:
    """Simulate, and write the results to results.json; those of other numbers of replicas are kept."""
    known = json.loads(RESULTS.read_text())
    found, result = known["service times"], known.get("routing of requests", {})
    simulated, measured = batch_seconds(found), found["batch"]["s"]
    click.echo(
        f"the batch of {found['batch']['prompts']}: simulated {simulated:.1f} s, measured {measured:.1f} s"
    )
    result["batch"] = {"simulated_s": simulated, "measured_s": measured}
    for kind, turns in KINDS.items():
        for n, load in itertools.product(replicas, LOADS):
            result.setdefault(kind, {})[f"{n} replicas, load {load}"] = compare(found, n, load, turns, seeds)
            click.echo(f"{kind}, {n} replicas, load {load}", err=True)
    save("routing of requests", result)
    click.echo("\n".join(table(result)))


if __name__ == "__main__":
    main()
