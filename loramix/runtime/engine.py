"""The engine: a pack on its base, answering prompts: route, generate, stream.

What goes in is a prompt or messages; what comes out is text with its route, usage and timings. One call
at a time: a lock keeps threads apart, since a context belongs to one thread at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from loramix.defaults import CONTEXTS as DEFAULT_CONTEXTS
from loramix.defaults import DEFAULT_PACK, MAX_TOKENS, MIN_CTX, N_CTX
from loramix.errors import UsageError, WrongBase
from loramix.formats.validate import read_base
from loramix.hardware import default_threads, repacked_types
from loramix.models import bases
from loramix.models.mixing import Mix
from loramix.pack.pack import Pack
from loramix.prompts import Message, as_messages
from loramix.runtime.adapters import AdapterCache, AdapterFile
from loramix.runtime.constraints.constraint import Constraint
from loramix.runtime.decoder import Decoder, DecodeRequest, DecodeResult
from loramix.runtime.embed import Embedder
from loramix.runtime.llama.model import Model
from loramix.runtime.options import GenerationOptions, check_range
from loramix.runtime.prepared_prompt import PreparedPrompt
from loramix.runtime.probe import verdict_for
from loramix.runtime.router import Route, Router
from loramix.runtime.routing import gate_probabilities, route_prompt, routing_request
from loramix.runtime.sampling import Sampler
from loramix.runtime.stream import Answer, Stream

Prompt = str | Sequence[Message] | PreparedPrompt


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
        check_range("n_ctx", n_ctx, MIN_CTX, 1_048_576)
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

    def prepare(self, prompt: Prompt) -> PreparedPrompt:
        """Check and tokenize a prompt, once for routing and answering; a prepared one comes back as it is.

        Raises:
            InvalidPrompt: empty, or longer than the context.
        """
        if isinstance(prompt, PreparedPrompt):
            return prompt
        with self.alone():
            return PreparedPrompt.of(prompt, self.model, self.n_ctx, self.model.n_ctx_train)

    def route(self, prompt: Prompt, options: GenerationOptions | None = None, **values: Any) -> Route:
        """Choose the mix for a prompt, without answering.

        Args:
            prompt: text, or OpenAI-style messages; the last user's message is what is routed.
            options: its policy and mix count.
            **values: ``policy`` and ``mix`` instead of ``options``; see `GenerationOptions`.

        Raises:
            InvalidPrompt: empty, or longer than the context.
            UnknownSkill: the mix names a skill that the pack lacks.
        """
        options = options or GenerationOptions.of(**values)
        with self.alone():
            return route_prompt(self.pack, self.router, self.decoder, self.prepare(prompt), options)

    def generate(self, prompt: Prompt, options: GenerationOptions | None = None, **values: Any) -> Answer:
        """Answer a prompt; arguments and errors are those of `stream`."""
        stream = self.stream(prompt, options, **values)
        for _ in stream:
            pass
        assert stream.answer is not None
        return stream.answer

    def stream(
        self,
        prompt: Prompt,
        options: GenerationOptions | None = None,
        *,
        route: Route | None = None,
        began: float | None = None,
        **values: Any,
    ) -> Stream:
        """Answer a prompt piece by piece.

        Args:
            prompt: text, OpenAI-style messages, or what `prepare` made of them.
            options: how to answer.
            route: what `route` gave for this prompt, so that it is not decided again.
            began: `time.perf_counter` at the request in seconds, from which timings count; by default now.
            **values: instead of ``options``: fields of `GenerationOptions` and settings of `Sampling`.

        Returns:
            An iterator of text pieces, whole UTF-8 characters each, with ``route`` and, at the end, ``answer``.

        Raises:
            InvalidPrompt: empty, or longer than the context.
            UsageError: an option out of its range.
            UnknownSkill: the mix names a skill that the pack lacks.
        """
        began = time.perf_counter() if began is None else began
        options = options or GenerationOptions.of(**values)
        constraint = Constraint.of(options.grammar, options.json_schema)
        with self.alone():
            prepared = self.prepare(prompt)
            if route is None:
                route = route_prompt(self.pack, self.router, self.decoder, prepared, options)
            sampler = Sampler(options.sampling, len(prepared.tokens))
            if constraint is None:
                return Stream(self, route, prepared, options, sampler, began)
            route, picker = replace(route, then=()), constraint.picker(self.model, sampler)
            return Stream(self, route, prepared, options, picker, began)

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

    def count_tokens(self, prompt: str | Sequence[Message]) -> int:
        """How many tokens a prompt has under the base's chat template, however many the context holds."""
        with self.alone():
            return len(self.model.chat(as_messages(prompt)))

    def max_tokens(self, mix: Mix) -> int:
        """Longest answer of a mix in tokens: the largest limit of its skills.

        Raises:
            UnknownSkill: the pack has lost a skill of the mix.
        """
        return max((self.pack.skill(name).max_tokens for name in mix.scales), default=MAX_TOKENS)

    def decode(self, request: DecodeRequest) -> DecodeResult:
        """See `Decoder.decode`; streams of several threads take turns."""
        with self.alone():
            return self.decoder.decode(request)

    def read(self, request: DecodeRequest) -> int:
        """See `Decoder.read`; as `decode`, refused where the engine is closed."""
        with self.alone():
            return self.decoder.read(request)

    def routing_request(
        self, prompt: Prompt, options: GenerationOptions | None = None, **values: Any
    ) -> DecodeRequest | None:
        """The base-model prefill that `route` with these arguments needs, so that it can be chunked."""
        return routing_request(self.router, self.prepare(prompt), options or GenerationOptions.of(**values))

    def gate_probabilities(self, mix: Mix) -> dict[str, float]:
        """See `loramix.runtime.routing.gate_probabilities`."""
        with self.alone():
            return gate_probabilities(self.router, self.decoder, mix)
