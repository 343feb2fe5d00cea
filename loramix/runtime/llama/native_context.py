"""What every llama.cpp context is to us: made and freed, its adapters set, its sequences' KV copied out and in."""

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
    """Owns one native context with its batch; it is freed with the model at the latest.

    Args:
        model: the base.
        parameters: llama.cpp's; ``n_ctx`` and ``n_batch`` are set.

    Raises:
        NativeError: no memory, or llama.cpp refuses.
    """

    def __init__(self, model: Model, parameters: Any) -> None:
        self.model = model
        self._mix: tuple[tuple[Adapter, float], ...] = ()
        self.pointer: Any = None
        self._make(parameters)

    def _make(self, parameters: Any) -> None:
        """Make the native context, instead of the one there is; that stays where no other can be made."""
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
            if mix:  # llama.cpp aborts on no adapters with a count, and has none to begin with
                handles = (C.llama_adapter_lora_p_ctypes * len(mix))(*(adapter.pointer for adapter, _ in mix))
                scales = (ctypes.c_float * len(mix))(*(scale for _, scale in mix))
                C.llama_set_adapters_lora(self.pointer, handles, len(mix), scales)
            elif self._mix:
                C.llama_set_adapters_lora(self.pointer, None, 0, None)
            self._mix = tuple(mix)

    @property
    def adapters(self) -> list[Adapter]:
        """What acts in it."""
        return [adapter for adapter, _ in self._mix]

    def _copy_kv(self, sequence: int, n_tokens: int) -> KV:
        with self.model.lock:
            size = C.llama_state_seq_get_size(self.pointer, sequence)
            kv = np.empty(size, np.uint8)
            done = C.llama_state_seq_get_data(self.pointer, _bytes(kv), size, sequence)
        if done != size:
            raise NativeError(f"llama.cpp could not copy the KV of {n_tokens} tokens{why()}.")
        return kv

    def _put_kv(self, sequence: int, kv: KV) -> bool:
        """Whether llama.cpp took all of it; what it took stays if not."""
        with self.model.lock:
            return bool(
                C.llama_state_seq_set_data(self.pointer, _bytes(kv), kv.nbytes, sequence) == kv.nbytes
            )

    def close(self) -> None:
        """Free the context; may be called again."""
        with self.model.lock:
            if self.pointer:
                C.llama_batch_free(self._batch)
                C.llama_free(self.pointer)
                self.pointer = None
                self.model.contexts.discard(self)


def _bytes(array: KV) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def trim_heap() -> None:
    """Give the system what the C heap holds and nobody uses: glibc keeps holes of many MB, and only it needs this."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
