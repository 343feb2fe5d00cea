"""The public entry point: routes prompts, generates and streams answers with a pack on its base.

A lock serializes calls, because a llama.cpp context must be used by one thread at a time.
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

from loramix.defaults import CONTEXTS, DEFAULT_PACK, MAX_TOKENS, MIN_CTX, N_CTX
from loramix.errors import UsageError, WrongBase
from loramix.formats.validate import read_base
from loramix.hardware import default_threads, repacked_types
from loramix.models import bases
from loramix.models.mixing import Mix
from loramix.pack.pack import Pack
from loramix.prompts import Message, as_messages
from loramix.runtime.adapters import AdapterCache, AdapterFile
from loramix.runtime.answer import Answer
from loramix.runtime.constraints.constraint import Constraint
from loramix.runtime.decoder import Decoder, DecodeRequest, DecodeResult
from loramix.runtime.embed import Embedder
from loramix.runtime.labels import LabelTrie, LabelTries
from loramix.runtime.llama.model import Model
from loramix.runtime.old_gate import tapped_layers
from loramix.runtime.options import GenerationOptions, check_range
from loramix.runtime.prepared_prompt import PreparedPrompt
from loramix.runtime.probe import verdict_for
from loramix.runtime.router import Route, Router
from loramix.runtime.routing import GateRouting
from loramix.runtime.sampling import Picker, Sampler
from loramix.runtime.steps import StepPrompts
from loramix.runtime.stream import Stream

Prompt = str | Sequence[Message] | PreparedPrompt


class Engine:
    """A base with a pack's adapters and gate; created by `Engine.open`.

    Args:
        pack: the pack to serve.
        base: path of the GGUF base; by default the base that the pack names.
        n_ctx: maximum tokens of prompt and answer together.
        n_threads: threads for llama.cpp; by default one per core that the process may use.
        contexts: maximum number of mixes whose KV is kept at once.
    """

    def __init__(
        self,
        pack: Pack,
        *,
        base: Path | None = None,
        n_ctx: int = N_CTX,
        n_threads: int | None = None,
        contexts: int = CONTEXTS,
    ) -> None:
        self.pack = pack
        self.base_path = base or bases.resolve(pack.manifest.base.name)
        check_range("n_ctx", n_ctx, MIN_CTX, 1_048_576)
        digest = bases.digest(self.base_path)
        if digest != pack.manifest.base.sha256:
            named, found = pack.manifest.base, f"found {self.base_path.name} ({digest[:12]})"
            what = f"pack {pack.name} is for base {named.name} ({named.sha256[:12]}); {found}"
            raise WrongBase(f"{what}: get the right one with 'loramix pull {named.name}'.")
        _, self._shape = read_base(self.base_path)
        self.router = Router.of(pack, self._shape)
        files = {skill.name: AdapterFile.of(pack, skill.name, self._shape) for skill in pack.skills}
        extra = verdict_for(self.base_path).use_extra_bufts
        self._lock = threading.RLock()
        self._closed = False
        self._embedder: Embedder | None = None
        self.model = Model(self.base_path, use_extra_bufts=extra)
        self._tries = LabelTries(self.model)
        try:
            if extra and self._shape.tensor_types & repacked_types():
                self.model.forget_file()
            _ = self.model.template, self.model.ends  # raises here rather than at the first prompt
            self.n_ctx = min(n_ctx, self.model.n_ctx_train)
            self.n_threads = n_threads or default_threads()
            adapters = AdapterCache(self.model, quantized=self._shape.is_quantized)
            for name, file in files.items():
                adapters.put(name, file)
            self.decoder = Decoder(
                self.model,
                adapters,
                n_ctx=self.n_ctx,
                n_threads=self.n_threads,
                taps=tapped_layers(self.router.gate),
                contexts=contexts,
            )
            self.routing = GateRouting(pack, self.router, self.decoder, self.n_threads)
        except BaseException:
            self.model.close()
            raise

    @classmethod
    def open(cls, name_or_directory: str | Path = DEFAULT_PACK, **options: Any) -> Engine:
        """Open a pack by name or directory.

        Args:
            name_or_directory: see `Pack.load`.
            **options: keyword arguments of the constructor.

        Raises:
            NotFound: no such pack, or its base is not on this machine.
            InvalidArtifact: a file of the pack failed validation.
        """
        return cls(Pack.load(name_or_directory), **options)

    def prepare(self, prompt: Prompt) -> PreparedPrompt:
        """Validate and tokenize a prompt once for routing and answering; return a prepared prompt unchanged.

        Raises:
            InvalidPrompt: empty, or longer than the context.
        """
        if isinstance(prompt, PreparedPrompt):
            return prompt
        with self.exclusive():
            return PreparedPrompt.of(prompt, self.model, self.n_ctx, self.model.n_ctx_train, self.router.gate)

    def route(self, prompt: Prompt, options: GenerationOptions | None = None, **values: Any) -> Route:
        """Choose the mix for a prompt without answering it.

        Args:
            prompt: text, or OpenAI-style messages; the gate reads the last turns.
            options: ``policy`` and ``mix``, and whether the answer is constrained.
            **values: instead of ``options``; see `GenerationOptions`.

        Raises:
            InvalidPrompt: empty, or longer than the context.
            UnknownSkill: the mix names a skill that the pack lacks.
        """
        options = options or GenerationOptions.of(**values)
        with self.exclusive():
            return self.routing.route(self.prepare(prompt), options)

    def generate(self, prompt: Prompt, options: GenerationOptions | None = None, **values: Any) -> Answer:
        """Answer a prompt; arguments and exceptions as for `stream`."""
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
        """Stream the answer to a prompt.

        Args:
            prompt: text, OpenAI-style messages, or the result of `prepare`.
            options: how to route, sample and stop.
            route: the result of `route` for this prompt, to skip routing.
            began: `time.perf_counter` at the start of the request, for the timings; by default now.
            **values: instead of ``options``: fields of `GenerationOptions` and settings of `Sampling`.

        Returns:
            Text pieces that never split a UTF-8 character, with ``route`` and, after the last piece, ``answer``.

        Raises:
            InvalidPrompt: empty, or longer than the context.
            UsageError: an option out of its range.
            UnknownSkill: the mix names a skill that the pack lacks.
        """
        began = time.perf_counter() if began is None else began
        options = options or GenerationOptions.of(**values)
        constraint = Constraint.of(options.grammar, options.json_schema)
        with self.exclusive():
            prepared = self.prepare(prompt)
            if route is None:
                route = self.routing.route(prepared, options)
            picker: Picker = Sampler(options.sampling)
            if constraint is not None:
                route, picker = replace(route, then=(), plan=()), constraint.picker(self.model, picker)
            prompts = StepPrompts(prepared, route.plan, self.pack, self.model)
            return Stream(self, route, prompts, options, picker, began)

    def embed(self, texts: Sequence[str], *, truncate: bool = False) -> tuple[npt.NDArray[np.float32], int]:
        """Return embeddings of texts and their number of tokens; see `Embedder.embed`."""
        with self.exclusive():
            if self._embedder is None:
                self._embedder = Embedder(self.model, n_ctx=self.n_ctx, n_threads=self.n_threads)
            return self._embedder.embed(texts, truncate=truncate)

    def reload(self) -> bool:
        """Reload the pack from disk: added, replaced and removed skills, and the gate.

        Running answers continue unless their skill was removed or replaced. On an error nothing changes.

        Returns:
            Whether the pack had changed.

        Raises:
            NotFound, InvalidArtifact, WrongBase: the pack on disk cannot be used; the old one stays in use.
        """
        pack = Pack.load(self.pack.directory)
        with self.exclusive():
            if pack.manifest == self.pack.manifest:
                return False
            if pack.manifest.base.sha256 != self.pack.manifest.base.sha256:
                raise WrongBase(f"pack {pack.name} has another base now; open a new engine on it.")
            router = Router.of(pack, self._shape)
            fresh = AdapterFile.changed(self.pack, pack, self._shape)  # on an error the old pack stays in use
            gone = {s.name for s in self.pack.skills} - ({s.name for s in pack.skills} - fresh.keys())
            self.routing.close()
            self.decoder.pool.drop(gone, taps=tapped_layers(router.gate))
            self.decoder.adapters.drop(gone)
            for name, file in fresh.items():
                self.decoder.adapters.put(name, file)
            self.pack, self.router = pack, router
            self.routing = GateRouting(pack, router, self.decoder, self.n_threads)
            return True

    def trim_memory(self) -> None:
        """Return unused heap memory to the system; called at the end of each answer."""
        with self._lock:
            if not self._closed:
                self.decoder.pool.trim_memory()

    def close(self) -> None:
        """Free all native resources; may be called more than once."""
        with self._lock:
            self._closed = True
            self.decoder.close()  # with the model, and so the gate's context

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the engine's lock.

        Raises:
            UsageError: the engine is closed.
        """
        with self._lock:
            if self._closed:  # checked with the lock held: its last holder may have closed the engine
                raise UsageError("the engine is closed; open it again.")
            yield

    def count_tokens(self, prompt: str | Sequence[Message]) -> int:
        """Count a prompt's tokens under the base's chat template; it may be longer than the context."""
        with self.exclusive():
            return len(self.model.chat(as_messages(prompt)))

    def max_tokens(self, mix: Mix) -> int:
        """Return the longest answer of a mix in tokens: the largest limit of its skills.

        Raises:
            UnknownSkill: a skill of the mix was removed from the pack.
        """
        return max((self.pack.skill(name).max_tokens for name in mix.scales), default=MAX_TOKENS)

    def labels_of(self, mix: Mix) -> LabelTrie | None:
        """See `LabelTries.of`."""
        return self._tries.of(self.pack, mix)

    def decode(self, request: DecodeRequest) -> DecodeResult:
        """See `Decoder.decode`; serializes streams of several threads."""
        with self.exclusive():
            return self.decoder.decode(request)

    def read(self, request: DecodeRequest) -> int:
        """See `Decoder.read`; raises if the engine is closed, as `decode` does."""
        with self.exclusive():
            return self.decoder.read(request)

    def routing_request(
        self, prompt: Prompt, options: GenerationOptions | None = None, **values: Any
    ) -> DecodeRequest | None:
        """Return the base-model prefill that `route` needs for these arguments, so that it can be chunked."""
        return self.routing.request(self.prepare(prompt), options or GenerationOptions.of(**values))

    def reread(self, prompt: PreparedPrompt, answer: Sequence[int], mix: Mix) -> tuple[dict[str, float], int]:
        """See `GateRouting.reread`."""
        with self.exclusive():
            return self.routing.reread(prompt, answer, mix)
