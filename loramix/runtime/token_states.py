"""States of all tokens of many conversations at low layers, to train the gate on.

``python -m loramix.runtime.token_states BASE DIRECTORY 0,4 < REQUESTS.jsonl`` writes them in parts of `PART`
conversations; parts that are there are kept, so that the command resumes. A line of input is
``{"turns": [[role, [[text, tag], ...]], ...]}`` with a number as the tag of each piece of a message, -1: not known.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.models.gate_window import FIRST_TOKENS, cut_tokens
from loramix.paths import atomic_write
from loramix.runtime.state_parts import PART, Turns, part_file


def token_tags(turns: Turns, spelled: Sequence[bytes]) -> npt.NDArray[np.int8]:
    """The tag of each token of a rendered conversation.

    Args:
        turns: the messages.
        spelled: bytes of each token, of the whole conversation as the chat template renders it.

    Returns:
        (T,) int8: the tag of the piece that holds the token's last byte but spaces; 0 for the template's own
        tokens, -1 from a message on that the template changed.
    """
    whole = b"".join(spelled)
    of_byte = np.zeros(len(whole) + 1, np.int8)
    at = 0
    for _, pieces in turns:
        begin = whole.find("".join(text for text, _ in pieces).encode("utf-8", "replace"), at)
        if begin < 0:
            of_byte[at:] = -1
            break
        at = begin
        for text, tag in pieces:
            end = at + len(text.encode("utf-8", "replace"))
            of_byte[at:end] = tag
            at = end
    ends = np.cumsum([len(piece) for piece in spelled], dtype=np.int64)
    spaces = [len(piece) - len(piece.rstrip()) if piece.strip() else 0 for piece in spelled]
    found: npt.NDArray[np.int8] = np.where(
        [len(piece) > 0 for piece in spelled], of_byte[np.maximum(ends - 1 - spaces, 0)], 0
    ).astype(np.int8)
    return found


def main(arguments: Sequence[str]) -> None:
    """Compute the parts that are not there yet; print how many conversations are done after each."""
    from loramix.hardware import default_threads
    from loramix.runtime.llama.early_pass import EarlyPass
    from loramix.runtime.llama.model import Model
    from loramix.runtime.probe import verdict_for

    base, directory = Path(arguments[0]), Path(arguments[1])
    layers = [int(text) for text in arguments[2].split(",")]
    requests: list[Turns] = [json.loads(line)["turns"] for line in sys.stdin]
    with Model(base, use_extra_bufts=verdict_for(base).use_extra_bufts) as model:
        early = EarlyPass(model, layers, n_threads=default_threads())
        for number in range(-(-len(requests) // PART)):
            part = requests[number * PART : (number + 1) * PART]
            if not part_file(directory, number, "tokens").is_file():
                _write_part(directory, number, [_read(model, early, turns) for turns in part], layers)
            print(number * PART + len(part), flush=True)


def _read(model: Any, early: Any, turns: Turns) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Tags (T,) and states (T, layers x D) of the tokens of a conversation that the gate reads."""
    messages = [{"role": role, "content": "".join(text for text, _ in pieces)} for role, pieces in turns]
    ids = model.chat(messages)
    tags = token_tags(turns, [model.piece(token) for token in ids])
    read = cut_tokens(ids)
    if len(read) < len(ids):
        tags = np.concatenate([tags[:FIRST_TOKENS], tags[len(ids) - len(read) + FIRST_TOKENS :]])
    limit = float(np.finfo(np.float16).max)
    return tags, early.states(read).clip(-limit, limit).astype(np.float16)


def _write_part(
    directory: Path,
    number: int,
    found: Sequence[tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]],
    layers: Sequence[int],
) -> None:
    states = np.concatenate([states for _, states in found])
    for layer, values in zip(layers, np.split(states, len(layers), axis=1), strict=True):
        with atomic_write(part_file(directory, number, f"L{layer}")) as file:
            np.save(file, np.ascontiguousarray(values))
    with atomic_write(part_file(directory, number, "tokens")) as file:
        np.savez(
            file,
            lengths=np.asarray([len(tags) for tags, _ in found], np.int64),
            tags=np.concatenate([tags for tags, _ in found]),
        )


if __name__ == "__main__":
    main(sys.argv[1:])
