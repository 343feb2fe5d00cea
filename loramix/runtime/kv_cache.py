"""KV by mix: each context holds the KV of one mix alone, so a cached prefix can never serve another mix.

A live bug of a peer (ggml-org/llama.cpp #26207) is the reason: KV made under one adapter, reused under
another, silently spoils the answer. Here the mix is the context's identity, and another needs it empty; what
a context has to give up is copied out, keyed by mix, and comes back when its prefix is asked for again.
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
from loramix.runtime.llama.native_context import give_back
from loramix.runtime.llama.prefill_chunks import resume_position
from loramix.runtime.llama.saved_context import Saved

WORTH_SAVING = 32  # tokens; fewer are decoded again sooner than they are copied out and back


class SavedStore:
    """KV that was copied out, by mix; the least recently used goes first.

    Args:
        limit: most bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._known: OrderedDict[tuple[Mix, tuple[int, ...]], Saved] = OrderedDict()

    def put(self, mix: Mix, saved: Saved) -> None:
        """Keep one, instead of what it begins with."""
        for key in [
            key for key in self._known if key[0] == mix and common_prefix(key[1], saved.tokens) == len(key[1])
        ]:
            del self._known[key]
        self._known[mix, saved.tokens] = saved
        while self.nbytes > self.limit:
            self._known.popitem(last=False)

    def best(self, mix: Mix, tokens: Sequence[int]) -> tuple[int, Saved | None]:
        """The one that shares the longest prefix with ``tokens``, and how long that is."""
        length, best = 0, None
        for key in self._known:
            if key[0] == mix and (same := common_prefix(key[1], tokens)) > length:
                length, best = same, key
        if best is None:
            return 0, None
        self._known.move_to_end(best)
        return length, self._known[best]

    def drop(self, stale: Callable[[Mix], bool]) -> None:
        """Forget what is of a stale mix."""
        for key in [key for key in self._known if stale(key[0])]:
            del self._known[key]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(saved.nbytes for saved in self._known.values())

    def __len__(self) -> int:
        return len(self._known)


class PreparedContext(NamedTuple):
    """A context for a prompt."""

    context: Context
    start: int
    """Where decoding begins; at the end for a prompt whose logits the context still knows."""
    cached: int
    """Tokens of the prompt that were not decoded for it."""


class ContextPool:
    """At most ``size`` contexts, the least recently used given to the next mix; the bare base's always stays.

    Args:
        model: the base.
        adapters: gives what acts as a mix does.
        n_ctx: tokens per context.
        n_threads: threads per decode.
        taps: layers that contexts keep for the gate.
        size: most contexts, the base's included; each costs its KV in memory.
        saved_bytes: most bytes of KV that is copied out.
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
        self.saved = SavedStore(saved_bytes)
        self._swapped = False

    def get(self, mix: Mix) -> Context:
        """The context of a mix, made if needed.

        Args:
            mix: its skills must be known to the pool's ``adapters``.
        """
        if mix in self._contexts:
            self._contexts.move_to_end(mix)
            return self._contexts[mix]
        self._swapped = True
        others = [known for known in self._contexts if known]
        if mix and len(others) >= self.size - 1:  # never the bare base's: the gate reads it
            self._keep(others[0], self._contexts[others[0]])
            context = self._contexts.pop(others[0])
            try:
                context.become(())  # its adapter may be freed for the new one
                context.become(self._adapters(mix))
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
                history=not mix,  # of other mixes token-wise routing reads the last token alone
            )
        self._contexts[mix] = context
        return context

    def prepare(self, mix: Mix, tokens: list[int], acts_from: int = 0) -> PreparedContext:
        """The context of a mix, holding the longest prefix of ``tokens`` that was ever decoded and is still known.

        Args:
            mix: see `get`.
            tokens: the whole prompt.
            acts_from: for late adapters, the place where they begin; what is before is the bare base's.
        """
        context = self.get(mix)
        held = len(context.tokens)
        if (
            held and context.acts_from == acts_from and context.tokens == tokens[:-1]
        ):  # an answer's next token
            return PreparedContext(context, held, held)
        if acts_from:
            return self._adopted(context, tokens[:acts_from])
        live = common_prefix(context.tokens, tokens)
        length, saved = self.saved.best(mix, tokens)
        found = saved if saved is not None and length >= live + WORTH_SAVING else None
        self._keep(mix, context, live)
        if found is not None:
            context.restore(found)
        same = reuse(context, tokens)
        return PreparedContext(context, same, same)

    def hold(
        self, mix: Mix, tokens: Sequence[int], kv: npt.NDArray[np.uint8], *, whole: int, acts_from: int
    ) -> None:
        """Let the context of a mix hold tokens whose KV was made elsewhere; what it held is copied out.

        Args:
            mix: some skills'; the bare base's context must know the gate's states too.
            tokens: see `Context.hold`.
            kv: see `Context.hold`.
            whole: see `Context.hold`.
            acts_from: see `Context.hold`.
        """
        context = self.get(mix)
        self._keep(mix, context, common_prefix(context.tokens, tokens))
        context.hold(tokens, kv, whole=whole, acts_from=acts_from)

    def _adopted(self, context: Context, prefix: list[int]) -> PreparedContext:
        """A late mix's context with the bare base's KV of what is before its adapters act."""
        base = self.get(Mix.EMPTY)
        cached = common_prefix(base.tokens, prefix)
        if cached < len(prefix):
            base, start, cached = self.prepare(Mix.EMPTY, prefix)
            base.decode(prefix[start:])
        context.adopt(base, len(prefix))
        return PreparedContext(context, len(prefix), cached)

    def _keep(self, mix: Mix, context: Context, staying: int = 0) -> None:
        """Copy out what a context holds, if more than its first ``staying`` tokens are worth it."""
        tokens = context.tokens
        if context.acts_from:  # the prompt's KV is the bare base's, and found there
            return
        if len(tokens) - staying >= WORTH_SAVING and self.saved.best(mix, tokens)[0] < len(tokens):
            self.saved.put(mix, context.save())

    def tidy(self) -> None:
        """Give back the memory that other adapters' graphs left behind; takes milliseconds, so in a quiet moment."""
        if self._swapped:
            self._swapped = False
            give_back()

    def holding(self, mix: Mix, tokens: Sequence[int]) -> Context | None:
        """The context of a mix if it holds exactly these tokens."""
        context = self._contexts.get(mix)
        return context if context is not None and context.tokens == tokens else None

    @property
    def mixes(self) -> list[Mix]:
        """Mixes that hold a context now, least recently used first."""
        return list(self._contexts)

    def drop(self, skills: Collection[str], *, taps: Sequence[int]) -> None:
        """Free the contexts that these skills act in, and all contexts where the gate needs other taps.

        Args:
            skills: names; their adapters can be freed afterwards.
            taps: layers that the gate reads from now on.
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
    """Keep what a context holds of a prompt, and drop the rest.

    Args:
        context: its KV is cut to a prefix of the prompt, from which the rest gets the bits of a fresh read.
        tokens: the whole prompt.

    Returns:
        Tokens that need no decoding; all of them only where the context knows the logits behind the last.
    """
    same = common_prefix(context.tokens, tokens)
    # behind a whole prompt comes an answer, which was written and not read: a conversation just goes on
    goes_on = 0 < context.whole <= same < len(tokens)
    context.truncate(same)
    if goes_on or (same == len(tokens) and context.behind is not None and context.behind.length == same):
        return same
    same = resume_position(min(same, len(tokens) - 1), context.whole, len(tokens), context.n_batch)
    context.truncate(same)
    context.whole = len(tokens)
    return same
