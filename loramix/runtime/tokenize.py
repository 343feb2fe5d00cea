"""``python -m loramix.runtime.tokenize BASE OUT.npz < ROWS.jsonl``: writes token ids for training.

Training and serving use the same tokenizer. It runs in its own process, because torch and llama.cpp bring two
OpenMP runtimes and must not share one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loramix.errors import REFUSED, LoramixError
from loramix.paths import atomic_write
from loramix.prompts import as_messages


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
                sys.exit(REFUSED)
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


if __name__ == "__main__":
    main(sys.argv[1:])
