"""Reports of ``loramix explain``: the route, coloured tokens, and heat maps by layer and token.

Renders an answer and its `Contributions` as terminal lines, as a page without scripts, or as a figure.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from jinja2 import Environment

from loramix.defaults import BASE
from loramix.errors import MissingExtra
from loramix.paths import atomic_write

if TYPE_CHECKING:
    from loramix.runtime.answer import Answer
    from loramix.runtime.contributions import Contributions

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#8c564b", "#6a5acd")
"""Colours of the skills of a mix, suitable for colour-blind readers (after Okabe and Ito), on light and dark."""
_TERMINAL = ("blue", "yellow", "green", "magenta", "cyan", "red", "bright_blue", "bright_green")
_SHADES = " ░▒▓█"
_PAGE = Path(__file__).with_name("explain_report.html.jinja")


def lines(found: Contributions, width: int = 100) -> list[str]:
    """Render the answer and its heat maps as lines for a terminal.

    Args:
        found: measured contributions.
        width: columns of the terminal; longer heat maps are wrapped.
    """
    hue = dict(zip(found.skills, _TERMINAL, strict=False))
    pieces = [
        click.style(piece, fg=hue.get(skill or ""))
        for piece, skill in zip(found.pieces, found.strongest, strict=True)
    ]
    result = ["".join(pieces), ""]
    top = max(float(found.values.max(initial=0)), 1e-9)
    for name, values in zip(found.skills, found.values, strict=True):
        result.append(
            click.style(name, fg=hue.get(name), bold=True)
            + f"  ‖s·BAx‖ / ‖Wx‖ by layer (down) and token (across); █ is {top:.2f}"
        )
        for start in range(0, values.shape[1], width - 6):
            for layer in reversed(range(values.shape[0])):
                row = values[layer, start : start + width - 6]
                result.append(f"{layer:>4} " + "".join(_shade(value / top) for value in row))
            result.append("")
    return result


def _shade(share: float) -> str:
    return _SHADES[min(len(_SHADES) - 1, round(share * (len(_SHADES) - 1) + 0.25))]


def to_html(prompt: str, answer: Answer, found: Contributions) -> str:
    """Render a self-contained page without scripts or external resources, for light and dark mode.

    Args:
        prompt: the prompt.
        answer: the answer.
        found: measured contributions.
    """
    top = max(float(found.values.max(initial=0)), 1e-9)
    maps = [
        {
            "skill": name,
            "colour": colour,
            "cells": [
                {"x": token, "y": found.values.shape[1] - 1 - layer, "share": value / top, "value": value}
                for (layer, token), value in zip(_places(values), values.ravel().tolist(), strict=True)
            ],
        }
        for name, colour, values in zip(found.skills, COLOURS, found.values, strict=False)
    ]
    hue = dict(zip(found.skills, COLOURS, strict=False))
    tokens = [
        {"text": piece, "skill": skill or BASE, "mix": str(mix), "colour": hue.get(skill or "")}
        for piece, skill, mix in zip(found.pieces, found.strongest, found.mixes, strict=True)
    ]
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        _PAGE.read_text(encoding="utf-8")
    )
    chances = sorted(answer.route.probabilities.items(), key=lambda item: -item[1])
    return template.render(
        prompt=prompt, answer=answer, route=answer.route, chances=chances, tokens=tokens, maps=maps,
        n_layer=found.values.shape[1], n_tokens=len(tokens), top=top, hue=hue,
    )  # fmt: skip


def _places(values: Any) -> list[tuple[int, int]]:
    return [(layer, token) for layer in range(values.shape[0]) for token in range(values.shape[1])]


def write_png(path: Path, found: Contributions) -> None:
    """Write the heat maps as a PNG figure.

    Args:
        path: path of the PNG file.
        found: measured contributions of at least one skill.

    Raises:
        MissingExtra: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MissingExtra(
            "a PNG needs Matplotlib, which is not installed: pip install 'loramix[train]', or give --html."
        ) from None
    count = max(1, len(found.skills))
    wide = max(5.0, 0.28 * len(found.pieces) + 1.5)
    figure = Figure(figsize=(wide, 3.2 * count + 0.6), layout="constrained")
    axes = figure.subplots(count, 1, squeeze=False)[:, 0]
    for axis, name, values in zip(axes, found.skills, found.values, strict=False):
        picture = axis.imshow(
            values, aspect="auto", origin="lower", cmap="viridis", vmin=0, vmax=found.values.max()
        )
        axis.set_title(f"{name}: ‖s·BAx‖ / ‖Wx‖", loc="left")
        axis.set_ylabel("layer")
        axis.set_xticks(range(len(found.pieces)), [repr(p.strip())[1:-1] for p in found.pieces], rotation=90)
        figure.colorbar(picture, ax=axis)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
