"""Runs a shell command of the documentation with this interpreter's ``loramix``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def output_of(command: str) -> str:
    """Run a command that must succeed; return its stdout and stderr together."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command,
        shell=True,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return done.stdout
