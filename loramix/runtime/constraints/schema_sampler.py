"""Answers that follow a JSON schema: llguidance says which tokens may come next, our own sampling chooses.

llguidance works on the bytes of tokens. Tokens that end an answer are known to it as such and never as text.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from loramix.errors import UsageError
from loramix.runtime.llama.model import Model
from loramix.runtime.sampling import Sampler


class _Vocabulary:
    """A base's tokens as llguidance's `TokenizerWrapper` wants them.

    Args:
        model: whose vocabulary.
    """

    bos_token_id = None

    def __init__(self, model: Model) -> None:
        self.ends = [token for token in range(model.n_vocab) if token == model.eot or model.is_end(token)]
        ends = set(self.ends)
        self.eos_token_id = self.ends[0]
        # control tokens have no bytes, and what has none is never allowed
        self.tokens = [b"" if token in ends else model.piece(token) for token in range(model.n_vocab)]
        self.special_token_ids = [token for token, piece in enumerate(self.tokens) if not piece]

    def __call__(self, text: bytes) -> list[int]:
        """Needed for forced text alone, which our grammars have not."""
        return []


def vocabulary(model: Model) -> LLTokenizer:
    """A base's tokens for `SchemaSampler`; takes a third of a second for 49,152, so it is kept."""
    tokens = _Vocabulary(model)
    return LLTokenizer(TokenizerWrapper(tokens), eos_token=tokens.ends)


class SchemaSampler:
    """A sampler that draws only what a schema allows.

    Args:
        tokens: what `vocabulary` gave for the base.
        grammar: of `loramix.runtime.constraints.schema.schema_to_grammar`.
        sampler: chooses among what is allowed.

    Raises:
        UsageError: no answer can follow it.
    """

    def __init__(self, tokens: LLTokenizer, grammar: str, sampler: Sampler) -> None:
        self._matcher, self._sampler = LLMatcher(tokens, grammar, log_level=0), sampler
        self._allowed()

    def pick(self, logits: npt.NDArray[np.float32], recent: list[int]) -> int:
        """Draw one token; see `Sampler.pick`.

        Raises:
            UsageError: nothing can follow, or finding out takes llguidance too long.
        """
        allowed = np.unpackbits(self._allowed(), count=len(logits), bitorder="little").view(bool)
        token = self._sampler.pick(np.where(allowed, logits, np.float32(-np.inf)), recent)
        self._matcher.consume_token(token)
        return token

    def _allowed(self) -> npt.NDArray[np.uint8]:
        """A bit for each token that may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error() or not bits.any():
            reason = self._matcher.get_error().partition("\n")[0] or "no token can follow"
            raise UsageError(f"no answer follows the JSON schema ({reason}); make the schema simpler.")
        return bits
