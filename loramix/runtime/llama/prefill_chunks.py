"""Where prompts are cut, so that what is read behind a cached prefix gets the bits of a prompt read whole.

ggml rounds by how many tokens it sees at once: it multiplies repacked matrices by four rows and the rest by
one, and attends to a token alone, to some, and to `TILE` or more by different kernels (`ggml-cpu/repack.cpp`,
`ops.cpp`). An answer must not depend on what was asked before, so a cached prefix is used up to a place from
which the same kernels do the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

TILE = 64
"""Tokens at once from which on ggml attends in tiles (GGML_FA_TILE_Q)."""
ROWS = 4
"""Rows that repacked matrices are multiplied by at once."""


def chunks(position: int, tokens: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Cut tokens where a prompt that begins at 0 is cut.

    Args:
        position: of the first of them.
        tokens: ids.
        size: most tokens that are read at once.
    """
    end = size - position % size
    yield tokens[:end]
    for start in range(end, len(tokens), size):
        yield tokens[start : start + size]


def resume_position(same: int, whole: int, n_tokens: int, size: int) -> int:
    """Where to go on behind a cached prefix; everything then has the bits of a prompt that is read from 0 on.

    Args:
        same: tokens that are cached, fewer than the prompt has.
        whole: length of the prompt that they were read with.
        n_tokens: of this prompt.
        size: see `chunks`.
    """
    same = min(same, whole)
    first = same - same % size
    now = min(size, n_tokens - first)
    least = _least(now)
    if least != _least(min(size, whole - first)):
        return first
    start = min(same - first, now - least)
    return first + start - start % ROWS


def _least(n_tokens: int) -> int:
    """Fewest tokens that go through the same kernels as so many."""
    return next(least for least in (TILE, 2, 1, 0) if n_tokens >= least)
