"""A llama.cpp context of one sequence under one mix: its KV, and the hidden states that the gate reads.

Independent of skills, gates and chat. A batch longer than ``n_batch`` aborts the process, so prompts are decoded
in chunks. The KV of one mix must never be used under another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.defaults import N_BATCH, N_CTX
from loramix.errors import Interrupted, InvalidPrompt, NativeError
from loramix.runtime.llama.hidden_states import NodeTaps, tap, tapped
from loramix.runtime.llama.model import Adapter, C, Model, why
from loramix.runtime.llama.native_context import NativeContext
from loramix.runtime.llama.prefill_chunks import chunks
from loramix.runtime.llama.saved_context import PromptEnd, SavedContext


class Context(NativeContext):
    """One sequence under one mix: its tokens and their KV.

    Args:
        model: the base.
        mix: adapters with their scales; only `set_mix` changes it, and discards the KV.
        n_ctx: maximum tokens; memory is allocated for `INITIAL_CTX` tokens and grows on demand.
        n_threads: threads for decoding and prefill.
        taps: layers (0 to n_layer - 1) whose inputs are kept for the gate at each decode.
        history: keep the inputs of all tokens; False keeps those of the last token only.
        exact: float32 KV without flash attention, for comparisons with PyTorch.
        observe: llama.cpp's callback for each node of the graph.
        all_tokens: compute the last layer, and logits, for all tokens instead of the last one only.

    Raises:
        NativeError: no memory, or llama.cpp refuses.
    """

    N_BATCH = N_BATCH  # a class attribute, so that tests can change the batch size
    INITIAL_CTX = 512  # enough for most conversations; 2,048 tokens of the default base take 47 MB of KV

    def __init__(
        self,
        model: Model,
        mix: Sequence[tuple[Adapter, float]] = (),
        *,
        n_ctx: int = N_CTX,
        n_threads: int = 2,
        taps: Sequence[int] = (),
        history: bool = True,
        exact: bool = False,
        observe: Any = None,
        all_tokens: bool = False,
    ) -> None:
        for layer in taps:
            if not 0 <= layer < model.n_layer:  # n_layer itself aborts the process
                raise NativeError(f"layer {layer} cannot be tapped; the base has 0 to {model.n_layer - 1}.")
        self.taps, self.n_ctx = tuple(taps), n_ctx
        self.tokens: list[int] = []
        self.prompt_length = 0  # tokens that were prefilled as one prompt, see `resume_position`
        self.prompt_end: PromptEnd | None = None  # end of the last prefilled prompt, while its KV is held
        self.active_from = 0  # KV before this position is the bare base's, see `load_prefix`
        # per tapped layer; row i belongs to tokens[i], so prefix reuse keeps them in step
        self.history, rows = history, n_ctx if history else 1
        self._states = {layer: np.zeros((rows, model.n_embd), np.float32) for layer in self.taps}
        parameters = C.llama_context_default_params()
        self.capacity = parameters.n_ctx = min(self.INITIAL_CTX, n_ctx)
        self.n_batch = parameters.n_batch = parameters.n_ubatch = min(self.N_BATCH, n_ctx)
        parameters.n_outputs_max = 1  # logits of one token: a small buffer instead of n_batch x vocabulary
        parameters.n_threads = parameters.n_threads_batch = n_threads
        parameters.no_perf = True
        kept = model.architecture.taps_layer_inputs
        self._node_taps = NodeTaps(taps, model.n_embd) if taps and not kept else None
        if self._node_taps is not None:
            assert observe is None, "one callback per context"
            observe = self._node_taps.callback
        self._observe = observe  # a reference, because llama.cpp only keeps the address
        if observe is not None:
            parameters.cb_eval = observe
        self._all_tokens = all_tokens
        if all_tokens:
            parameters.n_outputs_max = parameters.n_batch
        if exact:
            parameters.type_k = parameters.type_v = 0  # GGML_TYPE_F32
            parameters.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
        model.interrupt.attach(parameters)
        self._parameters = parameters
        super().__init__(model, parameters)
        self._set_adapters(mix)

    def _make(self, parameters: Any) -> None:
        super()._make(parameters)
        with self.model.lock:
            for layer in self.taps if self._node_taps is None else ():
                tap(self.pointer, layer)

    def _reserve(self, n_tokens: int) -> None:
        """Grow the context, at least doubling it, if it is too small; tokens and KV are kept bit for bit."""
        if n_tokens <= self.capacity:
            return
        kv, prompt_end = self.get_kv() if self.tokens else None, self.prompt_end
        self._parameters.n_ctx = capacity = min(self.n_ctx, max(n_tokens, 2 * self.capacity))
        self._make(self._parameters)
        self.capacity = capacity
        self._set_adapters(self._mix)
        if kv is not None:
            self._set_kv(kv, self.tokens)
            self.prompt_end = prompt_end

    def set_mix(self, mix: Sequence[tuple[Adapter, float]]) -> None:
        """Change the mix; discards all tokens first, so that KV is never used under another mix.

        Args:
            mix: adapters with their scales.
        """
        self.truncate(0)
        self.active_from = 0
        self._set_adapters(mix)

    def truncate(self, length: int) -> None:
        """Discard all tokens from position ``length`` on."""
        if length < len(self.tokens):
            if not C.llama_memory_seq_rm(self._memory, 0, length, -1):
                C.llama_memory_clear(self._memory, True)
                length = 0
            del self.tokens[length:]
            if self.prompt_end and self.prompt_end.length > length:
                self.prompt_end = None

    def save(self) -> SavedContext:
        """Copy the tokens, their KV and the tapped states.

        Raises:
            NativeError: llama.cpp refuses.
        """
        states = {layer: self.states(layer).copy() for layer in self.taps if self.history}
        return SavedContext(tuple(self.tokens), self.get_kv(), states, self.prompt_length, self.prompt_end)

    def restore(self, saved: SavedContext) -> None:
        """Replace the contents with a saved copy.

        Args:
            saved: result of `save` for the same model, mix and taps.

        Raises:
            NativeError: llama.cpp refuses; the context is empty then.
        """
        self._set_kv(saved.kv, saved.tokens)
        self.prompt_length, self.prompt_end = saved.prompt_length, saved.prompt_end
        for layer, rows in saved.states.items():
            self._states[layer][: len(rows)] = rows

    def load_prefix(self, other: Context, length: int) -> None:
        """Load the first tokens of another context with their KV; for activated adapters, which act later.

        Args:
            other: a context of the same model, usually the bare base's; hidden states are not copied.
            length: number of tokens, at most as many as the other context holds.

        Raises:
            NativeError: llama.cpp refuses; the context is empty then.
        """
        self.load(other.tokens, other.get_kv(), prompt_length=other.prompt_length, active_from=length)
        self.truncate(length)

    def load(
        self, tokens: Sequence[int], kv: npt.NDArray[np.uint8], *, prompt_length: int, active_from: int = 0
    ) -> None:
        """Hold tokens whose KV was made elsewhere; the gate's states are not among it.

        Args:
            tokens: ids.
            kv: as `get_kv` and `BatchContext.copy` give it, of this model and mix.
            prompt_length: number of prompt tokens among them.
            active_from: see `load_prefix`.

        Raises:
            NativeError: llama.cpp refuses; the context is empty then.
        """
        self._set_kv(kv, tokens)
        self.prompt_length, self.active_from = prompt_length, active_from

    def get_kv(self) -> npt.NDArray[np.uint8]:
        """Return a copy of the KV of all tokens in llama.cpp's format."""
        return self._copy_kv(0, len(self.tokens))

    def _set_kv(self, kv: npt.NDArray[np.uint8], tokens: Sequence[int]) -> None:
        tokens = list(tokens)
        self.truncate(0)
        self._reserve(len(tokens))
        if not self._put_kv(0, kv):
            C.llama_memory_clear(self._memory, True)
            raise NativeError(f"llama.cpp could not restore the KV of {len(tokens)} tokens{why()}.")
        self.tokens = tokens

    def states(self, layer: int) -> npt.NDArray[np.float32]:
        """Inputs of a tapped layer, (T, D) float32, for all tokens held or for the last one decoded alone.

        A view, valid until the next call.
        """
        return self._states[layer][: len(self.tokens)]

    def decode(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append tokens and run the model on them.

        Args:
            tokens: ids that fit into the context; may be empty if `prompt_end` is at the last token.

        Returns:
            Logits after the last token, (V,) float32, a copy.

        Raises:
            InvalidPrompt: more tokens than the context holds.
            NativeError: llama.cpp fails, or the logits are not finite (the KV is cleared then).
            Interrupted: by the model's `Interrupt`; earlier tokens and completed chunks are kept.
        """
        if not tokens:
            assert self.prompt_end and self.prompt_end.length == len(self.tokens)
            for layer, row in self.prompt_end.states.items():
                self.states(layer)[-1] = row
            return self.prompt_end.logits.copy()
        if len(self.tokens) + len(tokens) > self.n_ctx:
            raise InvalidPrompt(
                f"prompt and answer need {len(self.tokens) + len(tokens)} tokens; "
                f"the context holds {self.n_ctx}: shorten the prompt, or give a larger --ctx."
            )
        self._reserve(len(self.tokens) + len(tokens))
        for chunk in chunks(len(self.tokens), tokens, self.n_batch):
            self._decode_chunk(chunk)
            for layer, states in self._states.items():
                view = self._tapped(layer, len(chunk))
                if self.history:
                    states[len(self.tokens) - len(chunk) : len(self.tokens)] = view
                else:
                    states[0] = view[-1]
        row = C.llama_get_logits_ith(self.pointer, -1)
        logits = np.ctypeslib.as_array(row, shape=(self.model.n_vocab,)).copy()
        if not np.isfinite(logits).all():
            self.truncate(0)
            names = ", ".join(adapter.name for adapter in self.adapters) or "the bare base"
            raise NativeError(
                f"the model gave numbers that are not finite under {names}; run 'loramix pack check'."
            )
        if len(tokens) > 1:
            last = {layer: self.states(layer)[-1].copy() for layer in self.taps}
            self.prompt_end = PromptEnd(len(self.tokens), logits.copy(), last)
        return logits

    def _tapped(self, layer: int, n_tokens: int) -> npt.NDArray[np.float32]:
        """Inputs of a tapped layer for the last batch, (n_tokens, D) float32; a view until the next one."""
        if self._node_taps is not None:
            return self._node_taps.rows(layer)
        rows: npt.NDArray[np.float32] = np.ctypeslib.as_array(
            tapped(self.pointer, layer), shape=(n_tokens, self.model.n_embd)
        )
        return rows

    def _decode_chunk(self, chunk: Sequence[int]) -> None:
        first, last = len(self.tokens), len(self.tokens) + len(chunk) - 1
        places = enumerate(chunk, first)
        self._fill_batch([(token, place, 0, self._all_tokens or place == last) for place, token in places])
        with self.model.lock:
            code = C.llama_decode(self.pointer, self._batch)
        if code == 2:  # llama.cpp has already removed the chunk's tokens
            raise Interrupted("the answer was cancelled.")
        if code != 0:
            self.truncate(0)
            raise NativeError(f"llama.cpp could not decode (code {code}){why()}; try a shorter prompt.")
        self.tokens += chunk
