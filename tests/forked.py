"""Processes that have torch already: forked from one that imported it once, instead of some seconds each."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch",
        "transformers.models.llama.modeling_llama",
        "peft",
        "loramix.convert.base_model",
        "loramix.train.lora",
    ]
)


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """What ``subprocess.run`` gives for ``[python, "-m" or "-c", MODULE or CODE, ARGUMENT…]``, its errors captured."""
    python, how, *words = command
    assert python == sys.executable and how in ("-m", "-c")
    with tempfile.NamedTemporaryFile("r") as errors:
        child = _CONTEXT.Process(target=_main, args=(how, words, dict(os.environ), errors.name))
        child.start()
        child.join()
        return subprocess.CompletedProcess(command, child.exitcode or 0, "", errors.read())


def _main(how: str, words: Sequence[str], environment: dict[str, str], errors: str) -> None:
    os.environ.update(environment)  # the first process has that of the first test
    sys.argv = [how, *words[1:]]
    # open to the end: multiprocessing writes there what is raised
    sys.stderr = Path(errors).open("w", buffering=1)  # noqa: SIM115
    if how == "-m":
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
