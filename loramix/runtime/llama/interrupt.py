"""Interrupts llama.cpp from another thread in the middle of a prefill.

llama.cpp calls its abort callback between graph nodes, about a thousand times a token, and a Python callback
would take the GIL each time. The callback is therefore the C library's ``strlen`` on a string that is empty until
an interrupt is requested.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loramix.runtime.llama.native import C


class Interrupt:
    """The interrupt of all contexts of a model; answers are identified by number."""

    def __init__(self) -> None:
        self._flag = ctypes.create_string_buffer(2)
        self._lock = threading.Lock()
        self._current: int | None = None
        self._stopped: set[int] = set()

    def attach(self, parameters: Any) -> None:
        """Set the abort callback in a context's parameters."""
        library = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
        strlen = ctypes.cast(library.strlen, ctypes.c_void_p).value
        parameters.abort_callback = C.ggml_abort_callback(strlen)
        parameters.abort_callback_data = ctypes.addressof(self._flag)

    @contextmanager
    def running(self, number: int) -> Iterator[None]:
        """Mark an answer as the one being decoded; if it is stopped, decoding raises `Interrupted`."""
        with self._lock:
            self._current = number
            self._set_flag(number in self._stopped)
        try:
            yield
        finally:
            with self._lock:
                self._current = None
                self._set_flag(False)

    def stop(self, number: int) -> None:
        """Stop an answer; may be called from any thread."""
        with self._lock:
            self._stopped.add(number)
            if number == self._current:
                self._set_flag(True)

    def clear(self, number: int) -> None:
        """Discard the stop request of an ended answer."""
        with self._lock:
            self._stopped.discard(number)

    def _set_flag(self, stopped: bool) -> None:
        self._flag[0] = b"x" if stopped else b"\0"
