"""The early head in torch, for training; `loramix.models.early_head` has the same forward pass for serving.

Reads the standardized states of all tokens of a prompt; independent of prompts, losses and packs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from loramix.models.early_head import CLIP, bucket
from loramix.models.head_info import BUCKETS, HeadInfo

Floats = npt.NDArray[np.float32]
START = 0.02  # standard deviation of the position embeddings before training
INPUT_NOISE = 0.1  # standard deviations: states of unseen wording are near those that were seen
NOISE_TABLE = 1 << 22


class Noise:
    """Random masks and noise, as parts of two tables: drawing new numbers would take a tenth of a training step.

    Args:
        dropout: probability that a number of the mask is 0.
        seed: of the tables.
    """

    def __init__(self, dropout: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.dropout = dropout
        kept = torch.rand(NOISE_TABLE, generator=generator) >= dropout
        self._mask = kept.float() / (1 - dropout)
        self._normal = torch.randn(NOISE_TABLE, generator=generator) * INPUT_NOISE

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """Dropout."""
        return x * self._part(self._mask, x) if self.dropout else x

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """Add normal noise of `INPUT_NOISE` in place."""
        return x.add_(self._part(self._normal, x))

    @staticmethod
    def _part(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        count = x.numel()
        if count >= len(table):
            table = table.repeat(count // len(table) + 2)
        start = int(torch.randint(len(table) - count, (1,)))
        return table[start : start + count].view(x.shape)


class Layer(nn.Module):  # type: ignore[misc]  # mypy does not follow torch
    """A pre-norm transformer layer.

    Args:
        d: width.
        heads: of the attention.
    """

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.o = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.f1, self.f2 = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, h: torch.Tensor, mask: torch.Tensor, noise: Noise | None) -> torch.Tensor:
        """(B, T, d) and the tokens to attend to, (B, 1, 1, T) bool → (B, T, d); with dropout if there is noise."""
        b, t, d = h.shape
        qkv = self.qkv(self.norm1(h)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, t, d)
        mixed = self.o(mixed)
        h = h + (noise.drop(mixed) if noise else mixed)
        inner = self.f2(F.gelu(self.f1(self.norm2(h)), approximate="tanh"))
        found: torch.Tensor = h + (noise.drop(inner) if noise else inner)
        return found


class TorchHead(nn.Module):  # type: ignore[misc]  # mypy does not follow torch
    """The head; see `loramix.models.early_head` for its parts.

    Args:
        info: sizes, classes and tags.
        mean: (width x layers,) float32, of the training states.
        std: (width x layers,) float32, positive.
        seed: of the initial weights.
        dropout: probability, in training only; twice before the last linear map.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, info: HeadInfo, mean: Floats, std: Floats, *, seed: int = 0, dropout: float = 0.2
    ) -> None:
        super().__init__()
        self.info = info
        self._noise = Noise(dropout, seed) if dropout else None
        d = info.d
        self.register_buffer("mean", torch.from_numpy(np.array(mean, np.float32)))
        self.register_buffer("std", torch.from_numpy(np.array(std, np.float32)))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.project = nn.Linear(info.width * len(info.layers), d)
            self.start, self.end = nn.Embedding(BUCKETS, d), nn.Embedding(BUCKETS, d)
            nn.init.normal_(self.start.weight, std=START)
            nn.init.normal_(self.end.weight, std=START)
            self.layers = nn.ModuleList(Layer(d, info.heads) for _ in range(info.depth))
            self.norm, self.query = nn.LayerNorm(d), nn.Linear(d, 4)
            self.out = nn.Linear(6 * d, len(info.skills) + 1)
            self.tag = nn.Linear(d, len(info.tags)) if info.tags else None
        steps = bucket(np.arange(info.first + info.last, dtype=np.int64))
        self.register_buffer("buckets", torch.from_numpy(steps), persistent=False)

    def forward(
        self, states: torch.Tensor, places: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decide on a batch of prompts, padded at their end.

        Args:
            states: (B, T, width x layers) float32, raw; tokens may be left out, but not the last one.
            places: (B, T) int64, which token of its prompt each is.
            lengths: (B,) int64, how many tokens of each prompt there are.

        Returns:
            Logits (B, K + 1), tag logits (B, T, tags or 0), and the pooled vectors (B, 6 d).
        """
        noise = self._noise if self.training else None
        b, t, _ = states.shape
        x = torch.addcmul(-self.mean / self.std, states, 1 / self.std).clamp_(-CLIP, CLIP)
        if noise:
            x = noise.add(x)
        keep = torch.arange(t) < lengths[:, None]
        last = places[torch.arange(b), lengths - 1]
        rest = (last[:, None] - places).clamp_min(0)
        h = self.project(x) + self.start(self.buckets[places]) + self.end(self.buckets[rest])
        h = noise.drop(h) if noise else h
        for layer in self.layers:
            h = layer(h, keep[:, None, None, :], noise)
        h = self.norm(h)
        weight = self.query(h).masked_fill(~keep[..., None], -1e9).softmax(1)
        seen = keep[..., None]
        pooled = torch.cat(
            [
                torch.einsum("bth,btd->bhd", weight, h).flatten(1),
                h[torch.arange(b), lengths - 1],
                (h * seen).sum(1) / seen.sum(1),
            ],
            -1,
        )
        tags = self.tag(h) if self.tag is not None else h[..., :0]
        return self.out(noise.drop(noise.drop(pooled)) if noise else pooled), tags, pooled

    @torch.no_grad()  # type: ignore[untyped-decorator]  # mypy does not follow torch
    def load(self, arrays: Mapping[str, Floats], skills: Sequence[str], tags: Sequence[str]) -> None:
        """Begin with the numbers of a trained head of the same sizes.

        Args:
            arrays: of the trained head, by the names of `arrays`.
            skills: its skills, those of this head in any order.
            tags: its token tags; those that it does not have keep their fresh columns.
        """
        classes = [*(list(skills).index(name) for name in self.info.skills), len(skills)]
        known = [name for name in self.info.tags if name in tags]
        places = [self.info.tags.index(name) for name in known]
        columns = [list(tags).index(name) for name in known]
        for name, part in self._named().items():
            if name not in arrays:
                continue
            value = _turned(name, torch.from_numpy(np.array(arrays[name])))
            if name.startswith("out."):
                value = value[classes]
            if name.startswith("tag."):
                part[places] = value[columns]
            else:
                part.copy_(value)

    def arrays(self) -> dict[str, Floats]:
        """Copies of all arrays, float32, by the names of `loramix.models.early_head.expected`."""
        return {
            name: np.array(_turned(name, part).detach().numpy(), np.float32, order="C")
            for name, part in self._named().items()
        }

    def _named(self) -> dict[str, torch.Tensor]:
        """All tensors by the names of `arrays`, where linear weights are transposed."""
        found = {"mean": self.mean, "std": self.std, "start": self.start.weight, "end": self.end.weight}
        linear = {"project": self.project, "query": self.query, "out": self.out}
        norms = {"norm": self.norm}
        if self.tag is not None:
            linear["tag"] = self.tag
        for i, layer in enumerate(self.layers):
            linear |= {f"{i}.{name}": getattr(layer, name) for name in ("qkv", "o", "f1", "f2")}
            norms |= {f"{i}.{name}": getattr(layer, name) for name in ("norm1", "norm2")}
        for name, part in (linear | norms).items():
            found[f"{name}.weight"], found[f"{name}.bias"] = part.weight, part.bias
        return found


def _turned(name: str, part: torch.Tensor) -> torch.Tensor:
    """A tensor as `TorchHead.arrays` has it, or back: linear weights are transposed."""
    return part.T if name.endswith(".weight") and part.ndim == 2 else part
