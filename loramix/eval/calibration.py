"""How well the probabilities of label skills' answers are calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loramix.eval.answers import Given
from loramix.train.calibration import LABEL_BINS, adaptive_error, binned
from loramix.train.data import Row
from loramix.train.metrics import measure


def label_calibration(given: Sequence[Given], rows: Sequence[Row]) -> dict[str, Any] | None:
    """Compute how well the probabilities of a label skill's answers are calibrated.

    Args:
        given: greedy answers with the labels' probabilities.
        rows: with the right labels.

    Returns:
        ``error`` and ``bins`` of `binned`, ``adaptive_error``, ``accuracy`` and ``rows``; None if an answer has no
        labels.
    """
    if not given or not all(answer.labels for answer in given):
        return None
    right = measure("accuracy").counts
    confidence = np.asarray([max((answer.labels or {}).values()) for answer in given])
    hit = np.asarray([bool(right(a.text, row)[0]) for a, row in zip(given, rows, strict=True)])
    return {
        **binned(confidence, hit, LABEL_BINS),
        "adaptive_error": adaptive_error(confidence, hit, LABEL_BINS),
        "accuracy": float(hit.mean()),
        "rows": len(hit),
    }
