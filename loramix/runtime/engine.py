"""The engine: a pack on its base, answering prompts: route, generate, stream.

What goes in is a prompt or messages; what comes out is text with its route, usage and timings. One call
at a time: a lock keeps threads apart, since a context belongs to one thread at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.defaults import CONTEXTS as DEFAULT_CONTEXTS
from loramix.defaults import DEFAULT_PACK, DEFAULT_POLICY, MAX_TOKENS, MIN_CTX, N_CTX, POLICIES
from loramix.errors import InvalidPrompt, Unsupported, UsageError, WrongBase
from loramix.formats.validate import read_base
from loramix.hardware import default_threads, repacked_types
from loramix.models import bases
from loramix.models.mixing import Mix
from loramix.pack.pack import Pack
from loramix.prompts import Message, as_messages
from loramix.runtime.adapters import AdapterCache, AdapterFile
from loramix.runtime.constraints.constraint import Constraint
from loramix.runtime.decoder import Decoder
from loramix.runtime.embed import Embedder
from loramix.runtime.features import pool
from loramix.runtime.llama.model import Model
from loramix.runtime.probe import verdict_for
from loramix.runtime.router import MixLike, Route, Router, as_mix
from loramix.runtime.sampling import Picker, Sampler, Sampling
from loramix.runtime.stream import Answer, Decoded, Stream, Wanted
from loramix.runtime.token_mixer import CONTEXTS_IN_MOTION

_MAX_STOPS = 16


class Engine:
    """A base with a pack's adapters and gate; made by `Engine.open`.

    Args:
        pack: what to serve.
        base: the GGUF; by default what the pack names.
        n_ctx: tokens that prompt and answer may have together.
        n_threads: threads for llama.cpp; by default one per core that the process may use.
        contexts: most mixes whose KV is kept at once.
    """

    def __init__(
        self,
        pack: Pack,
        *,
        base: Path | None = None,
        n_ctx: int = N_CTX,
        n_threads: int | None = None,
        contexts: int = DEFAULT_CONTEXTS,
    ) -> None:
        self.pack = pack
        self.base_path = base or bases.resolve(pack.manifest.base.name)
        _check_range("n_ctx", n_ctx, MIN_CTX, 1_048_576)
        found = bases.digest(self.base_path)
        if found != pack.manifest.base.sha256:
            raise WrongBase(
                f"pack {pack.name} is for base {pack.manifest.base.name} ({pack.manifest.base.sha256[:12]}); "
                f"found {self.base_path.name} ({found[:12]}): get the right one with "
                f"'loramix pull {pack.manifest.base.name}'."
            )
        _, self._shape = read_base(self.base_path)
        self.router = Router.of(pack, self._shape)
        files = {skill.name: AdapterFile.of(pack, skill.name, self._shape) for skill in pack.skills}
        extra = verdict_for(self.base_path).use_extra_bufts
        self._lock = threading.RLock()
        self._closed = False
        self._embedder: Embedder | None = None
        self.model = Model(self.base_path, use_extra_bufts=extra)
        try:
            if extra and self._shape.tensor_types & repacked_types():
                self.model.forget_file()
            _ = self.model.template, self.model.ends  # refused now, not at the first prompt
            self.n_ctx = min(n_ctx, self.model.n_ctx_train)
            self.n_threads = n_threads or default_threads()
            adapters = AdapterCache(self.model, rounded=self._shape.is_quantized)
            for name, file in files.items():
                adapters.put(name, file)
            self.decoder = Decoder(
                self.model,
                adapters,
                n_ctx=self.n_ctx,
                n_threads=self.n_threads,
                taps=self.router.layers,
                contexts=contexts,
            )
        except BaseException:
            self.model.close()
            raise

    @classmethod
    def open(cls, name_or_directory: str | Path = DEFAULT_PACK, **options: Any) -> Engine:
        """Open a pack by name or directory.

        Args:
            name_or_directory: as `Pack.load` takes it.
            **options: as the constructor takes them.

        Raises:
            NotFound: no such pack, or its base is not on this machine.
            InvalidArtifact: a file of the pack must not be loaded.
        """
        return cls(Pack.load(name_or_directory), **options)

    def route(
        self, prompt: str | Sequence[Message], *, policy: str = DEFAULT_POLICY, mix: MixLike | None = None
    ) -> Route:
        """Choose the mix for a prompt, without answering.

        Args:
            prompt: text, or OpenAI-style messages; the last user's message is what is routed.
            policy: see `Router.decide`; or ``base``.
            mix: a mix that overrides the gate.

        Raises:
            InvalidPrompt: empty, or longer than the context.
            UnknownSkill: the mix names a skill that the pack lacks.
        """
        messages = as_messages(prompt)
        with self.alone():
            return self._route(messages, policy, mix)

    def generate(self, prompt: str | Sequence[Message], **options: Any) -> Answer:
        """Answer a prompt.

        Args:
            prompt: text, or OpenAI-style messages.
            **options: ``policy``, ``mix``, ``route``, ``max_tokens``, ``stop`` and all of `Sampling`.

        Raises:
            InvalidPrompt: empty, or longer than the context.
            UsageError: an option out of its range.
        """
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        assert stream.answer is not None
        return stream.answer

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        policy: str = DEFAULT_POLICY,
        mix: MixLike | None = None,
        route: Route | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        grammar: str | None = None,
        json_schema: Mapping[str, Any] | bool | None = None,
        top_logprobs: int | None = None,
        began: float | None = None,
        **sampling: Any,
    ) -> Stream:
        """Answer a prompt piece by piece.

        Args:
            prompt: text, or OpenAI-style messages.
            policy: see `Router.decide`; or ``base``.
            mix: a mix that overrides the gate: a `Mix`, its text form, or ``{skill: scale}``.
            route: what `route` gave for this prompt, so that it is not decided again; overrides both.
            max_tokens: longest answer; by default what each skill that answers says.
            stop: texts that end the answer and are not part of it.
            grammar: GBNF that the answer follows; one mix alone answers then.
            json_schema: JSON schema that the answer follows; one mix alone answers then.
            top_logprobs: keep each token's log-probability and those of so many likeliest ones, at most 20.
            began: `time.perf_counter` when it was asked for, which timings count from; by default now.
            **sampling: settings of `Sampling`.

        Returns:
            An iterator of text pieces, whole UTF-8 characters each, with ``route`` and, at the end, ``answer``.
        """
        began = time.perf_counter() if began is None else began
        messages = as_messages(prompt)
        try:
            settings = Sampling(**sampling)
        except TypeError:
            known = set(Sampling.__dataclass_fields__)
            raise UsageError(
                f"unknown option {sorted(set(sampling) - known)}; there are {sorted(known)}."
            ) from None
        if isinstance(stop, str):
            stop = [stop]
        if len(stop) > _MAX_STOPS or not all(isinstance(text, str) and text for text in stop):
            raise UsageError(f"stop must be at most {_MAX_STOPS} non-empty texts.")
        if max_tokens is not None:
            _check_range("max_tokens", max_tokens, 1, 1_000_000)
        if top_logprobs is not None:
            _check_range("top_logprobs", top_logprobs, 0, 20)
        constraint = Constraint.of(grammar, json_schema)
        with self.alone():
            if route is None:
                route = self._route(messages, policy, mix)
            tokens = self._tokens(messages)
            sampler = Sampler(settings, len(tokens))
            picker: Picker = sampler
            if constraint is not None:
                route, picker = replace(route, then=()), constraint.picker(self.model, sampler)
            return Stream(self, route, tokens, max_tokens, tuple(stop), picker, began, top_logprobs)

    def embed(self, texts: Sequence[str], *, truncate: bool = False) -> tuple[npt.NDArray[np.float32], int]:
        """Vectors of texts, and how many tokens these have; see `Embedder.embed`."""
        with self.alone():
            if self._embedder is None:
                self._embedder = Embedder(self.model, n_ctx=self.n_ctx, n_threads=self.n_threads)
            return self._embedder.embed(texts, truncate=truncate)

    def reload(self) -> bool:
        """Take the pack up as it is on disk now: skills added, replaced or removed, another gate.

        An answer under way goes on, unless its skill is gone or another. Refused, nothing has changed.

        Returns:
            Whether anything was new.

        Raises:
            NotFound, InvalidArtifact, WrongBase: the pack on disk cannot be used; the old one stays in use.
        """
        pack = Pack.load(self.pack.directory)
        with self.alone():
            if pack.manifest == self.pack.manifest:
                return False
            if pack.manifest.base.sha256 != self.pack.manifest.base.sha256:
                raise WrongBase(f"pack {pack.name} has another base now; open a new engine on it.")
            router = Router.of(pack, self._shape)
            known = {skill.name: skill.sha256 for skill in self.pack.skills}
            changed = [s.name for s in pack.skills if known.get(s.name) != s.sha256]
            fresh = {name: AdapterFile.of(pack, name, self._shape) for name in changed}
            for file in fresh.values():
                _ = file.invocation  # checked now: a bad one must leave the old in use
            names = {skill.name for skill in pack.skills}
            gone = {name for name in known if name in fresh or name not in names}
            self.decoder.pool.drop(gone, taps=router.layers)
            self.decoder.adapters.drop(gone)
            for name, file in fresh.items():
                self.decoder.adapters.put(name, file)
            self.pack, self.router = pack, router
            return True

    def tidy(self) -> None:
        """Give memory back that answers left behind; called at the end of each."""
        with self._lock:
            if not self._closed:
                self.decoder.pool.tidy()

    def close(self) -> None:
        """Free everything native; may be called again."""
        with self._lock:
            self._closed = True
            self.decoder.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other threads out meanwhile.

        Raises:
            UsageError: the engine is closed.
        """
        with self._lock:
            if self._closed:  # asked once it is ours: who had it may have closed it
                raise UsageError("the engine is closed; open it again.")
            yield

    def _require(self, mix: Mix) -> None:
        for skill in mix.scales:
            self.pack.skill(skill)

    def _route(self, messages: list[dict[str, str]], policy: str, mix: MixLike | None) -> Route:
        if mix is not None:
            fixed = as_mix(mix)
            self._require(fixed)
            return self.router.fixed(fixed)
        if policy not in POLICIES:
            raise UsageError(f"policy {policy!r} is unknown; use one of {', '.join(POLICIES)}.")
        if policy == "base" or (not self.router.skills):
            return self.router.fixed(Mix.EMPTY)
        gate = self.router.gate
        if policy == "token" and gate is not None and gate.info.pooling != "last":
            raise Unsupported(
                f"the gate of {self.pack.name} reads {gate.info.pooling!r}, not the last token alone, which token-wise "
                "routing needs; use another policy."
            )
        began = time.perf_counter()
        features = self._features(messages)
        middle = time.perf_counter()
        route = self.router.decide(features, policy)
        if policy == "token" and len(route.mix) > 1:
            self.decoder.pool.size = max(self.decoder.pool.size, CONTEXTS_IN_MOTION)
        timings = {"features": middle - began, "gate": time.perf_counter() - middle}
        return replace(route, timings=timings)

    def _features(self, messages: list[dict[str, str]]) -> npt.NDArray[np.float32]:
        """Features of the last user's message, asked alone: what the gate was trained on."""
        gate = self.router.gate
        if gate is None:
            return np.zeros(0, np.float32)
        tokens = self._tokens([messages[-1]])
        context, start, _ = self.decoder.pool.prepare(Mix.EMPTY, tokens)
        context.decode(tokens[start:])
        return pool(context, gate.info.layers, gate.info.pooling)

    def count_tokens(self, prompt: str | Sequence[Message]) -> int:
        """How many tokens a prompt has under the base's chat template, however many the context holds."""
        with self.alone():
            return len(self.model.chat(as_messages(prompt)))

    def _tokens(self, messages: list[dict[str, str]]) -> list[int]:
        tokens = self.model.chat(messages)
        if len(tokens) >= self.n_ctx:
            raise InvalidPrompt(
                f"the prompt has {len(tokens)} tokens and the context holds {self.n_ctx}: "
                f"shorten it, or give --ctx {2 * len(tokens)} (the base reads at most {self.model.n_ctx_train})."
            )
        return tokens

    def decode(self, wanted: Wanted) -> Decoded:
        """See `Decoder.decode`; streams of several threads may ask in turn."""
        with self.alone():
            return self.decoder.decode(wanted)

    def read(self, wanted: Wanted) -> int:
        """See `Decoder.read`; as `decode`, refused where the engine is closed."""
        with self.alone():
            return self.decoder.read(wanted)

    def before_routing(
        self, prompt: str | Sequence[Message], *, policy: str = DEFAULT_POLICY, mix: MixLike | None = None
    ) -> Wanted | None:
        """What `route` reads under the bare base, for who reads long prompts ahead; None where it reads nothing."""
        if mix is not None or policy == "base" or self.router.gate is None:
            return None
        with self.alone():
            tokens = self._tokens([as_messages(prompt)[-1]])
            return Wanted(Mix.EMPTY, tokens, len(tokens))

    def reading(self, mix: Mix) -> dict[str, float]:
        """What the gate says to the last token that a mix decoded, by skill; nothing where it cannot read that."""
        with self.alone():
            gate = self.router.gate
            if gate is None or gate.info.pooling != "last":  # another one since the answer began
                return {}
            states = pool(self.decoder.pool.get(mix), gate.info.layers, "last")
            return dict(zip(gate.info.skills, map(float, gate.probabilities(states)), strict=False))

    def _max_tokens(self, mix: Mix) -> int:
        limits = [self.pack.skill(name).max_tokens for name in mix.scales]
        return max(limits, default=MAX_TOKENS)


def _check_range(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} is {value!r}; it must be a whole number from {low} to {high}.")
