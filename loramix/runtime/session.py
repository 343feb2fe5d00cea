"""Contexts by mix: each holds the KV of one mix alone, so a cached prefix can never serve another mix.

A live bug of a peer (ggml-org/llama.cpp #26207) is the reason: KV made under one adapter, reused under
another, silently spoils the answer. Here the mix is the context's identity and is fixed for its life.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence

from loramix.models.mixing import Mix
from loramix.runtime.llama import Adapter, Context, Model


class ContextPool:
    """At most ``size`` contexts, the least recently used freed first; the bare base's always stays.

    Args:
        model: the base.
        adapters: gives what acts as a mix does.
        n_ctx: tokens per context.
        n_threads: threads per decode.
        taps: layers the bare base's context keeps for the gate.
        size: most contexts, the base's included; each costs its KV in memory.
    """

    def __init__(
        self,
        model: Model,
        adapters: Callable[[Mix], Sequence[tuple[Adapter, float]]],
        *,
        n_ctx: int,
        n_threads: int,
        taps: Sequence[int] = (),
        size: int = 3,
    ) -> None:
        self._model, self._adapters = model, adapters
        self._n_ctx, self._n_threads, self._taps, self._size = n_ctx, n_threads, taps, max(2, size)
        self._contexts: OrderedDict[Mix, Context] = OrderedDict()

    def get(self, mix: Mix) -> Context:
        """The context of a mix, made if needed.

        Args:
            mix: its skills must be known to the pool's ``adapters``.
        """
        if mix in self._contexts:
            self._contexts.move_to_end(mix)
            return self._contexts[mix]
        while len(self._contexts) >= self._size:
            oldest = next(
                known for known in self._contexts if known
            )  # never the bare base: the gate reads it
            self._contexts.pop(oldest).close()
        taps = () if mix else self._taps
        context = Context(
            self._model, self._adapters(mix), n_ctx=self._n_ctx, n_threads=self._n_threads, taps=taps
        )
        self._contexts[mix] = context
        return context

    @property
    def mixes(self) -> list[Mix]:
        """Mixes that hold a context now, least recently used first."""
        return list(self._contexts)

    def drop(self, skills: Collection[str], *, taps: Sequence[int]) -> None:
        """Free the contexts that these skills act in, and all of the bare base's where it needs other taps.

        Args:
            skills: names; their adapters can be freed afterwards.
            taps: layers that the gate reads from now on.
        """
        stale = {mix for mix in self._contexts if not mix.scales.keys().isdisjoint(skills)}
        if tuple(taps) != tuple(self._taps):
            self._taps = tuple(taps)
            stale.add(Mix.EMPTY)
        for mix in stale & self._contexts.keys():
            self._contexts.pop(mix).close()

    def clear(self) -> None:
        """Forget all tokens; contexts stay."""
        for context in self._contexts.values():
            context.truncate(0)


def reuse(context: Context, tokens: Sequence[int]) -> int:
    """Keep the longest common prefix of what a context holds and what is asked, and drop the rest.

    Args:
        context: its KV is cut to the prefix.
        tokens: the whole prompt.

    Returns:
        Tokens that need no decoding; fewer than all, since the last token's logits are needed.
    """
    limit = min(len(context.tokens), len(tokens) - 1)
    same = 0
    while same < limit and context.tokens[same] == tokens[same]:
        same += 1
    context.truncate(same)
    return same
