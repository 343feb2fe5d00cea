"""Owns llama.cpp's model and adapter handles.

Guards against two crashes: an adapter that failed to load is a NULL pointer object, not None, and freeing an
adapter in use aborts the process.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from loramix.architectures import ARCHITECTURES
from loramix.errors import NativeError, Unsupported
from loramix.runtime.llama.interrupt import Interrupt
from loramix.runtime.llama.native import C
from loramix.runtime.llama.vocabulary import Vocabulary

__all__ = ["Adapter", "C", "Model", "ggml", "quantize_rows", "start", "why"]
_log_tail: list[str] = []


@C.llama_log_callback  # type: ignore[untyped-decorator]  # ctypes
def _log(level: int, text: bytes, _user: Any) -> None:
    if level >= 3:  # warnings and errors; 4 is GGML_LOG_LEVEL_ERROR
        _log_tail.append(text.decode("utf-8", "replace").strip())
        del _log_tail[:-5]


def start() -> None:
    """Initialize llama.cpp; may be called more than once."""
    C.llama_log_set(_log, ctypes.c_void_p(0))
    C.llama_backend_init()


def why() -> str:
    """Return llama.cpp's last warning as the end of an error message; empty if there is none."""
    return f" (llama.cpp: {_log_tail[-1]})" if _log_tail else ""


class OpenContext(Protocol):
    """The part of a context that a model uses to free everything in order."""

    @property
    def adapters(self) -> list[Adapter]:
        """Active adapters."""

    def close(self) -> None:
        """Free the context; may be called more than once."""


class Model(Vocabulary):
    """A base model in memory, with its vocabulary.

    Args:
        path: a GGUF validated by `loramix.formats.validate`.
        vocab_only: load no weights, for tokenizing only.
        use_extra_bufts: let llama.cpp repack weights for the CPU; decided by `loramix.runtime.probe`.

    Raises:
        NativeError: llama.cpp cannot load it.
    """

    def __init__(self, path: Path, *, vocab_only: bool = False, use_extra_bufts: bool = True) -> None:
        start()
        self._path = path
        self._stack = ExitStack()
        self.lock = (
            threading.RLock()
        )  # adapters are listed by every context's graph: no change while one decodes
        self.adapters: dict[int, Adapter] = {}
        self.contexts: set[OpenContext] = set()
        self.interrupt = Interrupt()
        parameters = C.llama_model_default_params()
        parameters.vocab_only = vocab_only
        parameters.use_extra_bufts = use_extra_bufts
        parameters.n_gpu_layers = 0
        self.pointer = C.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.pointer:
            raise NativeError(f"llama.cpp cannot load the base {path}{why()}; run 'loramix doctor'.")
        self._stack.callback(C.llama_model_free, self.pointer)
        super().__init__(self.pointer, str(path))
        self.architecture = ARCHITECTURES[self._value("general.architecture")]
        self.n_layer = int(C.llama_model_n_layer(self.pointer))
        self.n_embd = int(C.llama_model_n_embd(self.pointer))
        self.n_ctx_train = int(C.llama_model_n_ctx_train(self.pointer))

    def forget_file(self) -> None:
        """Release the pages of the mapped file (Linux); pages in use are read again from the page cache.

        Repacked weights never read their mapped originals again, which would otherwise stay resident.
        """
        if sys.platform != "linux":
            return
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        real = str(self._path.resolve())
        for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
            fields = line.split(None, 5)
            if len(fields) == 6 and fields[5] == real and fields[1].startswith("r--"):
                start, end = (int(number, 16) for number in fields[0].split("-"))
                libc.madvise(start, end - start, 4)  # MADV_DONTNEED

    def load_adapter(self, content: bytes, name: str) -> Adapter:
        """Load validated bytes as an adapter.

        Raises:
            NativeError: llama.cpp cannot load them.
        """
        with self.lock:
            pointer = _init_adapter(self.pointer, content)
            if not pointer:  # a NULL pointer object: "is None" would never be true
                raise NativeError(f"llama.cpp refuses adapter {name!r}{why()}; run 'loramix pack check'.")
            adapter = Adapter(self, pointer, name)
            self.adapters[id(adapter)] = adapter
            return adapter

    def close(self) -> None:
        """Free contexts, then adapters, then the model; may be called more than once."""
        with self.lock:
            for context in list(self.contexts):
                context.close()
            for adapter in list(self.adapters.values()):
                adapter.close()
            self._stack.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Adapter:
    """A LoRA adapter in memory; created by `Model.load_adapter`."""

    def __init__(self, model: Model, pointer: Any, name: str) -> None:
        self.model, self.pointer, self.name = model, pointer, name

    @property
    def in_use(self) -> bool:
        """Whether a context uses it."""
        return any(self in context.adapters for context in self.model.contexts)

    def close(self) -> None:
        """Free it.

        Raises:
            NativeError: a context uses it; freeing it would crash.
        """
        with self.model.lock:
            if self.model.adapters.pop(id(self), None) is None:
                return
            if self.in_use:
                self.model.adapters[id(self)] = self
                raise NativeError(
                    f"adapter {self.name!r} is in use and cannot be freed; close its contexts first."
                )
            C.llama_adapter_lora_free(self.pointer)


def _init_adapter(model: Any, content: bytes) -> Any:
    """Load an adapter through a FILE* on private memory, so that no process can replace the validated bytes."""
    libc = ctypes.CDLL(None)
    libc.fdopen.restype = ctypes.c_void_p
    libc.fdopen.argtypes = [ctypes.c_int, ctypes.c_char_p]
    libc.fclose.argtypes = [ctypes.c_void_p]
    if sys.platform == "linux":
        descriptor = os.memfd_create("loramix-adapter", os.MFD_CLOEXEC)
    else:
        descriptor, name = tempfile.mkstemp()
        Path(name).unlink()
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    stream = libc.fdopen(descriptor, b"rb")
    try:
        return C.llama_adapter_lora_init_from_file_ptr(model, stream)
    finally:
        libc.fclose(stream)


def ggml(name: str, result: Any, *arguments: Any) -> Any:
    """Return a function of llama.cpp's ggml with its ctypes signature; by default with one tensor argument."""
    function = getattr(C._lib, name)
    function.argtypes, function.restype = list(arguments) or [ctypes.c_void_p], result
    return function


def quantize_rows(values: npt.NDArray[Any], type_id: int) -> npt.NDArray[np.uint8]:
    """Quantize rows with llama.cpp (ggml.h, ``ggml_quantize_chunk``), without importance weights.

    Args:
        values: (rows, columns) of finite floats, columns a multiple of the type's block.
        type_id: GGML id of a quantized type.

    Returns:
        (rows, bytes) uint8.

    Raises:
        Unsupported: the type requires importance weights.
    """
    needs_imatrix = ggml("ggml_quantize_requires_imatrix", ctypes.c_bool, ctypes.c_int)
    if needs_imatrix(type_id):
        raise Unsupported(
            f"tensors of GGML type {type_id} cannot be made without an importance matrix; give --quant."
        )
    size, floats = ctypes.c_size_t, ctypes.POINTER(ctypes.c_float)
    row_size = ggml("ggml_row_size", size, ctypes.c_int, ctypes.c_int64)
    arguments = (ctypes.c_int, floats, ctypes.c_void_p, *[ctypes.c_int64] * 3, floats)
    chunk = ggml("ggml_quantize_chunk", size, *arguments)
    rows, columns = values.shape
    out = np.empty((rows, row_size(type_id, columns)), np.uint8)
    source = np.ascontiguousarray(values, np.float32)
    chunk(type_id, source.ctypes.data_as(floats), out.ctypes.data, 0, rows, columns, None)
    return out
