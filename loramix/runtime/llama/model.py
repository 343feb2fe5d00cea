"""llama.cpp's model and adapters; with `loramix.runtime.llama.context` the only owner of its handles.

Measured traps it guards: an adapter that failed to load is a NULL pointer object and not None, and an
adapter freed while in use kills the process.
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
    """Begin with llama.cpp; may be called again."""
    C.llama_log_set(_log, ctypes.c_void_p(0))
    C.llama_backend_init()


def why() -> str:
    """What llama.cpp complained of last, to end a message with."""
    return f" (llama.cpp: {_log_tail[-1]})" if _log_tail else ""


class OpenContext(Protocol):
    """What a model must know of the contexts on it, to free everything in order."""

    @property
    def adapters(self) -> list[Adapter]:
        """Adapters that act in it."""

    def close(self) -> None:
        """Free it; may be called again."""


class Model(Vocabulary):
    """A base model in memory, with its vocabulary.

    Args:
        path: a GGUF that `loramix.formats.validate` has passed.
        vocab_only: load no weights, for tokenizing.
        use_extra_bufts: let llama.cpp repack weights for the CPU; what `loramix.runtime.probe` allows.

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
        """Give back the pages of the mapped file; those that are used come again from the system's cache.

        Where weights were repacked, their mapped originals are never read again, and would stay resident (Linux).
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
        """Load exactly these checked bytes as an adapter.

        Raises:
            NativeError: llama.cpp refuses them.
        """
        with self.lock:
            pointer = _init_adapter(self.pointer, content)
            if not pointer:  # a NULL pointer object: "is None" would never be true
                raise NativeError(f"llama.cpp refuses adapter {name!r}{why()}; run 'loramix pack check'.")
            adapter = Adapter(self, pointer, name)
            self.adapters[id(adapter)] = adapter
            return adapter

    def close(self) -> None:
        """Free contexts, then adapters, then the model; may be called again."""
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
    """One LoRA in memory; made by `Model.load_adapter`."""

    def __init__(self, model: Model, pointer: Any, name: str) -> None:
        self.model, self.pointer, self.name = model, pointer, name

    @property
    def in_use(self) -> bool:
        """Whether a context holds it."""
        return any(self in context.adapters for context in self.model.contexts)

    def close(self) -> None:
        """Free it; refused while a context uses it, since that would crash."""
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
    """Load an adapter through a FILE* on private memory, so that nobody can swap the checked bytes."""
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
    """A function of the copy of ggml that llama.cpp uses, with its ctypes; by default it takes a tensor alone."""
    function = getattr(C._lib, name)
    function.argtypes, function.restype = list(arguments) or [ctypes.c_void_p], result
    return function


def quantize_rows(values: npt.NDArray[Any], type_id: int) -> npt.NDArray[np.uint8]:
    """Round rows to a tensor type as llama.cpp does (ggml.h, ``ggml_quantize_chunk``), without importance weights.

    Args:
        values: (rows, columns) of finite floats, columns a multiple of the type's block.
        type_id: GGML's number of a quantized type.

    Returns:
        (rows, bytes) uint8.

    Raises:
        Unsupported: the type is defined with importance weights alone.
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
