"""The learning rate of each optimizer step: warm-up, cosine decay, and both again in each round."""

from __future__ import annotations

import bisect
import math

from loramix.train.recipe import Training


class Schedule:
    """The rates of one run.

    Args:
        settings: maximum rate, share of warm-up, number of rounds.
        steps: optimizer steps of a complete run.
        last: step after which the run stops; if it is less than ``steps``, the rate decays over the last quarter
            before it.
    """

    def __init__(self, settings: Training, steps: int, last: int) -> None:
        self.settings, self.steps, self.last = settings, steps, last
        parts = settings.parts[:steps]
        self.bounds = [round(steps * sum(parts[:i]) / sum(parts)) for i in range(len(parts) + 1)]

    def is_start(self, step: int) -> bool:
        """Return whether a round starts at this step, counted from 0."""
        return step in self.bounds

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        number = bisect.bisect_right(self.bounds, step)
        begin, end = self.bounds[number - 1 : number + 1]
        done, steps = step - begin, end - begin
        warm = max(1, round(steps * self.settings.warmup))
        if done < warm:
            return self.settings.learning_rate * (done + 1) / warm
        share = (done - warm) / max(1, steps - warm)
        rate = self.settings.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))
        if self.last < self.steps:
            rate *= min(1.0, max(0.1, (self.last - step) / (0.25 * self.last)))
        return rate
