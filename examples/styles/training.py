"""Training that resumes: a loop with checkpoints each minute, for base, adapters and judge alike.

Knows nothing about what is trained. A batch depends on seed and step alone, so a resumed run repeats no random
numbers and gives the same weights as one that was never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from loramix.paths import atomic_path

SAVE_EVERY_S = 60.0

Loss = Callable[[int], torch.Tensor]


def rate_at(step: int, steps: int, peak: float, warmup: int = 50) -> float:
    """Learning rate: linear warm-up, then a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return float(peak * 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi))))


def run(
    parameters: Sequence[torch.nn.Parameter],
    loss_of_step: Loss,
    *,
    steps: int,
    peak: float,
    checkpoint: Path,
    note: Callable[[str], None] = print,
    save_every_s: float = SAVE_EVERY_S,
) -> float:
    """Train, from the checkpoint where there is one.

    Args:
        parameters: what is trained.
        loss_of_step: computes the loss of a step, a scalar.
        steps: optimizer steps altogether.
        peak: highest learning rate.
        checkpoint: safetensors file with parameters and optimizer state; the caller deletes it.
        note: receives a line of progress now and then.
        save_every_s: seconds between checkpoints.

    Returns:
        CPU seconds of all steps, those before a restart included.
    """
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.0)
    first, spent = _resumed(checkpoint, parameters, optimizer)
    began, saved = time.process_time() - spent, time.monotonic()
    losses: list[float] = []
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps, peak)
        loss = loss_of_step(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            mean = sum(losses) / len(losses)
            note(f"step {step + 1} of {steps}: loss {mean:.4f}, {time.process_time() - began:.0f} CPU s")
            losses.clear()
        if time.monotonic() - saved > save_every_s and step + 1 < steps:
            _save(checkpoint, parameters, optimizer, step + 1, time.process_time() - began)
            saved = time.monotonic()
    return time.process_time() - began


def _save(
    path: Path,
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    step: int,
    spent: float,
) -> None:
    tensors = {f"value.{i}": value.detach().contiguous() for i, value in enumerate(parameters)}
    for i, value in enumerate(parameters):
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{i}"] = optimizer.state[value][key].contiguous()
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"step": str(step), "cpu_s": f"{spent:.1f}"})


def _resumed(
    path: Path, parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Load a checkpoint; next step and CPU seconds so far."""
    if not path.exists():
        return 0, 0.0
    with safe_open(path, "pt") as file, torch.no_grad():
        about = file.metadata()
        step = int(about["step"])
        for i, value in enumerate(parameters):
            value.copy_(file.get_tensor(f"value.{i}"))
            optimizer.state[value] = {
                "step": torch.tensor(float(step)),
                "exp_avg": file.get_tensor(f"exp_avg.{i}"),
                "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{i}"),
            }
    return step, float(about["cpu_s"])
