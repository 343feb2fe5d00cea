"""Layer taps: copies of layers' inputs from llama.cpp's decoding.

Some architectures keep their layers' inputs on request (src/llama-ext.h). For others a callback reads the node
that computes them, which costs a Python call per node of the graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.architectures import ARCHITECTURES
from loramix.defaults import LLAMA_CPP
from loramix.errors import NativeError
from loramix.runtime.llama.model import C, ggml


def _extension(names: tuple[str, ...], arguments: list[Any], result: Any) -> Any:
    for name in names:
        if (function := getattr(C._lib, name, None)) is not None:
            function.argtypes, function.restype = arguments, result
            return function
    raise NativeError(f"this llama.cpp has no layer tap; install {LLAMA_CPP}.")


def tap(context: Any, layer: int) -> None:
    """Let llama.cpp keep a layer's input (src/llama-ext.h, llama_set_embeddings_layer_inp)."""
    names = ("llama_set_embeddings_layer_inp", "_Z30llama_set_embeddings_layer_inpP13llama_contextjb")
    arguments = [C.llama_context_p_ctypes, ctypes.c_uint32, ctypes.c_bool]
    _extension(names, arguments, None)(context, layer, True)


def tapped(context: Any, layer: int) -> Any:
    """Return a tapped layer's input for all tokens of the last batch (llama_get_embeddings_layer_inp)."""
    names = ("llama_get_embeddings_layer_inp", "_Z30llama_get_embeddings_layer_inpP13llama_contextj")
    arguments = [C.llama_context_p_ctypes, ctypes.c_uint32]
    return _extension(names, arguments, ctypes.POINTER(ctypes.c_float))(context, layer)


class NodeTaps:
    """Reads layers' inputs from the nodes of llama.cpp's graph.

    Args:
        layers: layers to tap; the input of layer 0 is the embedding.
        n_embd: embedding width of the base.
        stop: end the graph at the highest of these layers.
        embedding: node of the embedding, needed with ``stop``; see `Architecture.embedding_node`.
    """

    def __init__(
        self, layers: Sequence[int], n_embd: int, *, stop: bool = False, embedding: bytes = b""
    ) -> None:
        self._layers = {f"l_out-{layer - 1}".encode(): layer for layer in layers if layer}
        if 0 in layers:
            # of a base that scales its embeddings, the node after the scaling comes last and stays
            self._layers |= {about.embedding_node.encode(): 0 for about in ARCHITECTURES.values()}
        top = max(layers)
        self._last = (f"l_out-{top - 1}".encode() if top else embedding) if stop else None
        self._n_embd = n_embd
        self._name = ggml("ggml_get_name", ctypes.c_char_p)
        self._data = ggml("ggml_get_data", ctypes.c_void_p)
        self._count = ggml("ggml_nelements", ctypes.c_int64)
        self._rows: dict[int, npt.NDArray[np.float32]] = {}
        self.callback = C.ggml_backend_sched_eval_callback(self._on_node)

    def clear(self) -> None:
        """Forget the last batch."""
        self._rows.clear()

    def rows(self, layer: int) -> npt.NDArray[np.float32]:
        """Return a tapped layer's input for all tokens of the last batch, (T, D) float32.

        Raises:
            NativeError: the graph has no such node.
        """
        found = self._rows.get(layer)
        if found is None:
            raise NativeError(
                f"this llama.cpp computes no input of layer {layer} by its known name; install {LLAMA_CPP}."
            )
        return found

    def _on_node(self, node: int, ask: bool, _user: Any) -> bool:
        name = self._name(node)
        layer = self._layers.get(name)
        if layer is None:
            return not ask
        if not ask:
            size = self._count(node)
            values = np.ctypeslib.as_array((ctypes.c_float * size).from_address(self._data(node)))
            self._rows[layer] = values.reshape(-1, self._n_embd).copy()
            return bool(name != self._last)
        return True
