"""Prefill chunking that keeps results bit-identical with and without a cached prefix.

ggml's rounding depends on the number of tokens in a batch: it multiplies repacked matrices by four rows at a time
and the remaining rows one by one, and uses different attention kernels for one token, for several, and for `TILE`
or more (`ggml-cpu/repack.cpp`, `ops.cpp`). An answer must not depend on earlier requests, so prefill resumes at
a position from which the same kernels process the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

TILE = 64
"""Batch size from which ggml uses tiled attention (GGML_FA_TILE_Q)."""
ROWS = 4
"""Rows per multiplication with repacked matrices."""


def chunks(position: int, tokens: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Split tokens at the same positions as a prompt that begins at position 0.

    Args:
        position: position of the first token.
        tokens: token ids.
        size: maximum tokens per chunk.
    """
    end = size - position % size
    yield tokens[:end]
    for start in range(end, len(tokens), size):
        yield tokens[start : start + size]


def resume_position(cached: int, source_length: int, n_tokens: int, size: int) -> int:
    """Position at which prefill resumes after a cached prefix so that results stay bit-identical.

    Args:
        cached: number of cached tokens, less than ``n_tokens``.
        source_length: length of the prompt that the cached tokens were prefilled with.
        n_tokens: length of this prompt.
        size: see `chunks`.
    """
    cached = min(cached, source_length)
    first = cached - cached % size
    count = min(size, n_tokens - first)
    threshold = _kernel_threshold(count)
    if threshold != _kernel_threshold(min(size, source_length - first)):
        return first
    start = min(cached - first, count - threshold)
    return first + start - start % ROWS


def _kernel_threshold(n_tokens: int) -> int:
    """Smallest batch size that uses the same kernels as ``n_tokens``."""
    return next(threshold for threshold in (TILE, 2, 1, 0) if n_tokens >= threshold)
