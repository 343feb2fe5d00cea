"""The only owner of llama.cpp handles: model, adapters, contexts.

Knows tokens, positions and logits; knows nothing of skills, gates or chat. Measured traps it guards:
an adapter that failed to load is a NULL pointer object and not None; a batch longer than ``n_batch``
and an adapter freed while in use kill the process; rounding of one mix must never meet another's KV.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.errors import InvalidPrompt, NativeError
from loramix.prompts import Segment

# OpenMP threads that spin for long starve each other when another program computes: eight tokens took
# 26 s beside a training run, 0.3 s with this, at no loss on an idle machine; it is read when the library loads
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
import llama_cpp.llama_cpp as C

_log_tail: list[str] = []


@C.llama_log_callback  # type: ignore[untyped-decorator]  # ctypes
def _log(level: int, text: bytes, _user: Any) -> None:
    if level >= 3:  # warnings and errors; 4 is GGML_LOG_LEVEL_ERROR
        _log_tail.append(text.decode("utf-8", "replace").strip())
        del _log_tail[:-5]


def _start() -> None:
    C.llama_log_set(_log, ctypes.c_void_p(0))
    C.llama_backend_init()


def _why() -> str:
    return f" (llama.cpp: {_log_tail[-1]})" if _log_tail else ""


class Model:
    """A base model in memory, with its vocabulary.

    Args:
        path: a GGUF that `loramix.convert.validate` has passed.
        vocab_only: load no weights, for tokenizing.
        use_extra_bufts: let llama.cpp repack weights for the CPU; what `loramix.runtime.probe` allows.

    Raises:
        NativeError: llama.cpp cannot load it.
    """

    def __init__(self, path: Path, *, vocab_only: bool = False, use_extra_bufts: bool = True) -> None:
        _start()
        self._stack = ExitStack()
        self._lock = (
            threading.RLock()
        )  # adapters are listed by every context's graph: no change while one decodes
        self.adapters: dict[int, Adapter] = {}
        self.contexts: set[Context] = set()
        parameters = C.llama_model_default_params()
        parameters.vocab_only = vocab_only
        parameters.use_extra_bufts = use_extra_bufts
        parameters.n_gpu_layers = 0
        self.pointer = C.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.pointer:
            raise NativeError(f"llama.cpp cannot load the base {path}{_why()}; run 'loramix doctor'.")
        self._stack.callback(C.llama_model_free, self.pointer)
        self.vocab = C.llama_model_get_vocab(self.pointer)
        self.n_layer = int(C.llama_model_n_layer(self.pointer))
        self.n_embd = int(C.llama_model_n_embd(self.pointer))
        self.n_ctx_train = int(C.llama_model_n_ctx_train(self.pointer))
        self.n_vocab = int(C.llama_vocab_n_tokens(self.vocab))
        self.bos = int(C.llama_vocab_bos(self.vocab))
        self.eos = int(C.llama_vocab_eos(self.vocab))
        self.add_bos = bool(C.llama_vocab_get_add_bos(self.vocab))
        template = C.llama_model_chat_template(self.pointer, None)
        self.chat_template = template.decode("utf-8", "replace") if template else ""
        # llama.cpp guesses the end of a turn by name and can miss the one the template writes
        eot = int(C.llama_vocab_eot(self.vocab))
        written = self.eos >= 0 and self.text(self.eos) in self.chat_template
        self.eot = self.eos if written or eot < 0 else eot

    @cached_property
    def controls(self) -> tuple[str, ...]:
        """The vocabulary's control tokens as text."""
        found = (i for i in range(self.n_vocab) if C.llama_vocab_is_control(self.vocab, i))
        return tuple(text for i in found if len(text := self.text(i)) > 2)

    def text(self, token: int) -> str:
        """A token as the vocabulary spells it."""
        raw = C.llama_vocab_get_text(self.vocab, token)
        return raw.decode("utf-8", "replace") if raw else ""

    def is_end(self, token: int) -> bool:
        """Whether a token ends an answer."""
        return bool(C.llama_vocab_is_eog(self.vocab, token))

    def tokenize(self, segments: Sequence[Segment] | str, *, special: bool = False) -> list[int]:
        """Tokenize text, or a rendered conversation in segments.

        Args:
            segments: plain text, or (text, whether special tokens in it are meant) in order.
            special: for plain text, whether special tokens in it are meant.
        """
        if isinstance(segments, str):
            segments = [(segments, special)]
        tokens: list[int] = []
        for text, meant in segments:
            raw = text.encode("utf-8", "replace")
            room = len(raw) + 8
            buffer = (C.llama_token * room)()
            count = C.llama_tokenize(self.vocab, raw, len(raw), buffer, room, False, meant)
            if count < 0:
                raise InvalidPrompt("the prompt cannot be tokenized; shorten it.")
            tokens += buffer[:count]
        return tokens

    def with_bos(self, tokens: list[int]) -> list[int]:
        """Put the beginning-of-sequence token first where the vocabulary wants it and the template lacks it."""
        wanted = self.add_bos and self.bos >= 0 and tokens[:1] != [self.bos]
        return [self.bos, *tokens] if wanted else tokens

    def piece(self, token: int) -> bytes:
        """A token's bytes in the output; empty for control tokens."""
        buffer = ctypes.create_string_buffer(64)
        count = C.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, False)
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = C.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[: max(count, 0)]

    def load_adapter(self, content: bytes, name: str) -> Adapter:
        """Load exactly these checked bytes as an adapter.

        Raises:
            NativeError: llama.cpp refuses them.
        """
        with self._lock:
            pointer = _init_adapter(self.pointer, content)
            if not pointer:  # a NULL pointer object: "is None" would never be true
                raise NativeError(f"llama.cpp refuses adapter {name!r}{_why()}; run 'loramix pack check'.")
            adapter = Adapter(self, pointer, name)
            self.adapters[id(adapter)] = adapter
            return adapter

    def close(self) -> None:
        """Free contexts, then adapters, then the model; may be called again."""
        with self._lock:
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
        with self.model._lock:
            if self.model.adapters.pop(id(self), None) is None:
                return
            if self.in_use:
                self.model.adapters[id(self)] = self
                raise NativeError(
                    f"adapter {self.name!r} is in use and cannot be freed; close its contexts first."
                )
            C.llama_adapter_lora_free(self.pointer)


@dataclass(frozen=True)
class Saved:
    """A context's tokens with their KV, copied out; fits any context of the same model, mix and taps."""

    tokens: tuple[int, ...]
    kv: npt.NDArray[np.uint8] = field(repr=False)
    states: dict[int, npt.NDArray[np.float32]] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self.kv.nbytes + sum(rows.nbytes for rows in self.states.values())


class Context:
    """One sequence under one mix: its tokens, and the KV that belongs to exactly them.

    Args:
        model: the base.
        mix: adapters with their scales; only `become` changes it, so KV cannot cross mixes.
        n_ctx: most tokens held.
        n_threads: threads for decoding and for prompts.
        taps: layers (0 to n_layer - 1) whose input is kept for the gate at each decode.
        exact: keep KV in float32 and attend without fusion, for comparisons with PyTorch.

    Raises:
        NativeError: no memory, or llama.cpp refuses.
    """

    N_BATCH = 512

    def __init__(
        self,
        model: Model,
        mix: Sequence[tuple[Adapter, float]] = (),
        *,
        n_ctx: int = 2048,
        n_threads: int = 2,
        taps: Sequence[int] = (),
        exact: bool = False,
    ) -> None:
        self.model, self.taps, self.n_ctx = model, tuple(taps), n_ctx
        self.adapters: list[Adapter] = []
        self.tokens: list[int] = []
        self.acts_from = 0  # the bare base's KV before, see `adopt`
        # (n_ctx, D) per tapped layer; row i belongs to tokens[i], so prefix reuse keeps them in step
        self._states = {layer: np.zeros((n_ctx, model.n_embd), np.float32) for layer in self.taps}
        parameters = C.llama_context_default_params()
        parameters.n_ctx = n_ctx
        parameters.n_batch = parameters.n_ubatch = min(self.N_BATCH, n_ctx)
        parameters.n_outputs_max = 1  # logits of one token: a small buffer instead of n_batch x vocabulary
        parameters.n_threads = parameters.n_threads_batch = n_threads
        parameters.no_perf = True
        if exact:
            parameters.type_k = parameters.type_v = 0  # GGML_TYPE_F32
            parameters.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._batch: Any = None
        with model._lock:
            self.pointer = C.llama_init_from_model(model.pointer, parameters)
            if not self.pointer:
                raise NativeError(
                    f"llama.cpp cannot make a context of {n_ctx} tokens{_why()}; ask for fewer."
                )
            self._batch = C.llama_batch_init(int(parameters.n_batch), 0, 1)
            self._memory = C.llama_get_memory(self.pointer)
            for layer in self.taps:
                if not 0 <= layer < model.n_layer:  # n_layer itself aborts the process
                    raise NativeError(
                        f"layer {layer} cannot be tapped; the base has 0 to {model.n_layer - 1}."
                    )
                _tap(self.pointer, layer)
            model.contexts.add(self)
            self._set_adapters(mix)

    def become(self, mix: Sequence[tuple[Adapter, float]]) -> None:
        """Serve another mix from now on; all tokens are forgotten first, so that KV cannot cross mixes.

        Args:
            mix: adapters with their scales.
        """
        self.truncate(0)
        self.acts_from = 0
        with self.model._lock:
            self._set_adapters(mix)

    def _set_adapters(self, mix: Sequence[tuple[Adapter, float]]) -> None:
        if mix:  # llama.cpp aborts on no adapters with a count, and has none to begin with
            handles = (C.llama_adapter_lora_p_ctypes * len(mix))(*(adapter.pointer for adapter, _ in mix))
            scales = (ctypes.c_float * len(mix))(*(scale for _, scale in mix))
            C.llama_set_adapters_lora(self.pointer, handles, len(mix), scales)
        elif self.adapters:
            C.llama_set_adapters_lora(self.pointer, None, 0, None)
        self.adapters = [adapter for adapter, _ in mix]

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on."""
        if length < len(self.tokens):
            if not C.llama_memory_seq_rm(self._memory, 0, length, -1):
                C.llama_memory_clear(self._memory, True)
                length = 0
            del self.tokens[length:]

    def save(self) -> Saved:
        """Copy out the tokens held, their KV and tapped states.

        Raises:
            NativeError: llama.cpp refuses.
        """
        states = {layer: self.states(layer).copy() for layer in self.taps}
        return Saved(tuple(self.tokens), self._get_kv(), states)

    def restore(self, saved: Saved) -> None:
        """Hold what `save` copied out instead of what is held now.

        Args:
            saved: of this model and mix, with the same taps.

        Raises:
            NativeError: llama.cpp refuses; the context is empty then.
        """
        self._set_kv(saved.kv, saved.tokens)
        for layer, rows in saved.states.items():
            self._states[layer][: len(rows)] = rows

    def adopt(self, other: Context, length: int) -> None:
        """Hold the first tokens of another context with its KV; for late adapters, which act behind them.

        Args:
            other: of the same model, usually the bare base's; this one has no taps.
            length: tokens, at most as many as the other holds.

        Raises:
            NativeError: llama.cpp refuses; the context is empty then.
        """
        self._set_kv(other._get_kv(), other.tokens)
        self.truncate(length)
        self.acts_from = length

    def _get_kv(self) -> npt.NDArray[np.uint8]:
        with self.model._lock:
            size = C.llama_state_seq_get_size(self.pointer, 0)
            kv = np.empty(size, np.uint8)
            done = C.llama_state_seq_get_data(self.pointer, _bytes(kv), size, 0)
        if done != size:
            raise NativeError(f"llama.cpp could not copy the KV of {len(self.tokens)} tokens{_why()}.")
        return kv

    def _set_kv(self, kv: npt.NDArray[np.uint8], tokens: Sequence[int]) -> None:
        self.truncate(0)
        with self.model._lock:
            done = C.llama_state_seq_set_data(self.pointer, _bytes(kv), kv.nbytes, 0)
        if done != kv.nbytes:
            C.llama_memory_clear(self._memory, True)
            raise NativeError(f"llama.cpp could not restore the KV of {len(tokens)} tokens{_why()}.")
        self.tokens = list(tokens)

    def states(self, layer: int) -> npt.NDArray[np.float32]:
        """Inputs of a tapped layer for all tokens held, (T, D) float32; a view, valid until the next call."""
        return self._states[layer][: len(self.tokens)]

    def decode(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append tokens and run the model on them.

        Args:
            tokens: ids, at least one; all within the context's room.

        Returns:
            Logits after the last token, (V,) float32, a copy.

        Raises:
            InvalidPrompt: more tokens than the context holds.
            NativeError: llama.cpp fails, or the logits are not finite (the KV is cleared then).
        """
        if len(self.tokens) + len(tokens) > self.n_ctx:
            raise InvalidPrompt(
                f"prompt and answer need {len(self.tokens) + len(tokens)} tokens; "
                f"the context holds {self.n_ctx}: shorten the prompt or give --ctx more."
            )
        size = min(self.N_BATCH, self.n_ctx)
        for start in range(0, len(tokens), size):
            chunk = tokens[start : start + size]
            self._decode_chunk(chunk)
            for layer, states in self._states.items():
                rows = _tapped(self.pointer, layer)
                view = np.ctypeslib.as_array(rows, shape=(len(chunk), self.model.n_embd))
                states[len(self.tokens) - len(chunk) : len(self.tokens)] = view
        row = C.llama_get_logits_ith(self.pointer, -1)
        logits = np.ctypeslib.as_array(row, shape=(self.model.n_vocab,)).copy()
        if not np.isfinite(logits).all():
            self.truncate(0)
            names = ", ".join(adapter.name for adapter in self.adapters) or "the bare base"
            raise NativeError(
                f"the model gave numbers that are not finite under {names}; run 'loramix pack check'."
            )
        return logits

    def _decode_chunk(self, chunk: Sequence[int]) -> None:
        batch = self._batch
        batch.n_tokens = len(chunk)
        position = len(self.tokens)
        for i, token in enumerate(chunk):
            batch.token[i] = token
            batch.pos[i] = position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i == len(chunk) - 1
        with self.model._lock:
            code = C.llama_decode(self.pointer, batch)
        if code != 0:
            self.truncate(0)
            raise NativeError(f"llama.cpp could not decode (code {code}){_why()}; try a shorter prompt.")
        self.tokens += chunk

    def close(self) -> None:
        """Free the context; may be called again."""
        with self.model._lock:
            if self.pointer:
                C.llama_batch_free(self._batch)
                C.llama_free(self.pointer)
                self.pointer = None
                self.model.contexts.discard(self)


def _bytes(array: npt.NDArray[np.uint8]) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


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


def _extension(names: tuple[str, ...], arguments: list[Any], result: Any) -> Any:
    for name in names:
        if (function := getattr(C._lib, name, None)) is not None:
            function.argtypes, function.restype = arguments, result
            return function
    raise NativeError("this llama.cpp has no layer tap; install llama-cpp-python==0.3.36.")


def _tap(context: Any, layer: int) -> None:
    """Keep a layer's input (src/llama-ext.h, llama_set_embeddings_layer_inp)."""
    names = ("llama_set_embeddings_layer_inp", "_Z30llama_set_embeddings_layer_inpP13llama_contextjb")
    arguments = [C.llama_context_p_ctypes, ctypes.c_uint32, ctypes.c_bool]
    _extension(names, arguments, None)(context, layer, True)


def _tapped(context: Any, layer: int) -> Any:
    """Rows of a tapped layer for all tokens of the last batch (llama_get_embeddings_layer_inp)."""
    names = ("llama_get_embeddings_layer_inp", "_Z30llama_get_embeddings_layer_inpP13llama_contextj")
    arguments = [C.llama_context_p_ctypes, ctypes.c_uint32]
    return _extension(names, arguments, ctypes.POINTER(ctypes.c_float))(context, layer)
