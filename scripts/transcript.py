"""Runs the commands in the console blocks of README.md and docs/, and replaces their output.

python scripts/transcript.py

Writes nothing if a prompt is so close to a tie that another CPU could give a different answer.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from margins import asked_by, offences
from shell import output_of

from loramix import Engine
from loramix.paths import write_text

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)


def commands(text: str) -> list[str]:
    """Return the ``$`` lines of a text's console blocks."""
    return re.findall(r"^\$ (.+)$", "\n".join(BLOCK.findall(text)), re.MULTILINE)


def refuse_near_ties(text: str) -> None:
    """Exit with a message that lists the prompts that another CPU might answer differently.

    Args:
        text: text with console blocks.
    """
    try:
        asked = [found for command in commands(text) if (found := asked_by(command))]
    except ValueError as error:
        sys.exit(f"error: {error}.")
    with Engine.open(n_threads=1) as engine:
        near = [line for one in asked for line in offences(engine, one)]
    if near:
        sys.exit("\n".join([*near, "error: nothing was written; choose other prompts, or a smaller -n."]))


def replay(block: re.Match[str]) -> str:
    """Return a console block with new output."""
    out = [f"$ {command}\n{output_of(command).strip()}\n" for command in commands(block[0])]
    return "```console\n" + "\n".join(out) + "```"


if __name__ == "__main__":
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    refuse_near_ties("\n".join(texts.values()))
    for page, text in texts.items():
        if (fresh := BLOCK.sub(replay, text)) != text:
            write_text(page, fresh)
