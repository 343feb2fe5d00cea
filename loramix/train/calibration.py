"""Calibration errors: how far confidences are from the shares that are right (Guo et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

GATE_BINS = 15
LABEL_BINS = 10


def binned(confidence: npt.NDArray[np.float64], hit: npt.NDArray[np.bool_], n_bins: int) -> dict[str, Any]:
    """Compute the expected calibration error with bins of equal width.

    Args:
        confidence: (B,) probability of each choice.
        hit: (B,) whether it was right.
        n_bins: number of bins.

    Returns:
        ``error``, and ``bins`` with ``confidence``, ``accuracy`` and ``rows`` of each bin that has rows.
    """
    place = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    bins = [_bin(confidence[place == i], hit[place == i]) for i in range(n_bins) if (place == i).any()]
    return {"error": _error(bins), "bins": bins}


def adaptive_error(confidence: npt.NDArray[np.float64], hit: npt.NDArray[np.bool_], n_bins: int) -> float:
    """Compute the calibration error with bins of equal numbers of rows (Nixon et al. 2019); see `binned`."""
    parts = np.array_split(np.argsort(confidence, kind="stable"), n_bins)
    return _error([_bin(confidence[part], hit[part]) for part in parts if len(part)])


def _bin(confidence: npt.NDArray[np.float64], hit: npt.NDArray[np.bool_]) -> dict[str, Any]:
    return {"confidence": float(confidence.mean()), "accuracy": float(hit.mean()), "rows": len(hit)}


def _error(bins: Sequence[dict[str, Any]]) -> float:
    total = sum(b["rows"] for b in bins)
    return float(sum(b["rows"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / max(total, 1))
