"""Run the commands of the README's console blocks again, and put what they print below each.

python scripts/transcript.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from loramix.paths import write_text

README = Path(__file__).parent.parent / "README.md"


def replay(block: re.Match[str]) -> str:
    """A console block with fresh output."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    out = []
    for command in re.findall(r"^\$ (.+)$", block[1], re.MULTILINE):
        done = subprocess.run(
            command,
            shell=True,
            env={**os.environ, "PATH": places},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        out.append(f"$ {command}\n{done.stdout.strip()}\n")
    return "```console\n" + "\n".join(out) + "```"


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    write_text(README, re.sub(r"```console\n(.*?)```", replay, text, flags=re.DOTALL))
