"""``python -m loramix.runtime.tokenize BASE OUT.npz < ROWS.jsonl``: token ids for training.

Training asks the runtime for its tokens, in a process of its own, so that both see the same ids: torch
and llama.cpp bring two OpenMP runtimes and must not share a process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loramix.errors import InvalidArtifact, InvalidData, LoramixError, NativeError
from loramix.paths import atomic_write
from loramix.prompts import as_messages

_REFUSED = 3  # exit code where a prompt is the reason


def header(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """The tokens that the chat template puts behind the user's text, up to the answer.

    Args:
        first, second: ids of two prompts whose texts end differently.
    """
    count = 0
    while count < min(len(first), len(second)) and first[-1 - count] == second[-1 - count]:
        count += 1
    return [int(token) for token in first[len(first) - count :]]


def main(arguments: Sequence[str]) -> None:
    """Read ``{"prompt", "answer"}`` lines; write ``ids`` and ``lengths`` (rows, 2: prompt, answer)."""
    from loramix.runtime.llama.model import Model

    base, out = Path(arguments[0]), Path(arguments[1])
    ids: list[int] = []
    lengths: list[tuple[int, int]] = []
    with Model(base, vocab_only=True) as model:
        for number, line in enumerate(sys.stdin, 1):
            row = json.loads(line)
            try:
                prompt = model.chat(as_messages(row["prompt"]))
            except LoramixError as error:
                print(f"prompt {number} cannot be used: {error}", file=sys.stderr)
                sys.exit(_REFUSED)
            answer = [*model.tokenize(row["answer"]), model.eot] if "answer" in row else []
            ids += prompt + answer
            lengths.append((len(prompt), len(answer)))
        with atomic_write(out) as file:
            np.savez(
                file,
                ids=np.asarray(ids, np.int32),
                lengths=np.asarray(lengths, np.int32),
                eot=np.int32(model.eot),
            )


def tokenize_rows(
    base: Path, rows: Sequence[dict[str, str]]
) -> tuple[list[tuple[npt.NDArray[np.int32], int]], int]:
    """Tokenize prompts with answers in a child process.

    Args:
        base: the GGUF whose vocabulary and chat template count.
        rows: ``{"prompt": …, "answer": …}``.

    Returns:
        For each row its ids (T,) int32 with the number of answer tokens at their end, the
        end-of-turn token included; and the id of that token.

    Raises:
        InvalidArtifact: the base has no chat template that can be used.
        InvalidData: a prompt cannot be used.
        NativeError: the child failed.
    """
    from loramix.templates.base_template import check_template

    check_template(base)
    return tokenized(base, rows)


def tokenized(
    base: Path, rows: Sequence[dict[str, str]]
) -> tuple[list[tuple[npt.NDArray[np.int32], int]], int]:
    """`tokenize_rows` of a base that has been checked, or of a vocabulary without tensors."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "tokens.npz"
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        command = [sys.executable, "-m", "loramix.runtime.tokenize", str(base), str(out)]
        child = subprocess.run(command, input=lines, text=True, capture_output=True, check=False)
        if child.returncode == _REFUSED:
            raise InvalidData(child.stderr.strip().splitlines()[-1])
        if child.returncode or not out.is_file():
            reason = child.stderr.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
            raise NativeError(f"tokenizing with {base} failed: {reason[0]}; run 'loramix doctor'.")
        with np.load(out, allow_pickle=False) as archive:
            ids, lengths, eot = archive["ids"], archive["lengths"], int(archive["eot"])
    if lengths.shape != (len(rows), 2):
        raise InvalidArtifact(f"tokenizing with {base} gave {lengths.shape[0]} rows for {len(rows)}.")
    ends = np.cumsum(lengths.sum(axis=1))
    starts = ends - lengths.sum(axis=1)
    return [(ids[a:b], int(n)) for a, b, n in zip(starts, ends, lengths[:, 1], strict=True)], eot


if __name__ == "__main__":
    main(sys.argv[1:])
