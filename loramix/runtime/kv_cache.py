"""The KV cache: one context per mix, so that a cached prefix is never reused under another mix.

KV computed under one adapter and reused under another silently corrupts the answer (ggml-org/llama.cpp #26207).
A context is therefore emptied before it changes its mix. Evicted KV is copied out, keyed by mix, and restored
when a prompt with the same prefix arrives.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from loramix.defaults import CONTEXTS, KV_STORE_BYTES
from loramix.models.mixing import Mix
from loramix.runtime.llama.context import Context
from loramix.runtime.llama.model import Adapter, Model
from loramix.runtime.llama.native_context import trim_heap
from loramix.runtime.llama.prefill_chunks import resume_position
from loramix.runtime.llama.saved_context import SavedContext

MIN_SAVED_TOKENS = 32  # for fewer tokens, decoding again is faster than copying


class SavedContexts:
    """KV copied out of contexts, by mix; evicts the least recently used.

    Args:
        limit: maximum bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: OrderedDict[tuple[Mix, tuple[int, ...]], SavedContext] = OrderedDict()

    def put(self, mix: Mix, saved: SavedContext) -> None:
        """Store a saved context; replaces entries that are a prefix of it."""
        for key in [
            key
            for key in self._entries
            if key[0] == mix and common_prefix(key[1], saved.tokens) == len(key[1])
        ]:
            del self._entries[key]
        self._entries[mix, saved.tokens] = saved
        while self.nbytes > self.limit:
            self._entries.popitem(last=False)

    def longest_prefix(self, mix: Mix, tokens: Sequence[int]) -> tuple[int, SavedContext | None]:
        """Return the length of the longest prefix shared with ``tokens``, and the entry that shares it."""
        length, best = 0, None
        for key in self._entries:
            if key[0] == mix and (shared := common_prefix(key[1], tokens)) > length:
                length, best = shared, key
        if best is None:
            return 0, None
        self._entries.move_to_end(best)
        return length, self._entries[best]

    def drop(self, stale: Callable[[Mix], bool]) -> None:
        """Discard the entries of stale mixes."""
        for key in [key for key in self._entries if stale(key[0])]:
            del self._entries[key]

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(saved.nbytes for saved in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)


class PreparedContext(NamedTuple):
    """A context that is ready to decode a prompt."""

    context: Context
    start: int
    """Position at which decoding begins; the prompt's length if its logits are still cached."""
    cached: int
    """Number of prompt tokens found in the cache."""


class ContextPool:
    """At most ``size`` contexts; a new mix reuses the least recently used, never that of the bare base.

    Args:
        model: the base.
        adapters: returns the adapters of a mix with their scales.
        n_ctx: tokens per context.
        n_threads: threads for llama.cpp.
        taps: layers whose inputs are kept for the gate.
        size: maximum number of contexts, that of the bare base included; each holds its KV in memory.
        saved_bytes: maximum bytes of KV copied out of contexts.
    """

    def __init__(
        self,
        model: Model,
        adapters: Callable[[Mix], Sequence[tuple[Adapter, float]]],
        *,
        n_ctx: int,
        n_threads: int,
        taps: Sequence[int] = (),
        size: int = CONTEXTS,
        saved_bytes: int = KV_STORE_BYTES,
    ) -> None:
        self._model, self._adapters = model, adapters
        self._n_ctx, self._n_threads, self._taps = n_ctx, n_threads, taps
        self.size = max(2, size)
        self._contexts: OrderedDict[Mix, Context] = OrderedDict()
        self.saved = SavedContexts(saved_bytes)
        self._swapped = False

    def get(self, mix: Mix) -> Context:
        """Return the context of a mix; create it, or reuse the least recently used one, if necessary.

        Args:
            mix: a mix of skills that the pool's ``adapters`` knows.
        """
        if mix in self._contexts:
            self._contexts.move_to_end(mix)
            return self._contexts[mix]
        self._swapped = True
        others = [known for known in self._contexts if known]
        if mix and len(others) >= self.size - 1:  # the bare base's context is kept for the gate
            self._save(others[0], self._contexts[others[0]])
            context = self._contexts.pop(others[0])
            try:
                context.set_mix(())  # so that its adapter can be freed for the new one
                context.set_mix(self._adapters(mix))
            except BaseException:
                context.close()
                raise
        else:
            context = Context(
                self._model,
                self._adapters(mix),
                n_ctx=self._n_ctx,
                n_threads=self._n_threads,
                taps=self._taps,
                history=not mix,  # for other mixes the gate reads the last token only
            )
        self._contexts[mix] = context
        return context

    def prepare(self, mix: Mix, tokens: list[int], active_from: int = 0) -> PreparedContext:
        """Return the context of a mix with the longest cached prefix of ``tokens``.

        Args:
            mix: see `get`.
            tokens: ids of the whole prompt.
            active_from: position from which activated adapters act; earlier KV is that of the bare base.
        """
        context = self.get(mix)
        held = len(context.tokens)
        if (
            held and context.active_from == active_from and context.tokens == tokens[:-1]
        ):  # an answer's next token
            return PreparedContext(context, held, held)
        if active_from:
            return self._with_base_prefix(context, tokens[:active_from])
        live = common_prefix(context.tokens, tokens)
        length, saved = self.saved.longest_prefix(mix, tokens)
        found = saved if saved is not None and length >= live + MIN_SAVED_TOKENS else None
        self._save(mix, context, live)
        if found is not None:
            context.restore(found)
        shared = reuse(context, tokens)
        return PreparedContext(context, shared, shared)

    def load(
        self,
        mix: Mix,
        tokens: Sequence[int],
        kv: npt.NDArray[np.uint8],
        *,
        prompt_length: int,
        active_from: int,
    ) -> None:
        """Load tokens with KV from another context into the context of a mix; saves its previous KV.

        Args:
            mix: not empty, because KV does not include the gate's hidden states.
            tokens: see `Context.load`.
            kv: see `Context.load`.
            prompt_length: see `Context.load`.
            active_from: see `Context.load`.
        """
        context = self.get(mix)
        self._save(mix, context, common_prefix(context.tokens, tokens))
        context.load(tokens, kv, prompt_length=prompt_length, active_from=active_from)

    def _with_base_prefix(self, context: Context, prefix: list[int]) -> PreparedContext:
        """Return the context of an activated mix with the bare base's KV before its invocation tokens."""
        base = self.get(Mix.EMPTY)
        cached = common_prefix(base.tokens, prefix)
        if cached < len(prefix):
            base, start, cached = self.prepare(Mix.EMPTY, prefix)
            base.decode(prefix[start:])
        context.load_prefix(base, len(prefix))
        return PreparedContext(context, len(prefix), cached)

    def _save(self, mix: Mix, context: Context, staying: int = 0) -> None:
        """Save a context's KV if it holds enough tokens after the first ``staying``, which it keeps."""
        tokens = context.tokens
        if context.active_from:  # its prefix is cached under the bare base
            return
        if len(tokens) - staying >= MIN_SAVED_TOKENS and self.saved.longest_prefix(mix, tokens)[0] < len(
            tokens
        ):
            self.saved.put(mix, context.save())

    def trim_memory(self) -> None:
        """Return heap memory of previous graphs to the system; takes milliseconds, so not between tokens."""
        if self._swapped:
            self._swapped = False
            trim_heap()

    def find_exact(self, mix: Mix, tokens: Sequence[int]) -> Context | None:
        """Return the context of a mix if it holds exactly these tokens, else None."""
        context = self._contexts.get(mix)
        return context if context is not None and context.tokens == tokens else None

    @property
    def mixes(self) -> list[Mix]:
        """Mixes that have a context, least recently used first."""
        return list(self._contexts)

    def drop(self, skills: Collection[str], *, taps: Sequence[int]) -> None:
        """Free the contexts of mixes that use these skills, or all contexts if the taps change.

        Args:
            skills: names of skills; their adapters can be freed afterwards.
            taps: layers that the gate reads after this call.
        """
        other_taps = tuple(taps) != tuple(self._taps)
        self._taps = tuple(taps)

        def stale(mix: Mix) -> bool:
            return other_taps or not mix.scales.keys().isdisjoint(skills)

        for mix in [mix for mix in self._contexts if stale(mix)]:
            self._contexts.pop(mix).close()
        self.saved.drop(stale)


def common_prefix(held: Sequence[int], tokens: Sequence[int]) -> int:
    """Length of the common prefix."""
    limit = min(len(held), len(tokens))
    if list(held[:limit]) == list(tokens[:limit]):
        return limit
    return next((i for i in range(limit) if held[i] != tokens[i]), limit)


def reuse(context: Context, tokens: Sequence[int]) -> int:
    """Truncate a context to the prefix that it shares with a prompt.

    Args:
        context: truncated so that decoding the rest gives the same bits as decoding the whole prompt.
        tokens: ids of the whole prompt.

    Returns:
        Number of tokens that need no decoding; all of them only if the logits after the last are cached.
    """
    shared = common_prefix(context.tokens, tokens)
    # tokens after the prompt were generated one by one, not prefilled: a conversation simply continues
    continues = 0 < context.prompt_length <= shared < len(tokens)
    context.truncate(shared)
    if continues or (
        shared == len(tokens) and context.prompt_end is not None and context.prompt_end.length == shared
    ):
        return shared
    shared = resume_position(
        min(shared, len(tokens) - 1), context.prompt_length, len(tokens), context.n_batch
    )
    context.truncate(shared)
    context.prompt_length = len(tokens)
    return shared
