"""Trains one adapter on a frozen base from a recipe and rows, and writes a PEFT directory.

Batches are a pure function of (seed, epoch), so that a run resumed from its last checkpoint gives the same numbers
as an uninterrupted one.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from loramix.convert.base_model import autocast_dtype, device, digest, load_base, quiet
from loramix.errors import Busy, UsageError
from loramix.paths import sha256_file, write_text
from loramix.train import checkpoint
from loramix.train.activated_lora import late_states
from loramix.train.data import Example, Row, batches, micro_batches, take
from loramix.train.examples import common_prefix, header_of, prepare
from loramix.train.forward import collate, hidden_states
from loramix.train.memory import BatchShape, checkpoint_layers, is_short
from loramix.train.metrics import kept
from loramix.train.peft_model import attach
from loramix.train.recipe import Recipe
from loramix.train.schedule import Schedule


@dataclass(frozen=True)
class Progress:
    """Progress after an optimizer step."""

    step: int
    steps: int
    loss: float
    """Mean loss over the step's answer tokens, in nats."""
    tokens_per_second: float
    seconds_per_step: float
    note: str = ""
    best: Mapping[str, Any] | None = None
    """The lowest ``loss`` on dev so far, with its ``exact`` and ``step``."""


@dataclass(frozen=True)
class Result:
    """A finished training run: the PEFT directory and the results on dev."""

    directory: Path
    dev_loss: float
    dev_exact: float
    seconds: float
    base_digest: str
    rows: int
    """Number of training rows used at least once."""


def train_skill(
    recipe: Recipe,
    rows: Sequence[Row],
    base: Path,
    out: Path,
    *,
    resume: bool = False,
    max_rows: int | None = None,
    max_steps: int | None = None,
    checkpointing: bool | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda line: None,
) -> Result:
    """Train a recipe's adapter and keep the checkpoint with the lowest dev loss.

    Args:
        recipe: the recipe.
        rows: labelled rows with splits ``train`` and ``dev``.
        base: a GGUF or a Hugging Face directory; frozen, never written.
        out: directory for checkpoints, log and the PEFT adapter.
        resume: resume from the newest complete checkpoint.
        max_rows: maximum number of training rows.
        max_steps: maximum number of optimizer steps; the learning rate decays over the last quarter of them.
        checkpointing: recompute activations instead of keeping them; by default only if memory is short.
        report: progress callback, called after each step.
        say: callback for messages on rows that are dropped.

    Raises:
        InvalidData: too many rows are longer than ``max_length``.
        Busy: another process is training in ``out``.
        UsageError: ``out`` has an earlier run and ``resume`` is false, or the run has other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0.5):
            return _Run(recipe, rows, base, out, max_rows, say).train(
                resume, max_steps, checkpointing, report
            )
    except Timeout:
        raise Busy(
            f"another process is training in {out}; wait until it ends, or give another --out."
        ) from None


class _Run:
    def __init__(
        self,
        recipe: Recipe,
        rows: Sequence[Row],
        base: Path,
        out: Path,
        max_rows: int | None,
        say: Callable[[str], None],
    ) -> None:
        self.recipe, self.out, self.base = recipe, out, base
        self.settings = recipe.training
        train_rows = take(kept(rows, recipe), "train", max_rows, self.settings.seed)
        dev_rows = take(rows, "dev", self.settings.dev_rows, self.settings.seed)
        *passes, dev = prepare(recipe, train_rows, dev_rows, base, say)
        self.epochs, self.dev, n = passes, dev, len(passes[0])
        self.prefix = common_prefix([*itertools.chain(*passes), *dev])
        self.header = header_of(base) if recipe.activation == "answer" else []
        self.per_epoch = math.ceil(n / self.settings.batch_size)
        self.steps = max(1, round(self.per_epoch * self.settings.epochs))

    def train(
        self,
        resume: bool,
        max_steps: int | None,
        checkpointing: bool | None,
        report: Callable[[Progress], None],
    ) -> Result:
        torch.manual_seed(self.settings.seed)
        last = min(self.steps, max_steps or self.steps)
        self.schedule = Schedule(self.settings, self.steps, last)
        self.dtype = autocast_dtype()
        base = load_base(self.base, self.dtype)
        before = digest(base)
        self.model = attach(base, self.recipe.lora)
        if not self.header:  # gradients of an activated adapter pass only the answer, over a KV cache
            if checkpointing is None:
                shapes = {BatchShape.of(part, self.prefix) for _, parts in self._batches() for part in parts}
                checkpointing = is_short(self.model, shapes, self.dtype)
            if checkpointing:
                checkpoint_layers(self.model)
                self.prefix = 0
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )
        self.best: dict[str, Any] = {"loss": math.inf, "exact": 0.0, "step": 0}
        self.best_tensors = {n: p.detach().clone() for n, p in self.parameters.items()}
        start = self._resume(resume)
        began, spent = time.monotonic(), 0
        for step, batch in itertools.islice(self._batches(), start, last):
            loss, tokens = self._step(step, batch)
            spent += tokens
            done, note = step + 1, ""
            if done % self.settings.evaluate_every == 0 or done == last:
                note = self._evaluate(done)
            if done % self.settings.save_every == 0 or done == last:
                self._save(done)
            elapsed = time.monotonic() - began
            rate = spent / elapsed
            report(Progress(done, self.steps, loss, rate, elapsed / (done - start), note, self.best))
            self._log({"step": done, "loss": loss, "tokens_per_second": round(rate), "note": note})
        if digest(self.model) != before:
            raise AssertionError("a base weight changed in training")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.best_tensors[name])
        directory, seconds = self._export(), time.monotonic() - began
        rows = min(len(self.epochs[0]), last * self.settings.batch_size)
        return Result(directory, self.best["loss"], self.best["exact"], seconds, before, rows)

    def _batches(self) -> Iterator[tuple[int, list[list[Example]]]]:
        """Yield (step, micro-batches) of the run, a pure function of the seed."""
        step = itertools.count()
        for epoch, examples in enumerate(self.epochs):
            lengths = [len(example.ids) for example in examples]
            rng = np.random.default_rng([self.settings.seed, epoch])
            for batch in batches(lengths, self.settings.batch_size, rng):
                parts = micro_batches(batch, lengths, self.settings.micro_batch_tokens)
                yield next(step), [[examples[i] for i in part] for part in parts]

    def _step(self, step: int, parts: list[list[Example]]) -> tuple[float, int]:
        """Run one optimizer step; return the mean loss and the number of tokens."""
        self.model.train()
        if self.schedule.is_start(step):
            self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(step)
        answers = sum(example.n_answer for part in parts for example in part)
        total = 0.0
        for part in parts:
            loss, _ = self._loss(part)
            (loss / answers).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total / answers, sum(len(example.ids) for part in parts for example in part)

    def _loss(self, part: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the summed loss over the answers, and whether each answer is the greedy one, (B,) bool."""
        base = self.model.get_base_model()
        with torch.autocast(device().type, self.dtype, enabled=self.dtype != torch.float32):
            if self.header:
                hidden, ids, answer = late_states(self.model, part, len(self.header), self.prefix)
            else:
                ids, mask, answer = collate(part)
                hidden = hidden_states(base.model, ids, mask, self.prefix)
                ids, answer = ids[:, self.prefix :], answer[:, self.prefix :]
            # the head runs only on answer positions, a fifth of the work with a vocabulary of 49k
            logits = base.lm_head(hidden[:, :-1][answer])
        labels = ids[:, 1:][answer]
        loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        wrong = torch.zeros(len(part), device=ids.device)
        wrong.index_add_(0, answer.nonzero()[:, 0], (logits.argmax(-1) != labels).float())
        return loss, wrong == 0

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _evaluate(self, step: int) -> str:
        self.model.eval()
        order = sorted(range(len(self.dev)), key=lambda i: len(self.dev[i].ids))
        lengths = [len(example.ids) for example in self.dev]
        total, exact = 0.0, 0
        for part in micro_batches(np.asarray(order), lengths, 2 * self.settings.micro_batch_tokens):
            loss, right = self._loss([self.dev[i] for i in part])
            total, exact = total + loss.item(), exact + int(right.sum())
        mean = total / sum(example.n_answer for example in self.dev)
        share = exact / len(self.dev)
        if mean < self.best["loss"]:
            self.best = {"loss": mean, "exact": share, "step": step}
            self.best_tensors = {n: p.detach().clone() for n, p in self.parameters.items()}
        return f"dev loss {mean:.4f}, dev exact {share:.3f}"

    def _save(self, step: int) -> None:
        moments = self.optimizer.state_dict()["state"]
        flat = {
            f"{i}.{key}": torch.as_tensor(value) for i, part in moments.items() for key, value in part.items()
        }
        tensors = {
            "adapter": self.parameters,
            "best": self.best_tensors,
            "optimizer": flat,
            "random": {"torch": torch.get_rng_state()},
        }
        checkpoint.save(self.out / "checkpoints", step, tensors, {"best": self.best, "run": self._identity()})

    def _resume(self, resume: bool) -> int:
        found = checkpoint.latest(self.out / "checkpoints")
        if found is None:
            return 0
        if not resume:
            raise UsageError(
                f"{self.out} has a run at step {found.step}; resume it with --resume, or give another --out."
            )
        if found.state["run"] != self._identity():
            raise UsageError(f"{self.out} has a run with another recipe, data or base; give another --out.")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(found.tensors["adapter"][name])
        self.best_tensors, self.best = dict(found.tensors["best"]), found.state["best"]
        state = self.optimizer.state_dict()
        for key, value in found.tensors["optimizer"].items():
            index, _, name = key.partition(".")
            state["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(state)
        torch.set_rng_state(found.tensors["random"]["torch"])
        return found.step

    def _identity(self) -> str:
        """Return the settings that must be equal to resume a run."""
        tokens = sum(int(e.ids.sum()) for epoch in self.epochs for e in epoch)
        return f"{self.recipe.fingerprint()} steps={self.steps} tokens={tokens} base={self.base.name}"

    def _export(self) -> Path:
        directory, partial = self.out / "adapter", self.out / ".adapter.partial"
        shutil.rmtree(partial, ignore_errors=True)
        # set only in the file, because in training PEFT would search for the header in each batch
        self.model.peft_config["default"].alora_invocation_tokens = self.header or None
        with quiet():
            self.model.save_pretrained(str(partial))
        base = {"name": self.base.name} | ({"sha256": sha256_file(self.base)} if self.base.is_file() else {})
        write_text(
            partial / "loramix.json", json.dumps({"skill": self.recipe.name, "base": base, **self.best})
        )
        shutil.rmtree(directory, ignore_errors=True)
        partial.replace(directory)
        return directory

    def _log(self, row: dict[str, Any]) -> None:
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
