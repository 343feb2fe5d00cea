"""``python -m examples.styles make``: from fonts to the table of what was measured; ``… draw TEXT``: one picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from loramix.models.early_head import EarlyHead

from . import grids, measure, mixes, words
from .making import CACHE, FONTS, PUBLISHED, SEED, make

USAGE = 'usage: python -m examples.styles make | draw "a bold italic R" [FILE.png]'


def draw(text: str, path: Path) -> None:
    """Route a text to styles and draw its letter under their mix."""
    letter = words.letter_of(text)
    if letter is None:
        raise SystemExit('error: the text names no letter or digit; write "a bold italic R".')
    styles = words.styles_of(EarlyHead.from_bytes((PUBLISHED / "gate.npz").read_bytes()), text)
    results = json.loads((PUBLISHED / "results.json").read_text(encoding="utf-8"))
    searched = {tuple(sorted(k.split("+"))): v["searched"]["weights"] for k, v in results["blends"].items()}
    mix = searched.get(styles, dict.fromkeys(styles, 1.0))
    studio = measure.Studio(PUBLISHED, FONTS, CACHE)
    picture = studio.pictures(mixes.Job("draw", (), tuple(mix.items())), SEED, letter)
    grids.save(grids.sheet(picture.numpy(), zoom=8), path)
    print(f"{letter} under [{','.join(f'{k}={v:g}' for k, v in mix.items()) or 'base'}]: {path}")


def main(arguments: list[str]) -> None:
    """Run a command."""
    if arguments == ["make"]:
        make()
    elif len(arguments) in (2, 3) and arguments[0] == "draw":
        draw(arguments[1], Path(arguments[2] if len(arguments) == 3 else "letter.png"))
    else:
        print(USAGE, file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
