"""Reads the states of a prompt's tokens at low layers of the bare base, and computes no layer above them.

llama.cpp ends a graph at the node for which the evaluation callback answers False. Only the layers below it have
run then, and its values are the states of all tokens. The KV is incomplete, so it is discarded after each pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loramix.defaults import LLAMA_CPP
from loramix.errors import Interrupted, InvalidPrompt, NativeError
from loramix.models.gate_window import READ_TOKENS
from loramix.runtime.llama.hidden_states import NodeTaps
from loramix.runtime.llama.model import C, Model, why
from loramix.runtime.llama.native_context import NativeContext


class EarlyPass(NativeContext):
    """A small context of its own, which no answer uses; calls are serialized by the model's lock.

    Args:
        model: the base; its `Interrupt` also stops these passes.
        layers: layers (0 to n_layer - 1) whose inputs are read; 0 is the token embeddings, which needs no layer.
        n_threads: threads for the pass.
        max_tokens: maximum tokens of a pass; memory is allocated for as many.

    Raises:
        NativeError: the base has no such layer, or no memory is left.
    """

    def __init__(
        self, model: Model, layers: Sequence[int], *, n_threads: int, max_tokens: int = READ_TOKENS
    ) -> None:
        for layer in layers:
            if not 0 <= layer < model.n_layer:
                raise NativeError(f"layer {layer} cannot be read; the base has 0 to {model.n_layer - 1}.")
        if not layers:
            raise NativeError("a pass needs at least one layer to read; name one.")
        self.layers, self.max_tokens = tuple(layers), max_tokens
        self.n_tokens_read = 0
        """Tokens read since the start, of all passes."""
        self._taps = NodeTaps(
            layers, model.n_embd, stop=True, embedding=model.architecture.embedding_node.encode()
        )
        parameters = C.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = max_tokens
        parameters.n_outputs_max = 1
        parameters.n_threads = parameters.n_threads_batch = n_threads
        parameters.no_perf = True
        parameters.cb_eval = self._taps.callback
        model.interrupt.attach(parameters)
        super().__init__(model, parameters)

    def states(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Read the states of tokens, which get positions 0, 1, 2, … even if tokens between them were cut out.

        Args:
            tokens: 1 to ``max_tokens`` ids of the base's vocabulary.

        Returns:
            (T, layers x D) float32, the layers side by side in the order given.

        Raises:
            InvalidPrompt: no token, or more than ``max_tokens``.
            NativeError: llama.cpp fails, or states are not finite.
            Interrupted: by the model's `Interrupt`; the next pass is unharmed.
        """
        if not 0 < len(tokens) <= self.max_tokens:  # more than n_batch would abort the process
            raise InvalidPrompt(
                f"the gate reads 1 to {self.max_tokens} tokens of a prompt at once, not {len(tokens)}."
            )
        if not all(0 <= token < self.model.n_vocab for token in tokens):
            raise InvalidPrompt(
                "a token is not of the base's vocabulary; tokenize the prompt with this base."
            )
        with self.model.lock:
            self._taps.clear()
            self._fill_batch([(token, place, 0, False) for place, token in enumerate(tokens)])
            code = C.llama_decode(self.pointer, self._batch)
            C.llama_memory_clear(self._memory, False)
            if code == 2:
                raise Interrupted("the answer was cancelled.")
            if code != 0:
                raise NativeError(
                    f"llama.cpp could not read the prompt for the gate (code {code}){why()}; "
                    "run 'loramix doctor'."
                )
            states = np.concatenate([self._taps.rows(layer) for layer in self.layers], axis=1)
            self._taps.clear()
        if len(states) != len(tokens):
            raise NativeError(
                f"llama.cpp gave states of {len(states)} tokens instead of {len(tokens)}; "
                f"install {LLAMA_CPP}."
            )
        if not np.isfinite(states).all():
            raise NativeError(
                "the base gave states that are not finite; check its file with 'loramix doctor'."
            )
        self.n_tokens_read += len(tokens)
        return states
