"""Constrained decoding with llama.cpp's GBNF grammars and Loramix's own sampling.

Only allowed tokens are passed to the grammar, because it aborts the process on others.
"""

from __future__ import annotations

import ctypes
import weakref

import numpy as np
import numpy.typing as npt

from loramix.errors import UsageError
from loramix.runtime.llama.model import C, Model
from loramix.runtime.sampling import Picker

_TOKEN = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class GrammarSampler:
    """A sampler that chooses only tokens that a grammar allows.

    Args:
        model: model with the vocabulary.
        grammar: GBNF whose first rule is ``root``.
        sampler: chooses among the allowed tokens.

    Raises:
        UsageError: llama.cpp cannot parse the grammar.
    """

    def __init__(self, model: Model, grammar: str, sampler: Picker) -> None:
        pointer = C.llama_sampler_init_grammar(model.vocab, grammar.encode(), b"root")
        if not pointer:
            raise UsageError("the grammar is no GBNF that llama.cpp can read; its first rule must be 'root'.")
        self._grammar, self._sampler = pointer, sampler
        self._end, self._other_ends = model.eot, sorted(model.unknown_ends)
        weakref.finalize(self, C.llama_sampler_free, pointer)

    def pick(self, logits: npt.NDArray[np.float32], recent: list[int], n_prompt: int = 0) -> int:
        """Sample one token; see `Sampler.pick`."""
        token = self._sampler.pick(logits, recent, n_prompt)
        # checking one token is fast, checking all of them takes milliseconds
        if not np.isfinite(self._allowed(np.array([token]), logits[[token]])[0]):
            allowed = self._allowed(np.arange(len(logits)), logits)
            if not np.isfinite(allowed).any():  # no token is allowed: end the answer instead of aborting
                return self._end
            token = self._sampler.pick(allowed, recent, n_prompt)
        C.llama_sampler_accept(self._grammar, token)
        return token

    def _allowed(
        self, tokens: npt.NDArray[np.int64], logits: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Return the logits with -inf for tokens that the grammar forbids."""
        table = np.zeros(len(tokens), _TOKEN)
        table["id"], table["logit"] = tokens, logits
        data = table.ctypes.data_as(C.llama_token_data_p)
        candidates = C.llama_token_data_array(data=data, size=len(tokens), selected=-1, sorted=False)
        C.llama_sampler_apply(self._grammar, ctypes.byref(candidates))
        table["logit"][
            np.isin(tokens, self._other_ends)
        ] = -np.inf  # text to llama.cpp, but they end the answer
        return table["logit"].copy()
