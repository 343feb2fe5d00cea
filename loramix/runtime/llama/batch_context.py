"""A llama.cpp context of many sequences: each comes with its KV from another context and goes on token by token.

Sequences of several mixes live in it together, since KV belongs to its sequence; the adapters belong to the
whole context, so one call decodes sequences of one mix. Knows tokens and logits; knows nothing of prompts.

Attention adds up a sequence's values in the order of their cells. llama.cpp puts the next token into the first
free cell, so a cell freed between others would change that order, and with it the last bits and now and then an
answer. Hence cells of ended sequences stay taken until all living ones are written anew, side by side. And a
row alone is split over threads where there are many cells (ggml-cpu's ops.cpp, use_split_kv_path), which adds
up in another order again: a short sequence that decodes alone among many cells gets a second row beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from loramix.errors import NativeError
from loramix.models.mixing import Mix
from loramix.runtime.llama.context import Context
from loramix.runtime.llama.model import Adapter, C, Model, why
from loramix.runtime.llama.native_context import KV, NativeContext

MAX_DEAD_CELLS = 512
"""Most cells of ended sequences: attention looks at each, and 20 MB of KV are copied in 10 ms."""
SPLIT_KV_CELLS = 256
"""Cells from which on llama.cpp splits a row that is alone."""


class BatchContext(NativeContext):
    """Sequences that decode together.

    Args:
        model: the base.
        n_seq: most sequences, at most 254.
        n_cells: most tokens of all sequences together.
        n_threads: threads for decoding.

    Raises:
        NativeError: no memory, or llama.cpp refuses.
    """

    def __init__(self, model: Model, *, n_seq: int, n_cells: int, n_threads: int) -> None:
        self.n_seq, self.n_cells = n_seq, n_cells
        self.mix: Mix | None = None
        self._lengths: dict[int, int] = {}
        self._mixes: dict[int, Mix] = {}
        self._n_dead, self._dead_sequence = 0, n_seq  # cells of ended sequences, and the id that they get
        self._padding_sequence = n_seq + 1
        parameters = C.llama_context_default_params()
        parameters.n_ctx = n_cells
        parameters.n_batch = parameters.n_ubatch = max(n_seq, 32)
        parameters.n_seq_max = parameters.n_outputs_max = n_seq + 2  # llama.cpp aborts on fewer outputs
        parameters.kv_unified = True  # else each sequence has an n_seq-th of the cells
        parameters.n_threads = parameters.n_threads_batch = n_threads
        parameters.no_perf = True
        super().__init__(model, parameters)

    @property
    def used(self) -> int:
        """Tokens of all sequences."""
        return sum(self._lengths.values())

    @property
    def free(self) -> int:
        """How many more sequences may come."""
        return self.n_seq - len(self._lengths)

    def add(self, context: Context, mix: Mix) -> int:
        """Take over what a context holds.

        Args:
            context: of the same model, under that mix.
            mix: what the KV belongs to.

        Returns:
            The sequence's id; call `release` when it has ended.

        Raises:
            NativeError: llama.cpp refuses.
        """
        sequence = next(i for i in range(self.n_seq) if i not in self._lengths)
        self._make_room(len(context.tokens))
        self._put(sequence, context.get_kv())
        self._lengths[sequence], self._mixes[sequence] = len(context.tokens), mix
        return sequence

    def copy(self, sequence: int) -> KV:
        """A sequence's KV, for a context to hold."""
        return self._copy_kv(sequence, self._lengths[sequence])

    def release(self, sequence: int) -> None:
        """Forget a sequence."""
        self._n_dead += self._lengths.pop(sequence)
        del self._mixes[sequence]
        with self.model.lock:
            C.llama_memory_seq_cp(self._memory, sequence, self._dead_sequence, -1, -1)
            C.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        if not self._lengths:
            self._compact()

    def _make_room(self, wanted: int) -> None:
        if self._n_dead > MAX_DEAD_CELLS or self._n_dead + self.used + wanted > self.n_cells:
            self._compact()

    def _compact(self) -> None:
        """Put the living sequences side by side, and free all other cells."""
        kept = {sequence: self._copy_kv(sequence, n) for sequence, n in self._lengths.items()}
        with self.model.lock:
            C.llama_memory_clear(self._memory, False)
        self._n_dead = 0
        for sequence, kv in kept.items():
            self._put(sequence, kv)

    def _put(self, sequence: int, kv: KV) -> None:
        if not self._put_kv(sequence, kv):
            with self.model.lock:
                C.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            raise NativeError(f"llama.cpp could not take over {kv.nbytes} bytes of KV{why()}.")

    def set_mix(self, mix: Mix | None, adapters: Sequence[tuple[Adapter, float]] = ()) -> None:
        """Decode sequences of another mix from now on; the next call builds its graph anew, some milliseconds.

        Args:
            mix: which; None for none at all, so that the adapters can be freed.
            adapters: what acts as it does, with scales.
        """
        self._set_adapters(adapters)
        self.mix = mix

    def decode(self, tokens: Mapping[int, int]) -> dict[int, npt.NDArray[np.float32]]:
        """Append one token to each of some sequences of the present mix.

        Args:
            tokens: token id by sequence; the sequences' tokens and these must fit into ``n_cells``.

        Returns:
            Logits (V,) float32 by sequence, copies.

        Raises:
            NativeError: llama.cpp fails, or logits are not finite; release these sequences.
        """
        assert all(self._mixes[sequence] == self.mix for sequence in tokens)
        self._make_room(len(tokens) + 1)
        rows = [(sequence, token, self._lengths[sequence]) for sequence, token in tokens.items()]
        cells = self._n_dead + self.used + 2
        padded = len(rows) == 1 and rows[0][2] < SPLIT_KV_CELLS <= cells <= self.n_cells
        if padded:
            rows.append((self._padding_sequence, rows[0][1], 0))
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (sequence, token, position) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = i < len(tokens)
        with self.model.lock:
            code = C.llama_decode(self.pointer, batch)
            if code != 0:
                raise NativeError(f"llama.cpp could not decode (code {code}){why()}; try a shorter prompt.")
            logits = {}
            for i, sequence in enumerate(tokens):
                row = C.llama_get_logits_ith(self.pointer, i)
                logits[sequence] = np.ctypeslib.as_array(row, shape=(self.model.n_vocab,)).copy()
                self._lengths[sequence] += 1
            if padded:  # its cell is the last one, so that no order changes
                C.llama_memory_seq_rm(self._memory, self._padding_sequence, -1, -1)
        if not all(np.isfinite(row).all() for row in logits.values()):
            raise NativeError(
                f"the model gave numbers that are not finite under {self.mix}; run 'loramix pack check'."
            )
        return logits
