"""Trains the adapters of several slots together: one forward pass of the base per step, one optimizer per slot.

A slot's numbers do not depend on the other slots. Knows nothing of options on the command line.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import results
from .evaluate import evaluate
from .model import Base
from .rows import PackedSequence, Rows, SkillRows, collate
from .slots import Layout, Slot, settings

CHECKS = (0.5, 0.75, 1.0)
"""Shares of a slot's steps after which it is evaluated; the check with the lowest dev loss is kept."""
WARMUP = 0.04
GRADIENT_CLIP = 1.0
REPORT_EVERY = 50
"""Steps between lines with the losses."""


def rate(highest: float, step: int, steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine decay to a tenth.

    Args:
        highest: highest rate.
        step: number of the step, from 1.
        steps: steps of the slot.
    """
    warm = max(1, round(WARMUP * steps))
    if step <= warm:
        return highest * step / warm
    share = (step - warm) / max(1, steps - warm)
    return highest * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


@dataclass
class SlotTraining:
    """One slot in training."""

    slot: Slot
    skill: SkillRows
    sequences: list[PackedSequence]
    """Training sequences in order; used again from the first if steps remain."""
    steps: int
    """Optimizer steps of the whole training."""
    parameter: torch.nn.Parameter
    """The adapter, (N,) float32, see `Layout`."""
    identity: dict[str, Any]
    """Settings that a finished result must have to be kept by another run."""
    optimizer: torch.optim.Adam = field(init=False)
    record: dict[str, Any] = field(init=False)
    best: torch.Tensor = field(init=False)
    """The adapter of the check with the lowest dev loss."""

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam([self.parameter], lr=self.slot.rate)
        self.best = self.parameter.detach().clone()
        self.record = {
            "run": self.identity,
            "slot": settings(self.slot),
            "steps": self.steps,
            "best_step": 0,
            "checks": [],
            "finished": False,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        }

    def batch(self, step: int, count: int) -> list[PackedSequence]:
        """Return the sequences of a step, counted from 0, of ``count`` sequences each."""
        return [self.sequences[i % len(self.sequences)] for i in range(step * count, (step + 1) * count)]

    def update(self, step: int) -> None:
        """Change the adapter by its gradient.

        Args:
            step: number of the step, from 1.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.slot.rate, step, self.steps)
        torch.nn.utils.clip_grad_norm_([self.parameter], GRADIENT_CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Run:
    """A run on one base.

    Args:
        base: the base.
        layout: layout of the adapters.
        out: directory of the results.
        limit: tokens of a sequence.
        n_sequences: sequences of each slot in a step.
        say: callback for progress.
    """

    def __init__(
        self,
        base: Base,
        layout: Layout,
        out: Path,
        limit: int,
        n_sequences: int,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.base, self.layout, self.out, self.say = base, layout, out, say
        self.limit, self.n_sequences = limit, n_sequences
        self.device = base.head.device
        self.began = time.monotonic()

    def losses(self, trainings: Sequence[SlotTraining], step: int) -> torch.Tensor:
        """Compute the mean loss over the answers of each slot's sequences of a step.

        Args:
            trainings: S slots.
            step: number of the step, from 0.

        Returns:
            (S,) float32, in nats a token.
        """
        sequences = [sequence for one in trainings for sequence in one.batch(step, self.n_sequences)]
        batch = collate(sequences, self.limit, self.device)
        flat = torch.stack([one.parameter for one in trainings]).to(self.base.dtype)
        hidden = self.base.hidden(batch.ids, batch.positions, batch.segments, self.layout.adapters(flat))
        learned = batch.targets >= 0  # the head runs only where an answer is predicted
        logits = self.base.logits(hidden[learned])
        each = torch.nn.functional.cross_entropy(logits, batch.targets[learned], reduction="none")
        owner = learned.nonzero()[:, 0] // self.n_sequences
        total = torch.zeros(len(trainings), device=self.device)
        counts = torch.bincount(owner, minlength=len(trainings))
        return total.index_add(0, owner, each) / counts.clamp_min(1)

    def seconds_per_step(self, trainings: Sequence[SlotTraining], trials: int = 4) -> float:
        """Measure a step of all slots without an update, after as many to warm up."""
        began = 0.0
        for step in range(2 * trials):
            if step == trials:
                self._wait()
                began = time.monotonic()
            self.losses(trainings, step).sum().backward()
            for one in trainings:
                one.parameter.grad = None
        self._wait()
        return (time.monotonic() - began) / trials

    def train(self, trainings: Sequence[SlotTraining], deadline: float = math.inf) -> None:
        """Train all slots, and write the result of each as soon as it is finished.

        Args:
            trainings: the slots.
            deadline: time of `time.monotonic` after which the remaining slots are evaluated, written as not
                finished, and left.
        """
        for one in trainings:
            one.record["start"] = self._figures(one, "dev", one.parameter)
            if one.slot.start and one.skill.test:
                one.record["start_test"] = self._figures(one, "test", one.parameter)
        active, step = list(trainings), 0
        while active:
            losses = self.losses(active, step)
            losses.sum().backward()
            step += 1
            for one in active:
                one.update(step)
            if step % REPORT_EVERY == 0:
                self.say(f"step {step}: " + ", ".join(f"{loss:.3f}" for loss in losses.tolist()))
            late = time.monotonic() > deadline
            for one in active:
                if late or step in {max(1, int(one.steps * share)) for share in CHECKS}:
                    self._check(one, step)
            active = [one for one in active if step < one.steps]
            if late and active:
                self.say(
                    f"deadline at step {step}: {', '.join(one.slot.name for one in active)} not finished"
                )
                return

    def _check(self, one: SlotTraining, step: int) -> None:
        """Evaluate a slot on dev, keep the better adapter, and write the result; with test rows if it is finished."""
        figures = self._figures(one, "dev", one.parameter)
        checks = one.record["checks"]
        if not checks or figures["loss"] < min(check["loss"] for check in checks):
            one.best = one.parameter.detach().clone()
            one.record["best_step"] = step
        checks.append({"step": step, **figures})
        one.record["finished"] = step >= one.steps
        one.record["seconds"] = round(time.monotonic() - self.began, 1)
        spent = [part for number in range(step) for part in one.batch(number, self.n_sequences)]
        one.record["tokens"] = sum(len(rows.ids[i]) for rows, numbers in spent for i in numbers)
        if one.record["finished"] and one.skill.test:
            one.record["test"] = self._figures(one, "test", one.best)
        results.save(self.out, one.slot.name, self.layout.arrays(one.best, one.slot), one.record)

    def _figures(self, one: SlotTraining, split: str, flat: torch.Tensor) -> dict[str, Any]:
        rows: Rows = getattr(one.skill, split)
        adapters = self.layout.adapters(flat.detach()[None].to(self.base.dtype))
        figures: dict[str, Any] = evaluate(self.base, adapters, rows, one.skill.label_tokens, self.limit)
        plain = {key: round(value, 4) for key, value in figures.items() if isinstance(value, float)}
        self.say(f"{one.slot.name} {split}: " + ", ".join(f"{key} {value}" for key, value in plain.items()))
        return figures

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
