"""Glyphs of font files as pictures of 32 × 32 grey pixels.

Knows nothing about styles or models. Ink is 1, paper is -1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
SIZE = 32
CAP_HEIGHT = 19.0
"""Pixels from the baseline to the top of an H, before scaling."""
FINE = 4
"""Glyphs are drawn so many times larger and averaged."""
OUTLINE = 1.25
"""Width of an outline in pixels."""

Pictures = npt.NDArray[np.float32]
Canvas = npt.NDArray[np.uint8]


def canvas(font: ImageFont.FreeTypeFont, character: str, *, outline: bool) -> Canvas:
    """A glyph in the middle of a canvas of twice the picture's size, (2 SIZE FINE, 2 SIZE FINE) uint8.

    Args:
        font: of the size to draw.
        character: one character.
        outline: draw its contour alone.
    """
    side = 2 * SIZE * FINE
    left, _, right, _ = font.getbbox(character, anchor="ls")
    top = -font.getbbox("H", anchor="ls")[1]
    place = (side / 2 - (left + right) / 2, side / 2 + top / 2)

    def drawn(stroke: float) -> Canvas:
        image = Image.new("L", (side, side), 0)
        ImageDraw.Draw(image).text(place, character, 255, font, anchor="ls", stroke_width=stroke)
        return np.asarray(image)

    plain = drawn(0)
    return np.maximum(drawn(OUTLINE * FINE), plain) - plain if outline else plain


def cropped(whole: Canvas, x: float, y: float) -> Pictures:
    """The picture of a canvas, moved by ``x`` and ``y`` pixels: (SIZE, SIZE) float32 in [-1, 1]."""
    start = SIZE * FINE // 2
    row, column = start - round(y * FINE), start - round(x * FINE)
    part = whole[row : row + SIZE * FINE, column : column + SIZE * FINE].astype(np.float32)
    found: Pictures = part.reshape(SIZE, FINE, SIZE, FINE).mean((1, 3)) / 127.5 - 1
    return found


def render(
    path: Path,
    count: int,
    *,
    outline: bool = False,
    scales: tuple[float, float] = (0.94, 1.04),
    shift: float = 1.0,
    seed: int = 0,
) -> Pictures:
    """Draw each character of a font a number of times, a little moved and scaled.

    Args:
        path: the font.
        count: pictures a character (N).
        outline: contours alone.
        scales: smallest and largest size relative to `CAP_HEIGHT`.
        shift: pixels that a glyph is moved at most, in x and y.
        seed: the same seed gives the same moves and sizes for every font.

    Returns:
        (36, N, SIZE, SIZE) float32 in [-1, 1].
    """
    rng = np.random.default_rng(seed)
    large = -ImageFont.truetype(path, 200).getbbox("H", anchor="ls")[1]  # of 200 units
    found = np.empty((len(CHARACTERS), count, SIZE, SIZE), np.float32)
    sizes = np.linspace(*scales, min(max(1, count // 2), 8))
    for i, size in enumerate(sizes):
        font = ImageFont.truetype(path, 200 * CAP_HEIGHT * size * FINE / large)
        for c, character in enumerate(CHARACTERS):
            whole = canvas(font, character, outline=outline)
            for n in range(i, count, len(sizes)):
                found[c, n] = cropped(whole, *rng.uniform(-shift, shift, 2))
    return found


def sheet(pictures: Pictures, *, zoom: int = 1, gap: int = 0) -> Image.Image:
    """Pictures side by side, black on white.

    Args:
        pictures: (rows, columns, SIZE, SIZE) in [-1, 1].
        zoom: how many times larger.
        gap: white pixels between pictures.
    """
    padded = np.pad(pictures, ((0, 0), (0, 0), (gap, gap), (gap, gap)), constant_values=-1)
    rows, columns, height, width = padded.shape
    whole = padded.transpose(0, 2, 1, 3).reshape(rows * height, columns * width)
    grey = np.clip((1 - whole) * 127.5, 0, 255).round().astype(np.uint8)
    return Image.fromarray(grey).resize(
        (columns * width * zoom, rows * height * zoom), Image.Resampling.NEAREST
    )
