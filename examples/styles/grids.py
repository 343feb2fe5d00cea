"""Pictures of the mixes as PNG: grids over two scales, and a sheet of all styles.

Knows nothing about measuring. Pictures come as arrays in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from loramix.paths import atomic_path

from .glyphs import Pictures, sheet

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
ZOOM, GAP, LABEL, LINE = 2, 1, 12, 16

Draw = Callable[[Mapping[str, float], str], Pictures]
"""Mix and text to pictures (len(text), 32, 32)."""


def alpha_grid(draw: Draw, pair: tuple[str, str], letter: str) -> Image.Image:
    """A letter under α₁ × α₂: the first adapter's scale grows to the right, the second's downwards."""
    rows = [
        np.stack([draw({pair[0]: a, pair[1]: b}, letter)[0] for a in SCALES])  # (5, 32, 32)
        for b in SCALES
    ]
    picture = sheet(np.stack(rows), zoom=ZOOM, gap=GAP)
    font = ImageFont.load_default(LABEL)
    whole = Image.new("L", (picture.width + LINE, picture.height + LINE), 255)
    whole.paste(picture, (LINE, LINE))
    ImageDraw.Draw(whole).text((LINE + 2, 1), f"{pair[0]} 0 to 1", 0, font)
    side = Image.new("L", (picture.height, LINE), 255)
    ImageDraw.Draw(side).text((2, 1), f"{pair[1]} 0 to 1", 0, font)
    whole.paste(side.rotate(-90, expand=True), (0, LINE))
    return whole


def beside(images: Sequence[Image.Image], space: int = 8) -> Image.Image:
    """Images in one row."""
    width = sum(image.width + space for image in images) - space
    whole = Image.new("L", (width, max(image.height for image in images)), 255)
    left = 0
    for image in images:
        whole.paste(image, (left, 0))
        left += image.width + space
    return whole


def style_sheet(draw: Draw, mixes: Mapping[str, Mapping[str, float]], text: str) -> Image.Image:
    """A text under each mix, a row each, with the mix's name before it."""
    picture = sheet(np.stack([draw(mix, text) for mix in mixes.values()]), zoom=ZOOM, gap=GAP)
    font = ImageFont.load_default(LABEL)
    names = list(mixes)
    width = max(int(font.getlength(name)) for name in names) + 8
    whole = Image.new("L", (picture.width + width, picture.height), 255)
    whole.paste(picture, (width, 0))
    height = picture.height // len(names)
    for i, name in enumerate(names):
        ImageDraw.Draw(whole).text((2, i * height + height // 2), name, 0, font, anchor="lm")
    return whole


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG of 16 greys, whole or not at all."""
    few = image.quantize(16) if image.mode == "L" else image
    with atomic_path(path) as temporary:
        few.save(temporary, "PNG", optimize=True)
