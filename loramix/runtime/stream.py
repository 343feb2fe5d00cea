"""An answer as it comes, piece by piece: tokens to text, stop texts, one mix after another.

It says which tokens it wants decoded under which mix and is handed logits: by itself through the engine, or by
`loramix.runtime.scheduler` in one batch with other answers.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from loramix.models.mixing import Mix
from loramix.runtime.decoder import DecodeRequest, DecodeResult
from loramix.runtime.detokenize import Detokenizer, shown
from loramix.runtime.llama.model import Model
from loramix.runtime.options import GenerationOptions
from loramix.runtime.prepared_prompt import PreparedPrompt
from loramix.runtime.router import Route
from loramix.runtime.sampling import Picker, TokenScore, score
from loramix.runtime.token_mixer import TokenMixer

Shown: TypeAlias = tuple[bytes, float, list[tuple[bytes, float]]]
"""A token's bytes, its log-probability, and the likeliest ones with theirs."""


@dataclass(frozen=True)
class Answer:
    """A finished answer."""

    text: str
    route: Route
    usage: dict[str, int]
    """``prompt_tokens``, ``cached_tokens`` (of the prompt, not decoded again), ``completion_tokens``."""
    timings: dict[str, float]
    """Seconds: ``features``, ``gate``, ``first_token`` (from the call on), ``total``."""
    finish_reason: str
    """``stop`` (the model or a stop string ended it) or ``length``."""
    tokens: list[int] = field(default_factory=list, repr=False)
    """Ids of the answer."""
    mixes: list[Mix] = field(default_factory=list, repr=False)
    """The mix that chose each token; the same one throughout but under the policies ``each`` and ``token``."""
    scores: list[TokenScore] = field(default_factory=list, repr=False)
    """Log-probabilities of the tokens, where they were asked for."""


class StreamEngine(Protocol):
    """What a `Stream` needs of an engine."""

    model: Model
    n_ctx: int

    def alone(self) -> AbstractContextManager[None]:
        """Keep other threads out."""

    def decode(self, request: DecodeRequest) -> DecodeResult:
        """Logits after tokens under a mix."""

    def gate_probabilities(self, mix: Mix) -> dict[str, float]:
        """The gate's probabilities at the last token that a mix decoded, by skill."""

    def max_tokens(self, mix: Mix) -> int:
        """Longest answer of a mix in tokens, by its skills."""

    def tidy(self) -> None:
        """Release memory that finished answers hold."""


class Stream(Iterator[str]):
    """Pieces of an answer as they come; made by `Engine.stream`.

    Args:
        engine: decodes.
        route: the mixes that answer, one after another, each on a line of its own.
        prompt: tokenized.
        options: limits, stop texts and log-probabilities to keep.
        picker: chooses tokens.
        began: `time.perf_counter` at the call, in seconds.
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
        self._engine, self._prompt, self._stop = engine, prompt.tokens, options.stop
        self._limit, self._top = options.max_tokens, options.top_logprobs
        self._picker, self._began = picker, began
        self.scores: list[TokenScore] = []
        self._tokens: list[int] = []
        self._mixes: list[Mix] = []
        self._firsts: set[int] = set()  # where a mix's answer begins
        self._text, self._sent = "", 0
        self._first, self._cached = 0.0, 0
        self._pieces: Generator[str | DecodeRequest, DecodeResult | None, None] = self._run()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        item = self.advance()
        while isinstance(item, DecodeRequest):
            try:
                with self._engine.alone():  # until the token is picked, what its context holds is read too
                    item = self.advance(self._engine.decode(item))
            except BaseException:
                self.close()
                raise
        if item is None:
            raise StopIteration
        return item

    @property
    def moves(self) -> bool:
        """Whether the mix changes with each token, by what the engine's own context holds."""
        return self.route.policy == "token" and len(self.route.mix) > 1

    def scored(self, start: int, stop: int) -> list[Shown]:
        """Scores from one place to another, with tokens as their bytes in the answer."""
        model = self._engine.model
        rows: list[Shown] = []
        for i, (token, chance, top) in enumerate(self.scores[start:stop], start):
            first = i in self._firsts
            others = [(shown(model, other, first=first), p) for other, p in top]
            rows.append((shown(model, token, first=first), chance, others))
        return rows

    def advance(self, decoded: DecodeResult | None = None) -> str | DecodeRequest | None:
        """Go one step.

        Args:
            decoded: what was wanted last; None otherwise.

        Returns:
            A piece of text, what to decode next, or None at the end.
        """
        try:
            return self._pieces.send(decoded)
        except StopIteration:
            return None

    def close(self) -> None:
        """Stop here; what was decoded stays in the cache and is valid."""
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
            ended = yield from self._say(mix, limit)
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
        self._engine.tidy()

    def _say(self, mix: Mix, limit: int) -> Generator[str | DecodeRequest, DecodeResult | None, str]:
        """One mix's answer; what ended it: ``end`` (the model), ``stop`` (a stop text) or ``length``."""
        engine = self._engine
        moving = TokenMixer(mix) if self.moves else None
        if moving:
            mix = moving.mix
        decoder = Detokenizer(engine.model)
        self._firsts.add(len(self._tokens))
        tokens: list[int] = []
        while True:
            decoded = yield DecodeRequest(mix, self._prompt + tokens, len(self._prompt))
            assert decoded is not None
            token = self._picker.pick(decoded.logits, self._prompt + tokens)
            if not self._first:
                self._first, self._cached = time.perf_counter() - self._began, decoded.cached
            if engine.model.is_end(token):
                return "end"
            if moving:
                moving.follow(
                    engine.gate_probabilities(mix)
                )  # now: after a yield the context may hold another answer
            tokens.append(token)
            self._tokens.append(token)
            self._mixes.append(mix)
            if self._top is not None:
                self.scores.append(score(decoded.logits, token, self._top))
            self._text += decoder.add(token)
            if (end := _first_stop(self._text, self._stop)) is not None:
                self._text = self._text[:end]
                return "stop"
            safe = len(self._text) - _held_back(self._text, self._stop)
            if safe > self._sent:
                yield self._text[self._sent : safe]
                self._sent = safe
            if len(self._prompt) + len(tokens) >= engine.n_ctx or len(tokens) == limit:
                return "length"
            if moving:
                mix = moving.mix


def _first_stop(text: str, stop: tuple[str, ...]) -> int | None:
    found = [place for word in stop if (place := text.find(word)) >= 0]
    return min(found, default=None)


def _held_back(text: str, stop: tuple[str, ...]) -> int:
    """Characters at the end that may be the start of a stop text, and so must wait."""
    return max(
        (n for word in stop for n in range(1, len(word)) if text.endswith(word[:n])),
        default=0,
    )
