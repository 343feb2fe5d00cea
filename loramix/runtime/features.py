"""Features of the old gate: hidden states of the bare base at the end of the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loramix.errors import Unsupported
from loramix.runtime.llama.context import Context

POOLINGS = ("last", "mean", "last+mean")


def pool(context: Context, layers: Sequence[int], pooling: str) -> npt.NDArray[np.float32]:
    """Compute the features of the prompt in a context.

    Args:
        context: a tapped context of the bare base that ends with the answer's header.
        layers: tapped layers, concatenated in this order.
        pooling: ``last`` token, ``mean`` over all tokens but the first (an outlier in norm), or ``last+mean``.

    Returns:
        (D x layers,) float32, twice that for ``last+mean``.

    Raises:
        Unsupported: another pooling.
    """
    if pooling not in POOLINGS:
        raise Unsupported(f"the gate asks for pooling {pooling!r}; this version knows {', '.join(POOLINGS)}.")
    blocks: list[npt.NDArray[np.float32]] = []
    for layer in layers:
        states = context.states(layer)
        if "last" in pooling:
            blocks.append(states[-1])
        if "mean" in pooling:
            blocks.append(states[1:].mean(axis=0))
    return np.concatenate(blocks)
