"""Makes the pictures of each mix and has them judged; answers are kept, so that a stopped run resumes.

A file of answers is named by a digest of all that they depend on: base, adapters, judge, mix and seeds.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from loramix.formats.npz import npz_bytes
from loramix.paths import sha256_file, write_bytes

from . import judge as judging
from . import model
from .fonts import REAL, STYLES, find
from .glyphs import CHARACTERS, SIZE, render
from .mixes import Job, Verdict, verdict_of


class Studio:
    """Base, adapters and judge of a directory.

    Args:
        results: directory with base.safetensors, adapters/ and, for judging, judge.safetensors.
        fonts: directory of `fonts.fetch`; only upper bounds need it.
        cache: where answers are kept.
    """

    def __init__(self, results: Path, fonts: Path, cache: Path) -> None:
        self.base, self.fonts, self.cache = results / "base.safetensors", fonts, cache
        self.adapters = {path.stem: path for path in sorted((results / "adapters").glob("*.safetensors"))}
        self._judge = results / "judge.safetensors"
        self.unet = model.load_base(self.base, len(CHARACTERS))
        for name, path in self.adapters.items():
            model.load_adapter(self.unet, name, path)
        self._last: tuple[tuple[tuple[str, float], ...], model.StyleUNet] | None = None

    @cached_property
    def judge(self) -> judging.Judge:
        """The judge; drawing alone needs none."""
        return judging.load(self._judge)

    @cached_property
    def thresholds(self) -> dict[str, float]:
        """Of each style, as the judge's check found them."""
        about = json.loads((self._judge.parent / "about" / "judge.json").read_text(encoding="utf-8"))
        return {style: about["check"][style]["threshold"] for style in STYLES}

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of the files of base, judge and adapters."""
        files = {"base": self.base, "judge": self._judge, **self.adapters}
        return {name: sha256_file(path) for name, path in files.items()}

    def pictures(self, job: Job, seed: int, text: str = CHARACTERS) -> torch.Tensor:
        """One picture of each character, (B, 1, 32, 32)."""
        classes = torch.tensor([CHARACTERS.index(c) for c in text])
        if job.kind == "switch":
            return model.sample(self.unet, classes, seed=seed, mix_of_step=model.switch(job.styles))
        if self._last is None or self._last[0] != job.weights:
            self._last = job.weights, self._merged(dict(job.weights))
        # half the time of `set_adapters`, and the same pictures: see `merged_difference`
        return model.sample(self._last[1], classes, seed=seed, mix_of_step={})

    def judged(self, job: Job) -> Verdict:
        """The verdict of a job; pictures of the same mix are made once, whatever they are asked for."""
        path = self.cache / f"{self._digest(job)}.npz"
        if not path.exists():
            began = time.process_time()
            asked = torch.arange(len(CHARACTERS)).repeat(len(job.seeds))
            right, styles = judging.verdicts(self.judge, self._all_pictures(job), asked)
            spent = np.float64(time.process_time() - began)
            write_bytes(path, npz_bytes({"right": right, "styles": styles, "cpu_s": spent}))
        with np.load(path, allow_pickle=False) as answers:
            return verdict_of(answers["right"], answers["styles"], job.styles, self.thresholds)

    def spent(self, jobs: Iterable[Job]) -> float:
        """CPU seconds that the pictures of judged jobs took to make and judge."""
        total = 0.0
        for digest in {self._digest(job) for job in jobs}:
            with np.load(self.cache / f"{digest}.npz", allow_pickle=False) as answers:
                total += answers["cpu_s"].item()
        return total

    def _digest(self, job: Job) -> str:
        """SHA-256 of everything that the answers depend on; a scale of 0 is no adapter."""
        weights = [(name, scale) for name, scale in job.weights if scale]
        how = [job.kind, job.styles] if job.kind in ("switch", "font") else weights
        names = ["judge", "base", *(job.styles if job.kind == "switch" else [name for name, _ in weights])]
        parts = [how, job.seeds, model.STEPS, model.GUIDANCE, [self.digests[name] for name in names]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _all_pictures(self, job: Job) -> torch.Tensor:
        if job.kind == "font":
            path = find(self.fonts)[REAL[job.styles].file]
            drawn = render(path, len(job.seeds), outline="outline" in job.styles, seed=5)
            return torch.from_numpy(drawn.swapaxes(0, 1).reshape(-1, 1, SIZE, SIZE).copy())
        return torch.cat([self.pictures(job, seed) for seed in job.seeds])

    def merged_difference(self, weights: model.Weights, seed: int = 7) -> float:
        """Largest difference of a pixel between `set_adapters` and a plain model with the weights merged."""
        classes = torch.arange(len(CHARACTERS))
        mixed = model.sample(self.unet, classes, seed=seed, mix_of_step=weights)
        plain = model.sample(self._merged(weights), classes, seed=seed, mix_of_step={})
        return float((mixed - plain).abs().max())

    def _merged(self, weights: model.Weights) -> model.StyleUNet:
        """A plain UNet without adapters, whose weights are W + Σ αᵢ·ΔWᵢ."""
        weights = {name: scale for name, scale in weights.items() if scale}
        other = model.load_base(self.base, len(CHARACTERS))
        if not weights:
            return other
        for name in weights:
            model.load_adapter(other, name, self.adapters[name])
        model.use(other, weights)
        other.fuse_lora(adapter_names=list(weights))
        state = {
            key.replace(".base_layer", ""): value
            for key, value in other.state_dict().items()
            if "lora_" not in key
        }
        plain = model.new_unet(len(CHARACTERS))
        plain.load_state_dict(state)
        return plain.eval().requires_grad_(False)
