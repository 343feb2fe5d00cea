"""Ends what llama.cpp computes from another thread, in the middle of a prompt.

llama.cpp asks a callback between any two nodes of the graph, a thousand times a token, and a Python function
would take the GIL each time: so what it asks is the C library's ``strlen`` of a text that is empty until
somebody wants an end.
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
    """One for all contexts of a model; answers are known by their numbers."""

    def __init__(self) -> None:
        self._flag = ctypes.create_string_buffer(2)
        self._lock = threading.Lock()
        self._current: int | None = None
        self._stopped: set[int] = set()

    def attach(self, parameters: Any) -> None:
        """Let contexts that are made with these parameters ask it."""
        library = ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)
        strlen = ctypes.cast(library.strlen, ctypes.c_void_p).value
        parameters.abort_callback = C.ggml_abort_callback(strlen)
        parameters.abort_callback_data = ctypes.addressof(self._flag)

    @contextmanager
    def running(self, number: int) -> Iterator[None]:
        """What is decoded meanwhile is for that answer alone; where it was stopped it ends as `Interrupted`."""
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
        """Nobody wants that answer any more; callable from any thread."""
        with self._lock:
            self._stopped.add(number)
            if number == self._current:
                self._set_flag(True)

    def clear(self, number: int) -> None:
        """It has ended."""
        with self._lock:
            self._stopped.discard(number)

    def _set_flag(self, stopped: bool) -> None:
        self._flag[0] = b"x" if stopped else b"\0"
