"""Layer taps: what goes into a layer, kept by llama.cpp while it decodes; its own header for extensions has them."""

from __future__ import annotations

import ctypes
from typing import Any

from loramix.errors import NativeError
from loramix.runtime.llama import C


def _extension(names: tuple[str, ...], arguments: list[Any], result: Any) -> Any:
    for name in names:
        if (function := getattr(C._lib, name, None)) is not None:
            function.argtypes, function.restype = arguments, result
            return function
    raise NativeError("this llama.cpp has no layer tap; install llama-cpp-python==0.3.36.")


def tap(context: Any, layer: int) -> None:
    """Keep a layer's input (src/llama-ext.h, llama_set_embeddings_layer_inp)."""
    names = ("llama_set_embeddings_layer_inp", "_Z30llama_set_embeddings_layer_inpP13llama_contextjb")
    arguments = [C.llama_context_p_ctypes, ctypes.c_uint32, ctypes.c_bool]
    _extension(names, arguments, None)(context, layer, True)


def tapped(context: Any, layer: int) -> Any:
    """Rows of a tapped layer for all tokens of the last batch (llama_get_embeddings_layer_inp)."""
    names = ("llama_get_embeddings_layer_inp", "_Z30llama_get_embeddings_layer_inpP13llama_contextj")
    arguments = [C.llama_context_p_ctypes, ctypes.c_uint32]
    return _extension(names, arguments, ctypes.POINTER(ctypes.c_float))(context, layer)
