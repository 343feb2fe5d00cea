"""Constrained decoding with JSON schemas: llguidance computes the allowed tokens, Loramix samples.

llguidance works on the bytes of tokens; tokens that end an answer are declared as end tokens and have no bytes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from loramix.errors import UsageError
from loramix.runtime.llama.model import Model
from loramix.runtime.sampling import Picker


class _Vocabulary:
    """A base's tokens in the form that llguidance's `TokenizerWrapper` requires.

    Args:
        model: model with the vocabulary.
    """

    bos_token_id = None

    def __init__(self, model: Model) -> None:
        self.ends = [token for token in range(model.n_vocab) if token == model.eot or model.is_end(token)]
        ends = set(self.ends)
        self.eos_token_id = self.ends[0]
        # control tokens have no bytes, and tokens without bytes are never allowed
        self.tokens = [b"" if token in ends else model.piece(token) for token in range(model.n_vocab)]
        self.special_token_ids = [token for token, piece in enumerate(self.tokens) if not piece]

    def __call__(self, text: bytes) -> list[int]:
        """Only called for forced text, which these grammars do not have."""
        return []


def vocabulary(model: Model) -> LLTokenizer:
    """Build a base's tokenizer for `SchemaSampler`; takes 0.3 s for 49,152 tokens, so callers cache it."""
    tokens = _Vocabulary(model)
    return LLTokenizer(TokenizerWrapper(tokens), eos_token=tokens.ends)


class SchemaSampler:
    """A sampler that chooses only tokens that a schema allows.

    Args:
        tokens: result of `vocabulary` for the base.
        grammar: result of `loramix.runtime.constraints.schema.schema_to_grammar`.
        sampler: chooses among the allowed tokens.

    Raises:
        UsageError: no answer satisfies the schema.
    """

    def __init__(self, tokens: LLTokenizer, grammar: str, sampler: Picker) -> None:
        self._matcher, self._sampler = LLMatcher(tokens, grammar, log_level=0), sampler
        self._allowed()

    def pick(self, logits: npt.NDArray[np.float32], recent: list[int], n_prompt: int = 0) -> int:
        """Sample one token; see `Sampler.pick`.

        Raises:
            UsageError: no token is allowed, or llguidance exceeds its limits.
        """
        allowed = np.unpackbits(self._allowed(), count=len(logits), bitorder="little").view(bool)
        token = self._sampler.pick(np.where(allowed, logits, np.float32(-np.inf)), recent, n_prompt)
        self._matcher.consume_token(token)
        return token

    def _allowed(self) -> npt.NDArray[np.uint8]:
        """Return a bit mask of the allowed tokens."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error() or not bits.any():
            reason = self._matcher.get_error().partition("\n")[0] or "no token can follow"
            raise UsageError(f"no answer follows the JSON schema ({reason}); make the schema simpler.")
        return bits
