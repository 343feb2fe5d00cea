"""Reads prompts with a gate of the old format, which needs a whole pass of the bare base.

Only for packs whose gate file has format 1; deleted together with that format.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loramix.errors import Unsupported
from loramix.models.mixing import Mix
from loramix.models.old_gate import NumpyGate
from loramix.runtime.decoder import Decoder, DecodeRequest
from loramix.runtime.features import pool
from loramix.runtime.gate_reader import Reading
from loramix.runtime.prepared_prompt import PreparedPrompt


class OldReader:
    """Reads with a `NumpyGate`, in the answers' context of the bare base.

    Args:
        gate: the gate.
        decoder: decodes the prompt under the bare base; its contexts keep the gate's layers.
    """

    every = 1
    uses_base_context = True

    def __init__(self, gate: NumpyGate, decoder: Decoder) -> None:
        self.gate, self._decoder = gate, decoder

    def request(self, prompt: PreparedPrompt) -> DecodeRequest:
        """See `GateReader.request`."""
        return DecodeRequest(Mix.EMPTY, prompt.routed, len(prompt.routed))

    def read(self, prompt: PreparedPrompt) -> Reading:
        """Read the last user message alone, as in the gate's training."""
        began = time.perf_counter()
        context, start, _ = self._decoder.pool.prepare(Mix.EMPTY, prompt.routed)
        context.decode(prompt.routed[start:])
        features = pool(context, self.gate.info.layers, self.gate.info.pooling)
        middle = time.perf_counter()
        probabilities = self.gate.probabilities(features)
        return Reading(
            probabilities, timings={"features": middle - began, "gate": time.perf_counter() - middle}
        )

    def need_reread(self) -> None:
        """Raise Unsupported if the gate reads more than the last token."""
        if self.gate.info.pooling != "last":
            raise Unsupported(
                f"the gate reads {self.gate.info.pooling!r}, not the last token alone, which token-wise routing "
                "needs; use another policy."
            )

    def reread(self, prompt: PreparedPrompt, answer: Sequence[int], mix: Mix) -> npt.NDArray[np.float32]:
        """Read the last token of the mix's context; see `GateReader.reread`."""
        states = pool(self._decoder.pool.get(mix), self.gate.info.layers, "last")
        return self.gate.probabilities(states)

    def close(self) -> None:
        """Nothing of its own to free."""


def tapped_layers(gate: object) -> tuple[int, ...]:
    """Layers whose inputs answers' contexts keep for a gate; none for a gate that has its own pass."""
    return tuple(gate.info.layers) if isinstance(gate, NumpyGate) else ()
