"""``loramix`` for shell commands without its seconds of imports: one process has them, and forks for each command.

``python fork_loramix.py SOCKET`` serves; ``python -S fork_loramix.py SOCKET WORD…`` runs one command there, with this
process's directory, environment, stdin, stdout and stderr. The package is the one that the server's path finds.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
from pathlib import Path


def ask(path: str, words: list[str]) -> int:
    """Run a command at the server; returns its exit code."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
        job = {"words": words, "cwd": str(Path.cwd()), "env": dict(os.environ)}
        content = json.dumps(job).encode()
        socket.send_fds(line, [struct.pack("!I", len(content))], [0, 1, 2])
        line.sendall(content)
        return int(line.recv(16) or b"1")


def serve(path: str) -> None:
    """Import what is slow, then fork for each command until killed."""
    import peft  # noqa: F401
    import sklearn  # noqa: F401
    import torch  # noqa: F401
    import transformers.modeling_gguf_pytorch_utils
    import transformers.models.llama.modeling_llama
    import transformers.quantizers.auto  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    import loramix.runtime.engine
    import loramix.train.lora
    import loramix.train.skill

    # one core, so one thread: several that wait for each other take minutes on a busy machine
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print(loramix.__file__, flush=True)
        while True:
            line, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _answer(line, path)
            line.close()
            while _reap():
                pass


def _reap() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def _answer(line: socket.socket, path: str) -> None:
    """In a fork: run the command in a fork of its own, and tell its exit code."""
    head, descriptors, _, _ = socket.recv_fds(line, 4, 3)
    (size,) = struct.unpack("!I", head)
    content = b""
    while len(content) < size:
        content += line.recv(size - len(content))
    job = json.loads(content)
    child = os.fork()
    if child == 0:
        line.close()
        os._exit(_run(job, descriptors, path))
    _, status = os.waitpid(child, 0)
    line.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _run(job: dict[str, object], descriptors: list[int], path: str) -> int:
    import runpy
    import subprocess
    from typing import Any

    import loramix.convert.reference

    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    words: Any = job["words"]
    os.chdir(str(job["cwd"]))
    os.environ.clear()
    os.environ.update(job["env"])  # type: ignore[call-overload]

    def here(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, ask(path, list(command)[1:]), "", "")

    loramix.convert.reference._run = here  # type: ignore[assignment]
    try:
        sys.argv = ["loramix", *words]
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            from loramix.cli import main

            main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(sys.argv[1])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
