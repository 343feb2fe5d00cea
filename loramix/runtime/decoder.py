"""Tokens under a mix in, logits out: a base with its adapters, and the KV of what it has read.

Knows nothing of packs, gates or text; belongs to one thread at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loramix.errors import InvalidArtifact
from loramix.models.mixing import Mix
from loramix.runtime.adapters import AdapterCache
from loramix.runtime.kv_cache import ContextPool, PreparedContext
from loramix.runtime.llama.batch_context import BatchContext
from loramix.runtime.llama.context import Context
from loramix.runtime.llama.model import Model
from loramix.runtime.llama.prefill_chunks import chunks


class DecodeRequest(NamedTuple):
    """What to decode for an answer: the logits after these tokens under this mix."""

    mix: Mix
    tokens: list[int]
    n_prompt: int
    """How many of them are the prompt; the rest has been generated."""


class DecodeResult(NamedTuple):
    """What a `DecodeRequest` gives."""

    logits: npt.NDArray[np.float32]
    """(V,) float32."""
    cached: int
    """Tokens that were in the KV cache already."""


class Decoder:
    """Decodes what answers want, each under its mix.

    Args:
        model: the base; freed by `close`.
        adapters: of the skills that mixes name.
        n_ctx: tokens that prompt and answer may have together.
        n_threads: threads for llama.cpp.
        taps: layers whose input is kept for the gate.
        contexts: most mixes whose KV is kept at once, the bare base's included.
    """

    def __init__(
        self,
        model: Model,
        adapters: AdapterCache,
        *,
        n_ctx: int,
        n_threads: int,
        taps: Sequence[int],
        contexts: int,
    ) -> None:
        self.model, self.adapters, self._n_threads = model, adapters, n_threads
        self.pool = ContextPool(
            model, adapters.get, n_ctx=n_ctx, n_threads=n_threads, taps=taps, size=contexts
        )

    def acts_from(self, mix: Mix, prompt: Sequence[int]) -> int:
        """Where the adapters of a mix begin to act: behind the prompt where all of them are late ones, else 0."""
        invocation = self.adapters.invocation(mix)
        if not invocation:
            return 0
        if tuple(prompt[-len(invocation) :]) != invocation:
            raise InvalidArtifact(
                f"{mix} acts from tokens {list(invocation)} on, which prompts of this base do not end with; "
                "use the base that it was trained on."
            )
        return len(prompt) - len(invocation)

    def prepare(self, wanted: DecodeRequest) -> PreparedContext:
        """The context of a mix with what is known of the wanted tokens; see `ContextPool.prepare`.

        Raises:
            UnknownSkill: the mix names a skill that is not there, or no more.
        """
        acts_from = self.acts_from(wanted.mix, wanted.tokens[: wanted.n_prompt])
        return self.pool.prepare(wanted.mix, wanted.tokens, acts_from)

    def decode(self, wanted: DecodeRequest) -> DecodeResult:
        """Logits behind the wanted tokens.

        Raises:
            UnknownSkill: see `prepare`.
            NativeError: llama.cpp fails.
        """
        context, start, cached = self.prepare(wanted)
        return DecodeResult(context.decode(wanted.tokens[start:]), cached)

    def read(self, wanted: DecodeRequest) -> int:
        """Read a batch of a long prompt ahead, so that others get their tokens before the rest of it is read.

        Args:
            wanted: what will be decoded; the logits are the same, bit for bit.

        Returns:
            Tokens read; 0 where no more than a batch is left.
        """
        context, start, _ = self.prepare(wanted)
        first, *others = chunks(start, wanted.tokens[start:], context.n_batch)
        if not others:
            return 0
        context.decode(first)
        return len(first)

    def hold(self, wanted: DecodeRequest, kv: npt.NDArray[np.uint8]) -> None:
        """Take the KV of all but the last of the wanted tokens into the context of their mix."""
        acts_from = self.acts_from(wanted.mix, wanted.tokens[: wanted.n_prompt])
        self.pool.hold(wanted.mix, wanted.tokens[:-1], kv, whole=wanted.n_prompt, acts_from=acts_from)

    def holding(self, wanted: DecodeRequest) -> Context | None:
        """The context that holds all but the last of the wanted tokens under their mix, if one does."""
        return self.pool.holding(wanted.mix, wanted.tokens[:-1])

    def batch_context(self, n_seq: int, n_cells: int) -> BatchContext:
        """A context in which several answers decode together; it is closed with the model."""
        return BatchContext(self.model, n_seq=n_seq, n_cells=n_cells, n_threads=self._n_threads)

    def close(self) -> None:
        """Free everything native; may be called again."""
        self.model.close()
        self.adapters.close()
