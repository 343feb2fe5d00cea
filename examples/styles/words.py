"""Words to styles: "a bold italic R" through the package's own gate.

The gate reads a bag of hashed words, not hidden states of a language model. Knows nothing about pictures.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence

import numpy as np
import torch

from loramix.models.gate import Gate
from loramix.models.gate_numpy import Floats, GateInfo, NumpyGate
from loramix.models.mixing import blend

from .fonts import STYLES
from .glyphs import CHARACTERS

WIDTH = 1024
"""Buckets of the hashed words (D)."""
THRESHOLD, FLOOR = 0.5, 0.2
STEPS, NOISE = 200, 3

WORDS = {
    "bold": ["bold", "heavy", "thick", "fat", "strong", "boldface"],
    "italic": ["italic", "slanted", "oblique", "leaning", "tilted", "cursive"],
    "serif": ["serif", "serifed", "with serifs", "with feet", "bookish", "roman"],
    "outline": ["outlined", "hollow", "outline", "contour", "empty inside", "outlines only"],
    "hand": ["handwritten", "handwriting", "by hand", "scribbled", "written with a pen", "handwriting style"],
    "typewriter": ["typewriter", "monospaced", "monospace", "fixed width", "typewritten", "courier"],
}
FORMS = [
    "a {} {}", "draw a {} {}", "the letter {1} in {0}", "{1}, {0}", "please make {1} {0}", "write {1} {0}",
    "I want a {} {}", "{} {}", "show me the character {1}, {0}", "one {} {} please",
]  # fmt: skip
HELD_OUT_FORMS = ["could I have a {} {}", "{1} but {0}", "paint me some {} {}", "a single {1} that is {0}"]
PLAIN = ["plain", "normal", "", "simple", "ordinary", "nice", "regular"]
JOINS = [" ", " and ", ", ", " but also "]


def features(text: str) -> Floats:
    """Bag of hashed words: (WIDTH,) float32 of 0 and 1."""
    found = np.zeros(WIDTH, np.float32)
    for word in re.findall(r"[a-z]{2,}", text.lower()):
        found[zlib.crc32(word.encode()) % WIDTH] = 1
    return found


def requests(forms: Sequence[str], count: int, seed: int) -> list[tuple[str, tuple[str, ...]]]:
    """Made-up requests for none to three styles, with the styles that they name, sorted."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        styles = rng.sample(STYLES, rng.choice([0, 1, 1, 2, 2, 3]))
        words = [rng.choice(WORDS[style]) for style in styles] or [rng.choice(PLAIN)]
        text = words[0]
        for word in words[1:]:
            text += rng.choice(JOINS) + word
        found.append((rng.choice(forms).format(text, rng.choice(CHARACTERS)), tuple(sorted(styles))))
    return found


def train(base_sha256: str, steps: int = STEPS) -> NumpyGate:
    """Train the gate with the package's classes: `Gate` learns, `NumpyGate` decides and is what is saved.

    Args:
        base_sha256: of the base's safetensors, where a gate of a language model has its GGUF's.
        steps: optimizer steps.
    """
    rows = requests(FORMS, 3000, 0)
    x = torch.from_numpy(np.stack([features(text) for text, _ in rows]))
    targets = torch.zeros(len(rows), len(STYLES) + 1)
    for i, (_, styles) in enumerate(rows):
        for style in styles:
            targets[i, STYLES.index(style)] = 1 / len(styles)
        targets[i, -1] = float(not styles)
    info = GateInfo(
        skills=list(STYLES),
        threshold=THRESHOLD,
        layers=[],
        pooling="hashed words",
        base_sha256=base_sha256,
        hidden=[32],
    )
    gate = Gate(info, torch.zeros(WIDTH), torch.ones(WIDTH))
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-2, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        # words that it has never seen must not matter
        noise = (torch.rand(x.shape, generator=generator) < NOISE / WIDTH).float()
        loss = -(targets * gate(torch.maximum(x, noise))[:, 0].log_softmax(-1)).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return NumpyGate(gate.info, gate.arrays())


def all_named(gate: NumpyGate) -> float:
    """Share of requests in other words around the styles' own, whose styles are all named and no other."""
    asked = requests(HELD_OUT_FORMS, 500, 1)
    return float(np.mean([styles_of(gate, text) == styles for text, styles in asked]))


def styles_of(gate: NumpyGate, text: str) -> tuple[str, ...]:
    """Styles that a text asks for, sorted: those of the blend policy's mix; its scales are not used."""
    probabilities = gate.probabilities(features(text))
    mix = blend(probabilities, gate.info.skills, threshold=gate.info.threshold, floor=FLOOR)
    return tuple(sorted(mix.scales))


def letter_of(text: str) -> str | None:
    """The letter or digit that a text asks for: its last single one; a small "a" is an article."""
    single = re.findall(r"(?<![\w'])(\w)(?![\w'])", text)
    capital = [c for c in single if c in CHARACTERS]
    small = [c.upper() for c in single if c != "a" and c.upper() in CHARACTERS]
    return (capital or small or [None])[-1]
