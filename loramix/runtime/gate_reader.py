"""Reads prompts with a pack's gate: the states of the base's lowest layers, then the head over them.

The pass has a small context of its own, so that it neither needs nor changes the KV of any answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from loramix.models.early_head import EarlyHead, HeadOutput
from loramix.models.mixing import Mix
from loramix.models.softmax import log_softmax
from loramix.runtime.attended_words import Words, attended_words
from loramix.runtime.decoder import DecodeRequest
from loramix.runtime.llama.early_pass import EarlyPass
from loramix.runtime.llama.model import Model
from loramix.runtime.prepared_prompt import PreparedPrompt

REREAD_TOKENS = 8
"""Tokens between two readings of a growing answer."""


@dataclass(frozen=True)
class TokenTags:
    """What each token is: text, words that ask for a skill, or neither."""

    names: list[str]
    """The N tags."""
    probabilities: npt.NDArray[np.float32]
    """(T, N)."""
    tokens: list[int]
    """The T ids."""
    first: int
    """Tokens before the cut of a long prompt."""


@dataclass(frozen=True)
class Reading:
    """What a gate says of a prompt."""

    probabilities: npt.NDArray[np.float32]
    """(K + 1,): the K skills, then the base."""
    words: Words = ()
    tags: TokenTags | None = None
    """The tags of its tokens; None if the gate has none."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds: ``features`` (pass of the base) and ``gate``."""


class GateReader(Protocol):
    """Reads prompts with one gate; used with the engine's lock held."""

    every: int
    """Tokens of an answer between two calls of `reread`."""
    uses_base_context: bool
    """Whether it prefills prompts in the answers' context of the bare base."""

    def request(self, prompt: PreparedPrompt) -> DecodeRequest | None:
        """Return the prefill of the bare base that `read` needs, so that it can be chunked; None if it needs none."""

    def read(self, prompt: PreparedPrompt) -> Reading:
        """Read a prompt."""

    def need_reread(self) -> None:
        """Raise Unsupported if `reread` cannot be used."""

    def reread(self, prompt: PreparedPrompt, answer: Sequence[int], mix: Mix) -> npt.NDArray[np.float32]:
        """Return the probabilities (K + 1,) after the tokens of a growing answer, the last of them under a mix."""

    def close(self) -> None:
        """Free its native memory; may be called more than once."""


class EarlyReader:
    """Reads with an `EarlyHead`; its context is created at the first prompt.

    Args:
        head: the gate.
        model: the base.
        n_threads: threads for the base's layers; the head itself uses one.
    """

    every = REREAD_TOKENS
    uses_base_context = False

    def __init__(self, head: EarlyHead, model: Model, n_threads: int) -> None:
        self.head, self._model, self._n_threads = head, model, n_threads
        self._pass: EarlyPass | None = None
        self._blas: ThreadpoolController | None = None

    @property
    def n_tokens_read(self) -> int:
        """Tokens that the base has read for this gate."""
        return self._pass.n_tokens_read if self._pass else 0

    def request(self, prompt: PreparedPrompt) -> DecodeRequest | None:
        """Return None: the pass is shorter than one chunk."""
        return None

    def read(self, prompt: PreparedPrompt) -> Reading:
        """Read a prompt: at most the first and the last tokens of its last turns.

        Raises:
            NativeError, Interrupted: see `EarlyPass.states`.
        """
        ids = self.head.window(prompt.routed)
        began = time.perf_counter()
        states = self._states(ids)
        middle = time.perf_counter()
        output = self._decide(states)
        probabilities = self.head.probabilities(output.logits)
        done = time.perf_counter()
        words = attended_words(
            output.attention, ids, self.head.info.first, prompt.contents, self._model.piece
        )
        info = self.head.info
        tags = TokenTags(info.tags, np.exp(log_softmax(output.tags)), ids, info.first) if info.tags else None
        return Reading(probabilities, words, tags, {"features": middle - began, "gate": done - middle})

    def need_reread(self) -> None:
        """Every gate of this kind reads growing answers."""

    def reread(self, prompt: PreparedPrompt, answer: Sequence[int], mix: Mix) -> npt.NDArray[np.float32]:
        """Read the prompt with the answer so far, under the bare base; see `GateReader.reread`."""
        return self.probabilities([*prompt.routed, *answer])

    def probabilities(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the probabilities (K + 1,) of a rendered prompt; of a long one its first and last tokens are read."""
        states = self._states(self.head.window(tokens))
        return self.head.probabilities(self._decide(states).logits)

    def close(self) -> None:
        """Free the context; may be called more than once."""
        if self._pass is not None:
            self._pass.close()
            self._pass = None

    def _states(self, ids: list[int]) -> npt.NDArray[np.float32]:
        info = self.head.info
        if self._pass is None:
            self._pass = EarlyPass(
                self._model, info.layers, n_threads=self._n_threads, max_tokens=info.first + info.last
            )
        return self._pass.states(ids)

    def _decide(self, states: npt.NDArray[np.float32]) -> HeadOutput:
        if self._blas is None:
            self._blas = ThreadpoolController()
        # OpenBLAS's threads spin while they wait for each other, which costs more than these matrices do
        with self._blas.limit(limits=1, user_api="blas"):
            return self.head(states)
