"""Decodes tokens under a mix to logits: owns the base, its adapters and the KV cache.

Independent of packs, gates and text. Must be used by one thread at a time.
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
    """A request for the logits after these tokens under this mix."""

    mix: Mix
    tokens: list[int]
    n_prompt: int
    """Number of prompt tokens among them; the rest was generated."""


class DecodeResult(NamedTuple):
    """The result of a `DecodeRequest`."""

    logits: npt.NDArray[np.float32]
    """(V,) float32."""
    cached: int
    """Number of tokens found in the KV cache."""


class Decoder:
    """Decodes requests of answers, each under its mix.

    Args:
        model: the base; freed by `close`.
        adapters: the adapters of all skills that mixes may name.
        n_ctx: maximum tokens of prompt and answer together.
        n_threads: threads for llama.cpp.
        taps: layers whose inputs are kept for the gate.
        contexts: maximum number of mixes whose KV is kept at once, the bare base included.
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
        self.model, self.adapters, self.n_ctx, self._n_threads = model, adapters, n_ctx, n_threads
        self.pool = ContextPool(
            model, adapters.get, n_ctx=n_ctx, n_threads=n_threads, taps=taps, size=contexts
        )

    def active_from(self, mix: Mix, prompt: Sequence[int]) -> int:
        """Position from which a mix is active: the invocation tokens if all its adapters have them, else 0.

        Raises:
            InvalidArtifact: the prompt does not end with the invocation tokens.
            UnknownSkill: the mix names a skill that is not loaded.
        """
        invocation = self.adapters.invocation(mix)
        if not invocation:
            return 0
        if tuple(prompt[-len(invocation) :]) != invocation:
            raise InvalidArtifact(
                f"{mix} acts from tokens {list(invocation)} on, which prompts of this base do not end with; "
                "use the base that it was trained on."
            )
        return len(prompt) - len(invocation)

    def prepare(self, request: DecodeRequest) -> PreparedContext:
        """Return the mix's context with the cached prefix of the requested tokens; see `ContextPool.prepare`.

        Raises:
            UnknownSkill: the mix names a skill that is not loaded.
        """
        active_from = self.active_from(request.mix, request.tokens[: request.n_prompt])
        return self.pool.prepare(request.mix, request.tokens, active_from)

    def decode(self, request: DecodeRequest) -> DecodeResult:
        """Return the logits after the requested tokens.

        Raises:
            UnknownSkill: see `prepare`.
            NativeError: llama.cpp fails.
        """
        context, start, cached = self.prepare(request)
        return DecodeResult(context.decode(request.tokens[start:]), cached)

    def read(self, request: DecodeRequest) -> int:
        """Prefill one batch of a long prompt, so that other answers can decode before the next batch.

        Args:
            request: the request to prefill for; `decode` then gives bit-identical logits.

        Returns:
            Number of tokens prefilled; 0 if at most one batch is left.
        """
        context, start, _ = self.prepare(request)
        first, *others = chunks(start, request.tokens[start:], context.n_batch)
        if not others:
            return 0
        context.decode(first)
        return len(first)

    def load(self, request: DecodeRequest, kv: npt.NDArray[np.uint8]) -> None:
        """Load KV of all but the last requested token into the mix's context."""
        active_from = self.active_from(request.mix, request.tokens[: request.n_prompt])
        self.pool.load(
            request.mix, request.tokens[:-1], kv, prompt_length=request.n_prompt, active_from=active_from
        )

    def find_exact(self, request: DecodeRequest) -> Context | None:
        """Return the mix's context if it holds exactly all but the last requested token, else None."""
        return self.pool.find_exact(request.mix, request.tokens[:-1])

    def batch_context(self, n_seq: int, n_cells: int) -> BatchContext:
        """Create a context in which several answers decode together; it is closed with the model."""
        return BatchContext(self.model, n_seq=n_seq, n_cells=n_cells, n_threads=self._n_threads)

    def close(self) -> None:
        """Free all native resources; may be called more than once."""
        self.model.close()
        self.adapters.close()
