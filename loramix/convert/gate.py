"""Converts a torch gate to gate.npz after comparing both forward passes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loramix.errors import MissingExtra, SelfCheckFailed
from loramix.models.old_gate import Floats, NumpyGate
from loramix.paths import write_bytes

if TYPE_CHECKING:
    from loramix.models.old_gate_torch import Gate

TOLERANCE = 1e-5
_TIE = 1e-6  # two classes closer than this are a tie in float32, and either may win
_ROWS = 1000
_WIDTHS = (1.0, 0.25, 3.0)  # standard deviations of the random inputs, relative to the training features

_log = logging.getLogger(__name__)


def convert_gate(source: Path, out: Path) -> float:
    """Write a trained gate in its NumPy form, if both forms make the same decisions.

    Args:
        source: directory with gate.safetensors and gate.json.
        out: the gate.npz to write.

    Returns:
        The largest absolute difference between the two forms' probabilities.

    Raises:
        NotFound: no trained gate in ``source``.
        InvalidArtifact: the trained gate is damaged.
        SelfCheckFailed: the two forms differ; nothing is written.
        MissingExtra: torch is not installed.
    """
    try:
        from loramix.models.old_gate_torch import Gate
    except ImportError as error:
        raise MissingExtra(f"converting a gate needs {error.name}: pip install 'loramix[train]'.") from None
    gate = Gate.load(source)
    content = NumpyGate(gate.info, gate.arrays(), str(source)).to_bytes()
    # compare what is read back from the file, not what is in memory
    difference = compare(gate, NumpyGate.from_bytes(content, str(out)))
    write_bytes(out, content)
    _log.info("%s written; largest difference to torch %.1e", out, difference)
    return difference


def compare(gate: Gate, converted: NumpyGate) -> float:
    """Compare both forward passes on 3 × 1,000 random inputs with the spread of the training features, less and more.

    Returns:
        The largest absolute difference of a probability.

    Raises:
        SelfCheckFailed: the difference is above 1e-5, or the two forms choose different classes.
    """
    import torch

    rng = np.random.default_rng(0)
    mean, std = converted.arrays["mean"], converted.arrays["std"]
    worst = 0.0
    for width in _WIDTHS:
        noise = rng.standard_normal((_ROWS, converted.n_features), dtype=np.float32)
        inputs: Floats = mean + std * noise * np.float32(width)
        with torch.no_grad():
            expected = gate.probabilities(torch.from_numpy(inputs)).numpy()
        found = converted.probabilities(inputs)
        worst = max(worst, float(np.abs(found - expected).max()))
        ordered = np.sort(expected, axis=1)
        clear = ordered[:, -1] - ordered[:, -2] > _TIE if ordered.shape[1] > 1 else np.ones(_ROWS, bool)
        flipped = int(((found.argmax(axis=1) != expected.argmax(axis=1)) & clear).sum())
        if not worst <= TOLERANCE or flipped:
            raise SelfCheckFailed(
                f"the converted gate differs from the trained one by {worst:.1e} (at most {TOLERANCE:.0e} is "
                f"allowed) and decides differently for {flipped} of {_ROWS} inputs; nothing was written: "
                "train the gate again."
            )
    return worst
