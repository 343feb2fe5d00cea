"""Text embeddings from the bare base: the normalized mean of the hidden states at a middle layer.

They are not trained for similarity; a dedicated retrieval model is more accurate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loramix.errors import InvalidPrompt
from loramix.runtime.kv_cache import reuse
from loramix.runtime.llama.context import Context
from loramix.runtime.llama.model import Model


class Embedder:
    """Computes embeddings in its own context.

    Args:
        model: the base.
        n_ctx: maximum tokens of a text.
        n_threads: threads for llama.cpp.
    """

    def __init__(self, model: Model, *, n_ctx: int, n_threads: int) -> None:
        self._model, self._layer = model, model.n_layer // 2
        self._context = Context(model, n_ctx=n_ctx, n_threads=n_threads, taps=[self._layer])

    def embed(self, texts: Sequence[str], *, truncate: bool = False) -> tuple[npt.NDArray[np.float32], int]:
        """Embed texts.

        Args:
            texts: the texts.
            truncate: truncate a text that is longer than the context.

        Returns:
            (texts, D) float32 with rows of norm 1, and the number of tokens of all texts.

        Raises:
            InvalidPrompt: a text is empty or longer than the context.
        """
        rows, count = [], 0
        for text in texts:
            # the first token's state is always an outlier, so a dummy token takes that position
            tokens = [max(self._model.bos, 0), *self._model.tokenize(text)]
            if truncate:
                tokens = tokens[: self._context.n_ctx]
            if not 1 < len(tokens) <= self._context.n_ctx:
                raise InvalidPrompt(
                    f"a text to embed has {len(tokens) - 1} tokens; it must have 1 to {self._context.n_ctx - 1}."
                )
            self._context.decode(tokens[reuse(self._context, tokens) :])
            mean = self._context.states(self._layer)[1:].mean(axis=0)
            rows.append(mean / max(float(np.linalg.norm(mean)), 1e-12))
            count += len(tokens) - 1
        return np.stack(rows), count
