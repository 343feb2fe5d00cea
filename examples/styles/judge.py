"""The judge: a small network that says which letter a picture shows and which styles it has.

It is trained on real glyphs of fonts that neither base nor adapters have seen, and knows nothing of diffusion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from loramix.paths import atomic_path

from . import training
from .fonts import CHECK_FONTS, JUDGE_FONTS, STYLES, Cut, find
from .glyphs import CHARACTERS, Pictures, render

STEPS, RATE, BATCH = 2000, 2e-3, 128
VARIANTS = 8


class Judge(nn.Module):
    """Convolutions, then a letter for each picture, and a probability for each style of the letter that was asked.

    Whether an O is monospaced, say, is seen from its width, and the same width means another thing for an I.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(a, b, 3, 2 if i else 1, 1, bias=False), nn.GroupNorm(8, b), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 192), nn.ReLU())
        self.letter = nn.Linear(192, len(CHARACTERS))
        self.asked = nn.Embedding(len(CHARACTERS), 192)
        self.style = nn.Sequential(nn.Linear(192, 96), nn.ReLU(), nn.Linear(96, len(STYLES)))

    def forward(self, pictures: torch.Tensor, asked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits.

        Args:
            pictures: (B, 1, 32, 32) float32 in [-1, 1].
            asked: (B,) int64, the letter that the picture should show.

        Returns:
            (B, 36) logits of letters and (B, K) logits of styles.
        """
        h = self.features(pictures)
        return self.letter(h), self.style(h * (1 + self.asked(asked)))


class Glyphs:
    """Real glyphs with what is known of them.

    Args:
        cuts: fonts; of each bold cut that is not a handwriting the contour is taken as well.
        files: font file to path.
        variants: pictures of each character.
        seed: of their places and sizes.
    """

    def __init__(self, cuts: Sequence[Cut], files: dict[str, Path], *, variants: int, seed: int) -> None:
        pictures: list[Pictures] = []
        labels = []
        for cut in cuts:
            for outline in (False, True):
                if outline and not ("bold" in cut.has and "hand" not in cut.has):
                    continue
                drawn = render(
                    files[cut.file], variants, outline=outline, scales=(0.82, 1.1), shift=2.0, seed=seed
                )
                pictures.append(drawn.reshape(-1, 1, *drawn.shape[2:]))
                labels.append(label_of(cut, outline=outline))
        each = len(CHARACTERS) * variants
        self.pictures = torch.from_numpy(np.concatenate(pictures))
        self.letters = torch.arange(len(CHARACTERS)).repeat_interleave(variants).repeat(len(labels))
        self.styles = torch.tensor(labels).repeat_interleave(each, 0)  # (N, K): 1, 0, or -1 for unknown

    def __len__(self) -> int:
        return len(self.letters)


def label_of(cut: Cut, *, outline: bool) -> list[float]:
    """1 for a style the cut has, 0 for one it has not, -1 where that is not told."""
    has, unknown = set(cut.has), set(cut.unknown)
    if outline:
        has.add("outline")
        has.discard("bold")
        unknown.add("bold")
    return [-1.0 if s in unknown else float(s in has) for s in STYLES]


def bent(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures as a hand might draw them: larger or smaller, sheared, stretched and with crooked strokes."""
    n = len(pictures)
    matrix = torch.eye(2, 3).repeat(n, 1, 1)
    matrix += torch.randn(n, 2, 3, generator=generator) * torch.tensor([[0.1, 0.15, 0.0], [0.08, 0.1, 0.0]])
    matrix *= torch.exp(
        torch.rand(n, 1, 1, generator=generator) * 0.5 - 0.1
    )  # of the page: above 1 is smaller
    grid = F.affine_grid(matrix, list(pictures.shape), align_corners=False)
    crooked = torch.randn(n, 2, 5, 5, generator=generator) * 0.07
    grid = grid + F.interpolate(crooked, size=pictures.shape[2:], mode="bicubic").permute(0, 2, 3, 1)
    return F.grid_sample(pictures + 1, grid, align_corners=False) - 1


def worn(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures as a generator might make them: blurred, noisy, pale."""
    n = len(pictures)

    def random(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)

    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), value=-1.0), 3, 1)
    share = random(0, 0.5)
    mixed = pictures * (1 - share) + blurred * share
    mixed = (mixed + 1) * random(0.75, 1.0) - 1
    noise = torch.randn(pictures.shape, generator=generator) * random(0, 0.2)
    return (mixed + noise).clamp(-1, 1)


def train(fonts: Path, out: Path, work: Path, note: Callable[[str], None], steps: int = STEPS) -> float:
    """Train the judge and write it to ``out``; returns CPU seconds."""
    torch.manual_seed(0)
    data = Glyphs(JUDGE_FONTS, find(fonts), variants=VARIANTS, seed=3)
    judge = Judge().train()
    # each style is as often there as not, in what the loss sees
    known = (data.styles >= 0).float()
    share = (data.styles.clamp(min=0) * known).sum(0) / known.sum(0)
    balance = torch.where(data.styles > 0, 0.5 / share, 0.5 / (1 - share)) * known

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(data), (BATCH,), generator=generator)
        # half of the pictures are bent: these teach letters alone, since bending changes the style
        pictures, half = data.pictures[rows], BATCH // 2
        pictures = torch.cat([bent(pictures[:half], generator), pictures[half:]])
        letters, styles = judge(worn(pictures, generator), data.letters[rows])
        told = F.binary_cross_entropy_with_logits(
            styles[half:], data.styles[rows[half:]].clamp(min=0), balance[rows[half:]]
        )
        return F.cross_entropy(letters, data.letters[rows]) + told * len(STYLES)

    checkpoint = work / "judge.checkpoint.safetensors"
    spent = training.run(
        list(judge.parameters()), loss, steps=steps, peak=RATE, checkpoint=checkpoint, note=note
    )
    with atomic_path(out) as temporary:
        save_file(judge.state_dict(), temporary)
    checkpoint.unlink(missing_ok=True)
    return spent


def load(path: Path) -> Judge:
    """Read a trained judge."""
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.eval()


@torch.inference_mode()
def verdicts(judge: Judge, pictures: torch.Tensor, asked: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What the judge says.

    Args:
        judge: trained.
        pictures: (B, 1, 32, 32) float32.
        asked: (B,) int64.

    Returns:
        (B,) bool, whether the letter is the asked one, and (B, K) float32 probabilities of the styles.
    """
    letters, styles = judge(pictures, asked)
    return (letters.argmax(1) == asked).numpy(), styles.sigmoid().numpy()


def check(judge: Judge, fonts: Path) -> dict[str, Any]:
    """How often the judge is right on real glyphs of fonts that it has not seen, and what it calls seen.

    Returns:
        ``letter``, the share of letters that are right, and for each style the threshold at which recall and
        specificity are highest together.
    """
    data = Glyphs(CHECK_FONTS, find(fonts), variants=4, seed=4)
    right, styles = verdicts(judge, data.pictures, data.letters)
    found: dict[str, Any] = {"letter": round(float(right.mean()), 4)}
    truth = data.styles.numpy()
    for i, style in enumerate(STYLES):
        found[style] = threshold_of(styles[truth[:, i] == 1, i], styles[truth[:, i] == 0, i])
    return found


def threshold_of(having: np.ndarray, lacking: np.ndarray) -> dict[str, float]:
    """The threshold from 0.2 to 0.8 with the highest sum of recall and specificity, nearest to 0.5 on ties.

    One that is nearer to 0 or 1 would fit the few fonts that it is chosen on.

    Args:
        having: (N,) probabilities of pictures that have a style.
        lacking: (M,) of pictures that do not.
    """
    tried = [
        {"threshold": t, "recall": float((having > t).mean()), "specificity": float((lacking <= t).mean())}
        for t in (0.05 * i for i in range(4, 17))
    ]
    best = max(tried, key=lambda one: (one["recall"] + one["specificity"], -abs(one["threshold"] - 0.5)))
    return {name: round(value, 4) for name, value in best.items()}
