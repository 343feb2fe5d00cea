"""Streams one answer: detokenization, stop strings, and several mixes one after another.

A `Stream` yields decode requests and receives logits, either from the engine directly or from
`loramix.runtime.scheduler`, which batches the requests of several answers.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from loramix.models.mixing import Mix
from loramix.runtime.answer import Answer, ScoredToken
from loramix.runtime.decoder import DecodeRequest, DecodeResult
from loramix.runtime.detokenize import Detokenizer, visible_bytes
from loramix.runtime.labels import ChosenLabel, LabelSearch, LabelTrie, check_room
from loramix.runtime.llama.model import Model
from loramix.runtime.options import GenerationOptions
from loramix.runtime.prepared_prompt import PreparedPrompt
from loramix.runtime.router import Route
from loramix.runtime.sampling import Picker, TokenScore, score
from loramix.runtime.steps import StepPrompts
from loramix.runtime.token_mixer import TokenMixer


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

    def labels_of(self, mix: Mix) -> LabelTrie | None:
        """Return the labels of a mix of exactly one label skill, else None."""

    def trim_memory(self) -> None:
        """Return unused heap memory to the system."""


class Stream(Iterator[str]):
    """An iterator of an answer's text pieces; created by `Engine.stream`.

    Args:
        engine: decodes the requests.
        route: the mixes that answer one after another, each on its own line.
        prompts: the tokenized prompts of the steps.
        options: token limits, stop strings and log-probabilities to keep.
        picker: samples tokens.
        began: start of the request, `time.perf_counter` in seconds.
    """

    def __init__(
        self,
        engine: StreamEngine,
        route: Route,
        prompts: StepPrompts,
        options: GenerationOptions,
        picker: Picker,
        began: float,
    ) -> None:
        self.route = route
        self.answer: Answer | None = None
        self._engine, self._prompts = engine, prompts
        self._prompt = prompts.of(0, "")  # of the step that answers
        self._stop = options.stop
        self._limit, self._top = options.max_tokens, options.top_logprobs
        self._picker, self._began = picker, began
        self._sampled = options.sampling.temperature > 0
        closed = options.labels and options.grammar is None and options.json_schema is None
        self._tries = [engine.labels_of(mix) if closed else None for mix in route.steps]
        check_room(self._tries[:1] if route.plan else self._tries, len(self._prompt), engine.n_ctx)
        self.choosing_label = False
        """Whether the next request is for a branch of the labels, which may not continue the last request."""
        self._step_labels: list[dict[str, float]] = []
        self.scores: list[TokenScore] = []
        self._tokens: list[int] = []
        self._mixes: list[Mix] = []
        self._answer_starts: set[int] = set()  # index of the first token of each mix's answer
        self._parts: list[str] = []
        self._step_prompts: list[list[int]] = []
        self._text, self._sent = "", 0
        self._first = 0.0
        self._cached: list[int] = []  # tokens of each step's prompt that were found in the cache
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
        begin = 0  # of the step's text
        for number, mix in enumerate(steps):
            limit = self._engine.max_tokens(mix)
            if self._limit is not None:
                left = self._limit - len(self._tokens)
                limit = min(limit, left) if len(steps) > 1 else left
            if number:
                self._prompt = self._prompts.of(number, self._text[begin:])
            if not limit or not self._has_room(number):
                finish = "length"
                break
            if number:
                self._text += "\n"
            begin = len(self._text)
            self._step_prompts.append(self._prompt)
            if (trie := self._tries[number]) is not None:
                ended = yield from self._choose(mix, trie)
            else:
                self._step_labels.append({})
                ended = yield from self._generate(mix, limit)
            self._parts.append(self._text[begin:])
            if ended == "stop":
                finish = "stop"
                break
            finish = "length" if "length" in (ended, finish) else "stop"
        if len(self._text) > self._sent:
            yield self._text[self._sent :]
        total = time.perf_counter() - self._began
        n_prompts = len(self._step_prompts) if self.route.plan else 1
        usage = {
            "prompt_tokens": sum(map(len, self._step_prompts[:n_prompts])),
            "cached_tokens": sum(self._cached[:n_prompts]),
            "completion_tokens": len(self._tokens),
        }
        timings = {**self.route.timings, "first_token": self._first, "total": total}
        self.answer = Answer(
            self._text, self.route, usage, timings, finish, self._tokens, self._mixes, self.scores,
            self._step_labels, self._parts, self._step_prompts,
        )  # fmt: skip
        self._engine.trim_memory()

    def _has_room(self, number: int) -> bool:
        """Whether the context holds a step's prompt, and a token of its answer or the tokens of its labels."""
        trie = self._tries[number]
        return len(self._prompt) + (trie.depth if trie else 1) <= self._engine.n_ctx

    def _choose(self, mix: Mix, trie: LabelTrie) -> Generator[str | DecodeRequest, DecodeResult | None, str]:
        """Answer with a label; return ``end`` or ``stop`` as `_generate` does."""
        search = LabelSearch(trie, self._picker if self._sampled else None).run()
        path, cached = next(search), list[int]()
        self.choosing_label = True
        while True:
            decoded = yield DecodeRequest(mix, [*self._prompt, *path], len(self._prompt))
            assert decoded is not None
            cached.append(decoded.cached)
            try:
                path = search.send(decoded.logits)
            except StopIteration as end:
                found: ChosenLabel = end.value
                break
        self.choosing_label = False
        if not self._first:
            self._first = time.perf_counter() - self._began
        self._cached.append(cached[0])
        self._answer_starts.add(len(self._tokens))
        self._step_labels.append(found.probabilities)
        self._tokens += found.tokens
        self._mixes += [mix] * len(found.tokens)
        if self._top is not None:
            self.scores += [row._replace(top=row.top[: self._top]) for row in found.scores]
        self._text += found.label
        return (yield from self._emit()) or "end"

    def _emit(self) -> Generator[str, None, str | None]:
        """Yield the text that is certain; return ``stop`` if it holds a stop string."""
        if (end := _stop_position(self._text, self._stop)) is not None:
            self._text = self._text[:end]
            return "stop"
        safe = len(self._text) - _possible_stop_length(self._text, self._stop)
        if safe > self._sent:
            yield self._text[self._sent : safe]
            self._sent = safe
        return None

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
            token = self._picker.pick(decoded.logits, self._prompt + tokens, len(self._prompt))
            if not self._first:
                self._first = time.perf_counter() - self._began
            if not tokens:
                self._cached.append(decoded.cached)
            if engine.model.is_end(token):
                return "end"
            if mixer:
                # before the yield: afterwards the context may hold another answer
                mixer.follow(*engine.reread(self._prompts.request, [*tokens, token], mix))
            tokens.append(token)
            self._tokens.append(token)
            self._mixes.append(mix)
            if self._top is not None:
                self.scores.append(score(decoded.logits, token, self._top))
            self._text += decoder.add(token)
            if (yield from self._emit()) is not None:
                return "stop"
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
