"""A llama.cpp context of many sequences, which arrive with KV from other contexts and decode one token per call.

Sequences of several mixes share the context, but adapters apply to a whole call, so a call decodes sequences of
one mix.

Attention sums a sequence's values in the order of their cells, and llama.cpp puts the next token into the first
free cell. A cell freed between others would change that order, the last bits and sometimes the answer. Cells of
ended sequences therefore stay occupied until `_compact` rewrites all others contiguously. With many cells, a
single row is split over threads (ggml-cpu's ops.cpp, use_split_kv_path), which also changes the order: a short
sequence that decodes alone among many cells gets a padding row.
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
"""Maximum cells of ended sequences, which attention still visits; copying 20 MB of KV takes 10 ms."""
SPLIT_KV_CELLS = 256
"""Number of cells from which llama.cpp splits a single row."""


class BatchContext(NativeContext):
    """Sequences that decode together.

    Args:
        model: the base.
        n_seq: maximum sequences, up to 254.
        n_cells: maximum tokens of all sequences together.
        n_threads: threads for decoding.

    Raises:
        NativeError: out of memory, or llama.cpp fails.
    """

    def __init__(self, model: Model, *, n_seq: int, n_cells: int, n_threads: int) -> None:
        self.n_seq, self.n_cells = n_seq, n_cells
        self.mix: Mix | None = None
        self._lengths: dict[int, int] = {}
        self._mixes: dict[int, Mix] = {}
        self._n_dead, self._dead_sequence = 0, n_seq  # cells of ended sequences, and their sequence id
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
        """Number of tokens of all sequences."""
        return sum(self._lengths.values())

    @property
    def free(self) -> int:
        """Number of sequences that can still be added."""
        return self.n_seq - len(self._lengths)

    def add(self, context: Context, mix: Mix) -> int:
        """Add a sequence with the KV of a context.

        Args:
            context: a context of the same model and mix.
            mix: the mix of the KV.

        Returns:
            The sequence's id, to be released with `release`.

        Raises:
            NativeError: llama.cpp cannot load the KV.
        """
        sequence = next(i for i in range(self.n_seq) if i not in self._lengths)
        self._make_room(len(context.tokens))
        self._put(sequence, context.get_kv())
        self._lengths[sequence], self._mixes[sequence] = len(context.tokens), mix
        return sequence

    def copy(self, sequence: int) -> KV:
        """Return a copy of a sequence's KV."""
        return self._copy_kv(sequence, self._lengths[sequence])

    def release(self, sequence: int) -> None:
        """Remove a sequence."""
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
        """Rewrite all sequences contiguously and free all other cells."""
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
        """Change the mix that `decode` uses; the next call rebuilds the graph, which takes milliseconds.

        Args:
            mix: the mix; None removes all adapters so that they can be freed.
            adapters: adapters of the mix with their scales.
        """
        self._set_adapters(adapters)
        self.mix = mix

    def decode(self, tokens: Mapping[int, int]) -> dict[int, npt.NDArray[np.float32]]:
        """Append one token to each of the given sequences of the current mix.

        Args:
            tokens: token id by sequence; all tokens together must fit into ``n_cells``.

        Returns:
            Copies of the logits, (V,) float32, by sequence.

        Raises:
            NativeError: llama.cpp fails, or logits are not finite; the caller must release these sequences.
        """
        assert all(self._mixes[sequence] == self.mix for sequence in tokens)
        self._make_room(len(tokens) + 1)
        rows = [(token, self._lengths[sequence], sequence, True) for sequence, token in tokens.items()]
        cells = self._n_dead + self.used + 2
        padded = len(rows) == 1 and rows[0][1] < SPLIT_KV_CELLS <= cells <= self.n_cells
        if padded:
            rows.append((rows[0][0], 0, self._padding_sequence, False))
        self._fill_batch(rows)
        with self.model.lock:
            code = C.llama_decode(self.pointer, self._batch)
            if code != 0:
                raise NativeError(f"llama.cpp could not decode (code {code}){why()}; try a shorter prompt.")
            logits = {}
            for i, sequence in enumerate(tokens):
                row = C.llama_get_logits_ith(self.pointer, i)
                logits[sequence] = np.ctypeslib.as_array(row, shape=(self.model.n_vocab,)).copy()
                self._lengths[sequence] += 1
            if padded:  # its cell is the last one, so removing it changes no order
                C.llama_memory_seq_rm(self._memory, self._padding_sequence, -1, -1)
        if not all(np.isfinite(row).all() for row in logits.values()):
            raise NativeError(
                f"the model gave numbers that are not finite under {self.mix}; run 'loramix pack check'."
            )
        return logits
