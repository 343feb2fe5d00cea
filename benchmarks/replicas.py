"""A server's replicas as a discrete-event simulation: engine, scheduler and KV cache, without tokens.

Answers of one mix share a decoding step, mixes take turns as in the server, one prompt is prefilled at a time, and KV
of earlier turns is kept by mix and conversation. Knows nothing of how a router chooses a replica.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np

from loramix.runtime.mix_turns import Turns


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
            prompt=(max(float(intercept), 0.0) + found["routing_ms"]) / 1000,
            prompt_token=float(slope) / 1000,
            single=found["single_ms"] / 1000,
            step=tuple((steps / 1000).tolist()),
            change=found["change_of_mix_ms"] / 1000,
            cache_tokens=int(found["kv_store_tokens"]),
        )


@dataclass(slots=True, eq=False)
class Request:
    """One turn of a conversation; most have a single turn."""

    arrival: float
    mix: str
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
        self.answers: dict[str, list[Request]] = {}
        self.ending: list[Request] = []
        self.ongoing = 0
        """Waiting and running requests."""
        self.mixes: Counter[str] = Counter()
        """The same by mix."""
        self._turns = Turns()  # the server's own; mixes are names here, which hash faster
        self._mix: str | None = None
        self._kv: OrderedDict[tuple[str, int], float] = OrderedDict()
        self._kv_tokens = 0.0

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
        if self.waiting and self.ongoing - len(self.waiting) < len(costs.step) - 1:
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
            mix = cast("str", self._turns.next(cast("Any", sizes), cast("Any", self._mix)))
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
        self._kv_tokens += request.prompt + request.answer - self._kv.pop(key, 0.0)
        self._kv[key] = request.prompt + request.answer
        while self._kv_tokens > self.costs.cache_tokens:
            self._kv_tokens -= self._kv.popitem(last=False)[1]


def simulate(
    requests: Sequence[Request],
    costs: Costs,
    n_replicas: int,
    router: Callable[[Request, Sequence[Replica]], int],
) -> list[Request]:
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
