"""Training the base on the plain font, and one adapter a style on that style's font.

The base is frozen before the first adapter; each adapter is trained alone and knows nothing of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from . import model, training
from .fonts import BASE_FONT, STYLE_FONTS, find
from .glyphs import CHARACTERS, Pictures, render

BASE_STEPS = 2300
ADAPTER_STEPS = {"bold": 240, "italic": 240, "serif": 700, "outline": 700, "hand": 1200, "typewriter": 700}
"""Width and slant of the lines are learned sooner than new lines."""
BASE_RATE, ADAPTER_RATE = 2e-3, 3e-3
BATCH = 32
UNNAMED = 0.1
"""Share of pictures that are learned without their letter, for guidance."""
VARIANTS = 48
"""Pictures of each character."""


def loss_on(unet: model.StyleUNet, pictures: Pictures, seed: int) -> training.Loss:
    """The loss of a step: mean squared error of v on random pictures, noise and times.

    Args:
        unet: what predicts.
        pictures: (36, N, 32, 32) float32.
        seed: with the step it decides the batch.
    """
    scheduler = model.new_scheduler()
    data = torch.from_numpy(pictures)

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        classes = torch.randint(len(CHARACTERS), (BATCH,), generator=generator)
        variant = torch.randint(data.shape[1], (BATCH,), generator=generator)
        x = model.planes(data[classes, variant][:, None])
        classes = classes.where(torch.rand(BATCH, generator=generator) >= UNNAMED, len(CHARACTERS))
        noise = torch.randn(x.shape, generator=generator)
        # one time in each of B equal parts: less variance than independent times
        t = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) * (1000 / BATCH)
        t = t.long().clamp(max=999)[torch.randperm(BATCH, generator=generator)]
        v = unet(scheduler.add_noise(x, noise, t), t, class_labels=classes).sample
        return torch.nn.functional.mse_loss(v, scheduler.get_velocity(x, noise, t))

    return loss


def train_base(
    fonts: Path, out: Path, work: Path, note: Callable[[str], None], steps: int = BASE_STEPS
) -> float:
    """Train the base and write it to ``out``; returns CPU seconds."""
    torch.manual_seed(0)
    unet = model.new_unet(len(CHARACTERS)).train()
    pictures = render(find(fonts)[BASE_FONT], VARIANTS)
    checkpoint = work / "base.checkpoint.safetensors"
    spent = training.run(
        list(unet.parameters()),
        loss_on(unet, pictures, 1),
        steps=steps,
        peak=BASE_RATE,
        checkpoint=checkpoint,
        note=note,
    )
    model.save_base(unet, out)
    checkpoint.unlink(missing_ok=True)
    return spent


def train_adapter(
    style: str,
    fonts: Path,
    base: Path,
    out: Path,
    work: Path,
    note: Callable[[str], None],
    steps: int | None = None,
) -> tuple[float, str, str]:
    """Train a style's adapter and write it to ``out``; returns CPU seconds, and the base's SHA-256 before and after.

    Without ``steps`` it is trained for the style's own number of steps.
    """
    torch.manual_seed(0)
    unet = model.load_base(base, len(CHARACTERS))
    before = model.weights_sha256(unet)
    parameters = model.add_adapter(unet, style)
    font = find(fonts)[STYLE_FONTS[style].file]
    pictures = render(font, VARIANTS, outline=style == "outline")
    checkpoint = work / f"{style}.checkpoint.safetensors"
    spent = training.run(
        parameters,
        loss_on(unet, pictures, 2),
        steps=steps or ADAPTER_STEPS[style],
        peak=ADAPTER_RATE,
        checkpoint=checkpoint,
        note=note,
    )
    model.save_adapter(unet, style, out)
    checkpoint.unlink(missing_ok=True)
    return spent, before, model.weights_sha256(unet)
