"""Streams one answer: detokenization, stop strings, and several mixes one after another.

A `Stream` yields decode requests and receives logits, either from the engine directly or from
`loramix.runtime.scheduler`, which batches the requests of several answers.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from loramix.models.mixing import Mix
from loramix.runtime.decoder import DecodeRequest, DecodeResult
from loramix.runtime.detokenize import Detokenizer, visible_bytes
from loramix.runtime.llama.model import Model
from loramix.runtime.options import GenerationOptions
from loramix.runtime.prepared_prompt import PreparedPrompt
from loramix.runtime.router import Route
from loramix.runtime.sampling import Picker, TokenScore, score
from loramix.runtime.token_mixer import TokenMixer

ScoredToken: TypeAlias = tuple[bytes, float, list[tuple[bytes, float]]]
"""A token's bytes, its log-probability, and the most likely tokens with their log-probabilities."""


@dataclass(frozen=True)
class Answer:
    """A finished answer."""

    text: str
    route: Route
    usage: dict[str, int]
    """``prompt_tokens``, ``cached_tokens`` (prompt tokens found in the cache), ``completion_tokens``."""
    timings: dict[str, float]
    """Seconds: ``features``, ``gate``, ``first_token`` (since the start of the request), ``total``."""
    finish_reason: str
    """``stop`` (the model or a stop string ended it) or ``length``."""
    tokens: list[int] = field(default_factory=list, repr=False)
    """Token ids of the answer."""
    mixes: list[Mix] = field(default_factory=list, repr=False)
    """The mix that chose each token; it changes only under the policies ``each`` and ``token``."""
    scores: list[TokenScore] = field(default_factory=list, repr=False)
    """Log-probabilities of the tokens, if they were requested."""


class StreamEngine(Protocol):
    """The part of an engine that a `Stream` uses."""

    model: Model
    n_ctx: int

    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the engine's lock."""

    def decode(self, request: DecodeRequest) -> DecodeResult:
        """Return the logits after tokens under a mix."""

    def reread(self, prompt: PreparedPrompt, answer: Sequence[int], mix: Mix) -> tuple[dict[str, float], int]:
        """Return the gate's probabilities by skill for a growing answer, and for how many tokens they stand."""

    def max_tokens(self, mix: Mix) -> int:
        """Return the longest answer of a mix in tokens."""

    def trim_memory(self) -> None:
        """Return unused heap memory to the system."""


class Stream(Iterator[str]):
    """An iterator of an answer's text pieces; created by `Engine.stream`.

    Args:
        engine: decodes the requests.
        route: the mixes that answer one after another, each on its own line.
        prompt: the tokenized prompt.
        options: token limits, stop strings and log-probabilities to keep.
        picker: samples tokens.
        began: start of the request, `time.perf_counter` in seconds.
    """

    def __init__(
        self,
        engine: StreamEngine,
        route: Route,
        prompt: PreparedPrompt,
        options: GenerationOptions,
        picker: Picker,
        began: float,
    ) -> None:
        self.route = route
        self.answer: Answer | None = None
        self._engine, self._prepared, self._prompt = engine, prompt, prompt.tokens
        self._stop = options.stop
        self._limit, self._top = options.max_tokens, options.top_logprobs
        self._picker, self._began = picker, began
        self.scores: list[TokenScore] = []
        self._tokens: list[int] = []
        self._mixes: list[Mix] = []
        self._answer_starts: set[int] = set()  # index of the first token of each mix's answer
        self._text, self._sent = "", 0
        self._first, self._cached = 0.0, 0
        self._pieces: Generator[str | DecodeRequest, DecodeResult | None, None] = self._run()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        item = self.advance()
        while isinstance(item, DecodeRequest):
            try:
                with self._engine.exclusive():  # the context is also read while the token is sampled
                    item = self.advance(self._engine.decode(item))
            except BaseException:
                self.close()
                raise
        if item is None:
            raise StopIteration
        return item

    @property
    def token_wise(self) -> bool:
        """Whether the mix may change with each token; needs the engine's own contexts."""
        return self.route.policy == "token" and len(self.route.mix) > 1

    def scored(self, start: int, stop: int) -> list[ScoredToken]:
        """Return the scores of answer tokens ``start`` to ``stop`` (exclusive), with tokens as bytes."""
        model = self._engine.model
        rows: list[ScoredToken] = []
        for i, (token, chance, top) in enumerate(self.scores[start:stop], start):
            first = i in self._answer_starts
            others = [(visible_bytes(model, other, first=first), p) for other, p in top]
            rows.append((visible_bytes(model, token, first=first), chance, others))
        return rows

    def advance(self, decoded: DecodeResult | None = None) -> str | DecodeRequest | None:
        """Advance by one step.

        Args:
            decoded: the result of the last request; None if the last step returned no request.

        Returns:
            A piece of text, the next request, or None at the end.
        """
        try:
            return self._pieces.send(decoded)
        except StopIteration:
            return None

    def close(self) -> None:
        """Stop generating; the KV decoded so far stays valid in the cache."""
        self._pieces.close()

    def _run(self) -> Generator[str | DecodeRequest, DecodeResult | None, None]:
        finish = "stop"
        steps = self.route.steps
        for number, mix in enumerate(steps):
            limit = self._engine.max_tokens(mix)
            if self._limit is not None:
                left = self._limit - len(self._tokens)
                limit = min(limit, left) if len(steps) > 1 else left
            if not limit:
                finish = "length"
                break
            if number:
                self._text += "\n"
            ended = yield from self._generate(mix, limit)
            if ended == "stop":
                finish = "stop"
                break
            finish = "length" if "length" in (ended, finish) else "stop"
        if len(self._text) > self._sent:
            yield self._text[self._sent :]
        total = time.perf_counter() - self._began
        usage = {
            "prompt_tokens": len(self._prompt),
            "cached_tokens": self._cached,
            "completion_tokens": len(self._tokens),
        }
        timings = {**self.route.timings, "first_token": self._first, "total": total}
        self.answer = Answer(
            self._text, self.route, usage, timings, finish, self._tokens, self._mixes, self.scores
        )
        self._engine.trim_memory()

    def _generate(self, mix: Mix, limit: int) -> Generator[str | DecodeRequest, DecodeResult | None, str]:
        """Generate one mix's answer; return ``end`` (end-of-turn token), ``stop`` (stop string) or ``length``."""
        engine = self._engine
        mixer = TokenMixer(mix) if self.token_wise else None
        if mixer:
            mix = mixer.mix
        decoder = Detokenizer(engine.model)
        self._answer_starts.add(len(self._tokens))
        tokens: list[int] = []
        while True:
            decoded = yield DecodeRequest(mix, self._prompt + tokens, len(self._prompt))
            assert decoded is not None
            token = self._picker.pick(decoded.logits, self._prompt + tokens)
            if not self._first:
                self._first, self._cached = time.perf_counter() - self._began, decoded.cached
            if engine.model.is_end(token):
                return "end"
            if mixer:
                # before the yield: afterwards the context may hold another answer
                mixer.follow(*engine.reread(self._prepared, [*tokens, token], mix))
            tokens.append(token)
            self._tokens.append(token)
            self._mixes.append(mix)
            if self._top is not None:
                self.scores.append(score(decoded.logits, token, self._top))
            self._text += decoder.add(token)
            if (end := _stop_position(self._text, self._stop)) is not None:
                self._text = self._text[:end]
                return "stop"
            safe = len(self._text) - _possible_stop_length(self._text, self._stop)
            if safe > self._sent:
                yield self._text[self._sent : safe]
                self._sent = safe
            if len(self._prompt) + len(tokens) >= engine.n_ctx or len(tokens) == limit:
                return "length"
            if mixer:
                mix = mixer.mix


def _stop_position(text: str, stop: tuple[str, ...]) -> int | None:
    found = [place for word in stop if (place := text.find(word)) >= 0]
    return min(found, default=None)


def _possible_stop_length(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest suffix that may be the start of a stop string and must be held back."""
    return max(
        (n for word in stop for n in range(1, len(word)) if text.endswith(word[:n])),
        default=0,
    )
