"""One training of a gate: states of its requests, heads on them, calibration, and the file that is served."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from loramix.defaults import BASE
from loramix.errors import SelfCheckFailed, UsageError
from loramix.formats.validate import BaseShape
from loramix.models import bases, message_reading
from loramix.models.early_head import EarlyHead
from loramix.models.gate_bank import Bank
from loramix.models.gate_window import READ_TOKENS
from loramix.models.head_info import HeadInfo
from loramix.pack.edit import NewGate
from loramix.paths import need_space
from loramix.runtime.children import token_states
from loramix.runtime.state_parts import Turns
from loramix.train.gate_composed import CLAUSE
from loramix.train.gate_pieces import OTHER, UNKNOWN, Request, read_turns
from loramix.train.gate_scores import Scores, probabilities_of, score, temperature_of, threshold_of
from loramix.train.head_average import averaged
from loramix.train.head_fit import FitSettings, decide, fit, unlike
from loramix.train.head_model import TorchHead
from loramix.train.head_states import TokenStates

T = TypeVar("T")
Result = TypeVar("Result")
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
WIDTH, DEPTH = 128, 2
BANK = 6000
"""Most prompts in the bank, so that it stays below 2.5 MB."""
TOLERANCE = 2e-3
"""Largest difference of a logit between torch and NumPy."""
SEARCH_PASSES = 4.0


@dataclass(frozen=True, slots=True)
class Requests:
    """Requests with their states: those to train on, then those to choose on."""

    requests: Sequence[Request]
    states: TokenStates
    n_train: int
    layers: tuple[int, ...]
    """Those that the states are of."""

    def of_layers(self, layers: Sequence[int]) -> Requests:
        """The same with the states of some of the layers."""
        rows = [self.states.layers[self.layers.index(layer)] for layer in layers]
        return replace(self, states=replace(self.states, layers=rows), layers=tuple(layers))

    @property
    def train(self) -> Ints:
        """Rows to train on."""
        return np.arange(self.n_train)

    @property
    def dev(self) -> Ints:
        """Rows to choose on."""
        return np.arange(self.n_train, len(self.requests))

    @property
    def typed(self) -> Ints:
        """Rows to calibrate on: those of `dev` that a user could type, so no clauses."""
        return np.asarray([i for i in self.dev if self.requests[i].kind != CLAUSE])


def targets_of(requests: Sequence[Request], skills: Sequence[str]) -> Floats:
    """Target probabilities (B, K+1) float32; the last column is the base."""
    names = [*skills, BASE]
    return np.asarray([[request.target.get(name, 0.0) for name in names] for request in requests], np.float32)


def groups_of(requests: Sequence[Request]) -> npt.NDArray[np.int32]:
    """A number a wording, (B,) int32."""
    numbers = {group: i for i, group in enumerate(dict.fromkeys(request.group for request in requests))}
    return np.asarray([numbers[request.group] for request in requests], np.int32)


def tag_names(skills: Sequence[str]) -> list[str]:
    """Names of the token tags: neither, text, an instruction of each class, and words for the answer before."""
    return [message_reading.OTHER, message_reading.TEXT, *skills, BASE, message_reading.ANSWER]


def turns_of(request: Request, skills: Sequence[str]) -> Turns:
    """The messages of a request that the gate reads, with the number of each piece's tag."""
    numbers = {name: i for i, name in enumerate(tag_names(skills))} | {OTHER: 0, UNKNOWN: -1}
    return [
        (turn.role, [(p.text, numbers.get(p.tag, -1)) for p in turn.pieces]) for turn in read_turns(request)
    ]


@dataclass(frozen=True, slots=True)
class Run:
    """A training of a gate.

    Args:
        base: GGUF file.
        shape: of the base.
        skills: the classes but the last one.
        base_sha256: of the base.
        out: directory for states and checkpoints.
        settings: how heads are trained.
        start: a gate to begin with instead of random numbers.
    """

    base: Path
    shape: BaseShape
    skills: Sequence[str]
    base_sha256: str
    out: Path
    settings: FitSettings
    start: EarlyHead | None = None

    def read(
        self, train: Sequence[Request], dev: Sequence[Request], layers: Sequence[int]
    ) -> Generator[str, None, Requests]:
        """Compute the states of requests, or find those that an earlier run computed."""
        requests = [*train, *dev]
        turns = [turns_of(request, self.skills) for request in requests]
        key = json.dumps([bases.digest(self.base), list(layers), turns]).encode("utf-8", "replace")
        directory = self.out / "states" / hashlib.sha256(key).hexdigest()[:16]
        directory.mkdir(parents=True, exist_ok=True)
        tokens = sum(min(READ_TOKENS, 12 + sum(len(p) for _, ps in t for p, _ in ps) // 3) for t in turns)
        need_space(directory, tokens * self.shape.n_embd * 2 * len(layers), "states of the gate's prompts")
        wordings = len({request.group for request in requests})
        yield f"{len(requests)} prompts of {wordings} wordings; states at the inputs of layers {list(layers)}"
        began = time.monotonic()
        for done in token_states(self.base, turns, layers, directory):
            left = (time.monotonic() - began) / done * (len(requests) - done)
            yield f"{done} of {len(requests)} prompts read, {left / 60:.1f} min left"
        data = TokenStates.load(directory, layers, targets_of(requests, self.skills))
        return Requests(requests, data, len(train), tuple(layers))

    def head(
        self, data: Requests, layers: Sequence[int], settings: FitSettings
    ) -> Generator[str, None, TorchHead]:
        """Train a head.

        Raises:
            UsageError: the gate to begin with has other skills, sizes or layers.
        """
        info = HeadInfo(
            skills=list(self.skills),
            layers=list(layers),
            width=self.shape.n_embd,
            d=WIDTH,
            depth=DEPTH,
            tags=tag_names(self.skills),
            base_sha256=self.base_sha256,
        )
        if self.start and (why := unlike(self.start.info, info)):
            raise UsageError(f"the pack's gate cannot be trained further: {why}; train without --continue.")
        name = "-".join(map(str, layers))
        directory = self.out / f"checkpoints-{name}"
        loop = fit(data.states, data.train, info, settings, start=self.start, checkpoints=directory)
        began, first = time.monotonic(), 0
        while True:
            try:
                progress = next(loop)
            except StopIteration as end:
                head: TorchHead = end.value
                return head
            first = first or progress.step
            if progress.step % 100 == 0 or progress.step == progress.steps:
                speed = (time.monotonic() - began) / max(1, progress.step - first + 1)
                left = speed * (progress.steps - progress.step) / 60
                yield (
                    f"step {progress.step}/{progress.steps}: loss {progress.loss:.3f}, {left:.1f} min left"
                )

    def search(
        self, data: Requests, compared: Sequence[tuple[int, ...]]
    ) -> Generator[str, None, tuple[int, ...]]:
        """Train a head on each of several sets of layers for a few passes; the best one."""
        yield "| layers | accuracy | skill to base | none to base | calibration error |"
        yield "|---|---|---|---|---|"
        best, chosen = -1.0, compared[0]
        for layers in compared:
            part = data.of_layers(layers)
            settings = replace(self.settings, passes=SEARCH_PASSES)
            head = drained(self.head(part, layers, settings), lambda line: None)
            _, s = calibrated(
                head.info, decide(head, part.states, part.typed)[0], part.states.targets[part.typed]
            )
            yield (
                f"| {', '.join(map(str, layers))} | {s.accuracy:.4f} | {s.skill_to_base:.4f} "
                f"| {s.none_to_base:.4f} | {s.calibration_error:.4f} |"
            )
            if s.accuracy > best:
                best, chosen = s.accuracy, layers
        return chosen

    def gate(self, data: Requests, layers: Sequence[int]) -> Generator[str, None, tuple[NewGate, Scores]]:
        """Train, calibrate and convert a gate; its bank holds a part of the training's prompts."""
        data = data.of_layers(layers)
        head = yield from self.head(data, layers, self.settings)
        if self.start:
            head = yield from averaged(self.start, head, data.states, data.dev, self.settings)
        info, scores = calibrated(
            head.info, decide(head, data.states, data.typed)[0], data.states.targets[data.typed]
        )
        rows = np.sort(np.random.default_rng(self.settings.seed).permutation(data.n_train)[:BANK])
        _, pooled = decide(head, data.states, rows)
        targets, groups = data.states.targets[rows], groups_of([data.requests[i] for i in rows])
        served = EarlyHead(
            msgspec.structs.replace(info, metrics={**info.metrics, "prompts": data.n_train}), head.arrays()
        )
        yield f"NumPy within {difference(head, served, data.states, data.dev[:20]):.0e}"
        bank = Bank.of(pooled, targets, groups, [*self.skills, BASE], keep=served.arrays["out.weight"])
        return NewGate(served.to_bytes(), bank.to_bytes()), scores


def drained(loop: Generator[T, None, Result], each: Callable[[T], None]) -> Result:
    """Pass all that a generator yields to a function, and return what the generator returns."""
    while True:
        try:
            each(next(loop))
        except StopIteration as end:
            found: Result = end.value
            return found


def calibrated(info: HeadInfo, logits: Floats, targets: Floats) -> tuple[HeadInfo, Scores]:
    """A head's description with temperature, threshold and scores on prompts that it was not trained on.

    Requests for several things are left out: how sure the gate is of one class is to be right where there is one.

    Args:
        info: as trained.
        logits: (N, K+1).
        targets: (N, K+1).
    """
    single = targets.max(1) > 0.999
    logits, targets = logits[single], targets[single]
    temperature = temperature_of(logits, targets)
    probabilities = probabilities_of(logits, temperature)
    threshold = threshold_of(probabilities, targets)
    scores = score(probabilities, targets, threshold)
    metrics = {
        "held_out_accuracy": scores.accuracy,
        "held_out_skill_to_base": scores.skill_to_base,
        "held_out_none_to_base": scores.none_to_base,
        "held_out_calibration_error": scores.calibration_error,
    }
    found = msgspec.structs.replace(info, temperature=temperature, threshold=threshold, metrics=metrics)
    return found, scores


def difference(head: TorchHead, served: EarlyHead, data: TokenStates, rows: Ints) -> float:
    """Largest difference of a logit between torch and NumPy.

    Raises:
        SelfCheckFailed: it is above `TOLERANCE`.
    """
    exact, _ = decide(head, data, rows)
    worst = 0.0
    for i, row in enumerate(rows):
        batch = data.batch(np.asarray([row]))
        found = served(batch.states[0].numpy()).logits
        worst = max(worst, float(np.abs(found - exact[i]).max()))
    if worst > TOLERANCE:
        raise SelfCheckFailed(
            f"the gate's logits differ by {worst:.2g} between torch and NumPy; at most {TOLERANCE} is allowed. "
            "Run 'loramix doctor'."
        )
    return worst
