"""Logarithms of probabilities, in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Normalize logits over the last axis to natural logarithms of probabilities.

    Args:
        logits: (..., K) float32.

    Returns:
        (..., K) float64.
    """
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found
