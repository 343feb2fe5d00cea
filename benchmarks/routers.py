"""Routers of simulate_routing.py: each chooses a replica for a request, by what a router of Ray Serve can know.

A router sees the number of ongoing requests of each replica, the request's mix and its conversation.
"""

from __future__ import annotations

import itertools
import math
import random
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

MAX_ONGOING = 8
"""Requests that a replica accepts before a router of Serve tries another one (``max_ongoing_requests``)."""
BOUND = 1.25
"""Requests of a replica in relation to the mean, up to which affinity counts."""
FALLBACKS = 2  # as in Serve's ConsistentHashRouter


class Loaded(Protocol):
    """A replica as a router sees it."""

    ongoing: int
    mixes: Counter[str]


Router = Callable[[Any, Sequence[Any]], int]
Shares = Mapping[str, float]


def fewest(indices: Sequence[int], replicas: Sequence[Loaded]) -> int:
    """The index of the replica with the fewest ongoing requests, the first of equals."""
    return min(indices, key=lambda i: replicas[i].ongoing)


def round_robin(n: int, seed: int, shares: Shares) -> Router:
    """Each replica in turn."""
    turn = itertools.cycle(range(n))
    return lambda request, replicas: next(turn)


def two_choices(n: int, seed: int, shares: Shares) -> Router:
    """The less loaded of two random replicas: Serve's default."""
    rng = random.Random(seed)
    return lambda request, replicas: fewest(rng.sample(range(n), 2) if n > 1 else [0], replicas)


def least_loaded(n: int, seed: int, shares: Shares) -> Router:
    """The least loaded of all replicas, a random one of equals."""
    rng = random.Random(seed)
    return lambda request, replicas: fewest(rng.sample(range(n), n), replicas)


def by_mix(n: int, seed: int, shares: Shares) -> Router:
    """Replicas of its own for each mix, as many as its share of requests; two choices among them."""
    rng, groups, given = random.Random(seed), {}, [0.0] * n
    for mix, share in sorted(shares.items(), key=lambda item: -item[1]):
        size = max(1, round(share * n))
        groups[mix] = sorted(range(n), key=lambda i: given[i])[:size]
        for i in groups[mix]:
            given[i] += share / size
    return lambda request, replicas: fewest(
        rng.sample(groups[request.mix], min(2, len(groups[request.mix]))), replicas
    )


def session_hash(n: int, seed: int, shares: Shares) -> Router:
    """Serve's ConsistentHashRouter: a conversation's replica, or the next two where that accepts no more."""

    def choose(request: Any, replicas: Sequence[Loaded]) -> int:
        ranked = list(itertools.islice(_ring(request.conversation, n), 1 + FALLBACKS))
        accepting = [i for i in ranked if replicas[i].ongoing < MAX_ONGOING]
        return accepting[0] if accepting else fewest(ranked, replicas)

    return choose


def multiplexed(n: int, seed: int, shares: Shares) -> Router:
    """Serve's multiplexing with the mix as model: replicas that have it, else those with the fewest models."""
    rng = random.Random(seed)
    models: list[OrderedDict[str, None]] = [OrderedDict() for _ in range(n)]

    def choose(request: Any, replicas: Sequence[Loaded]) -> int:
        held = [i for i in range(n) if request.mix in models[i]]
        least = min(map(len, models))
        ranks = (held, [i for i in range(n) if len(models[i]) == least], range(n))
        for rank in ranks:
            chosen = fewest(rng.sample(rank, min(2, len(rank))), replicas) if rank else None
            if chosen is not None and replicas[chosen].ongoing < MAX_ONGOING:
                break
        else:
            chosen = fewest(rng.sample(range(n), min(2, n)), replicas)
        models[chosen][request.mix] = None
        models[chosen].move_to_end(request.mix)
        if len(models[chosen]) > 3:
            models[chosen].popitem(last=False)
        return chosen

    return choose


def mix_affinity(n: int, seed: int, shares: Shares) -> Router:
    """The least loaded replica that has answers of the mix, unless it is too full; else the least loaded of all."""
    rng = random.Random(seed)

    def choose(request: Any, replicas: Sequence[Loaded]) -> int:
        room = _room(replicas)
        same = [i for i in range(n) if replicas[i].mixes[request.mix] and replicas[i].ongoing < room]
        return fewest(same or rng.sample(range(n), n), replicas)

    return choose


def prefix_hash(n: int, seed: int, shares: Shares) -> Router:
    """Consistent hashing of the conversation with bounded loads."""

    def choose(request: Any, replicas: Sequence[Loaded]) -> int:
        room = _room(replicas)
        return next(i for i in _ring(request.conversation, n) if replicas[i].ongoing < room)

    return choose


def sticky(n: int, seed: int, shares: Shares) -> Router:
    """The replica of the conversation's last turn, if that accepts more; else, and at first, the least loaded."""
    last: dict[int, int] = {}
    fallback = least_loaded(n, seed, shares)

    def choose(request: Any, replicas: Sequence[Loaded]) -> int:
        chosen = last.get(request.conversation)
        if chosen is None or replicas[chosen].ongoing >= MAX_ONGOING:
            chosen = last[request.conversation] = fallback(request, replicas)
        return chosen

    return choose


def _room(replicas: Sequence[Loaded]) -> int:
    """Requests that a replica may have, so that all together have room for one more."""
    return math.ceil(BOUND * (1 + sum(replica.ongoing for replica in replicas)) / len(replicas))


def _ring(key: object, n: int) -> Iterator[int]:
    """All replicas in the order in which they are tried for a key."""
    start = zlib.crc32(str(key).encode())
    return ((start + i) % n for i in range(n))


DEFAULT = "two choices"
ROUTERS: dict[str, Callable[[int, int, Shares], Router]] = {
    "round robin": round_robin,
    DEFAULT: two_choices,
    "least loaded": least_loaded,
    "by mix": by_mix,
    "mix affinity": mix_affinity,
    "multiplexed by mix": multiplexed,
    "by prefix": session_hash,
    "by prefix, bounded load": prefix_hash,
    "by prefix, else least loaded": sticky,
}
