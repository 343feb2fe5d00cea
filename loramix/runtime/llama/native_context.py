"""Base class of llama.cpp contexts: creates and frees them, sets adapters, copies KV of sequences."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.errors import NativeError
from loramix.runtime.llama.model import Adapter, C, Model, why

KV = npt.NDArray[np.uint8]


class NativeContext:
    """Owns one native context and its batch; freed with the model at the latest.

    Args:
        model: the base.
        parameters: llama.cpp's context parameters, with ``n_ctx`` and ``n_batch`` set.

    Raises:
        NativeError: out of memory, or llama.cpp fails.
    """

    def __init__(self, model: Model, parameters: Any) -> None:
        self.model = model
        self._mix: tuple[tuple[Adapter, float], ...] = ()
        self.pointer: Any = None
        self._make(parameters)

    def _make(self, parameters: Any) -> None:
        """Create the native context and replace the current one, which is kept on an error."""
        with self.model.lock:
            pointer = C.llama_init_from_model(self.model.pointer, parameters)
            if not pointer:
                raise NativeError(
                    f"llama.cpp cannot make a context of {parameters.n_ctx} tokens{why()}; ask for fewer."
                )
            self.close()
            self.pointer = pointer
            self._batch = C.llama_batch_init(int(parameters.n_batch), 0, 1)
            self._memory = C.llama_get_memory(pointer)
            self.model.contexts.add(self)

    def _set_adapters(self, mix: Sequence[tuple[Adapter, float]]) -> None:
        with self.model.lock:
            if mix:  # llama.cpp aborts on an empty list of adapters
                handles = (C.llama_adapter_lora_p_ctypes * len(mix))(*(adapter.pointer for adapter, _ in mix))
                scales = (ctypes.c_float * len(mix))(*(scale for _, scale in mix))
                C.llama_set_adapters_lora(self.pointer, handles, len(mix), scales)
            elif self._mix:
                C.llama_set_adapters_lora(self.pointer, None, 0, None)
            self._mix = tuple(mix)

    @property
    def adapters(self) -> list[Adapter]:
        """Active adapters."""
        return [adapter for adapter, _ in self._mix]

    def _fill_batch(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Set the batch to tokens, each with its position, its sequence, and whether its logits are needed."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = logits

    def _copy_kv(self, sequence: int, n_tokens: int) -> KV:
        with self.model.lock:
            size = C.llama_state_seq_get_size(self.pointer, sequence)
            kv = np.empty(size, np.uint8)
            done = C.llama_state_seq_get_data(self.pointer, _bytes(kv), size, sequence)
        if done != size:
            raise NativeError(f"llama.cpp could not copy the KV of {n_tokens} tokens{why()}.")
        return kv

    def _put_kv(self, sequence: int, kv: KV) -> bool:
        """Load KV into a sequence; on failure return False, and the part loaded so far remains."""
        with self.model.lock:
            return bool(
                C.llama_state_seq_set_data(self.pointer, _bytes(kv), kv.nbytes, sequence) == kv.nbytes
            )

    def close(self) -> None:
        """Free the context; may be called more than once."""
        with self.model.lock:
            if self.pointer:
                C.llama_batch_free(self._batch)
                C.llama_free(self.pointer)
                self.pointer = None
                self.model.contexts.discard(self)


def _bytes(array: KV) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def trim_heap() -> None:
    """Return unused C heap memory to the system; only needed with glibc, which keeps many MB."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
