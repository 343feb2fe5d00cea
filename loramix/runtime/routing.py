"""Routes a prepared prompt: reads it with the gate and chooses the mix."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from loramix.errors import InvalidArtifact
from loramix.models.early_head import EarlyHead
from loramix.models.message_reading import ANSWER
from loramix.models.mixing import Mix
from loramix.pack.pack import Pack
from loramix.runtime.decoder import Decoder, DecodeRequest
from loramix.runtime.gate_reader import EarlyReader, GateReader, Reading
from loramix.runtime.old_gate import OldReader
from loramix.runtime.options import GenerationOptions
from loramix.runtime.prepared_prompt import PreparedPrompt
from loramix.runtime.router import NO_GATE, Route, Router
from loramix.runtime.steps import StepFinder
from loramix.runtime.token_mixer import TOKEN_CONTEXTS


class GateRouting:
    """Routes prompts with a pack's gate.

    Args:
        pack: whose skills a mix may name.
        router: the pack's router.
        decoder: holds the base and the answers' contexts.
        n_threads: threads for the base's layers.
    """

    def __init__(self, pack: Pack, router: Router, decoder: Decoder, n_threads: int) -> None:
        self.router, self._pack, self._decoder = router, pack, decoder
        self._steps = StepFinder(pack, decoder.model, decoder.n_ctx, self._classes)
        self.reader: GateReader | None = None
        if isinstance(router.gate, EarlyHead):
            self.reader = EarlyReader(router.gate, decoder.model, n_threads)
        elif router.gate is not None:
            self.reader = OldReader(router.gate, decoder)

    def request(self, prompt: PreparedPrompt, options: GenerationOptions) -> DecodeRequest | None:
        """Return the base-model prefill that routing needs, so that it can be chunked; None if it needs none.

        Args:
            prompt: the tokenized prompt.
            options: only ``policy`` and ``mix`` are used.
        """
        if options.mix is not None or options.policy == "base" or self.reader is None:
            return None
        return self.reader.request(prompt)

    def route(self, prompt: PreparedPrompt, options: GenerationOptions) -> Route:
        """Choose the mix for a prompt.

        Args:
            prompt: the tokenized prompt.
            options: ``policy`` and ``mix`` are used, and whether the answer is constrained.

        Returns:
            The route, with the seconds for features and gate in ``timings``.

        Raises:
            UnknownSkill: the mix names a skill that the pack lacks.
            InvalidArtifact: the pack has no gate.
            Unsupported: policy ``token`` with a gate that cannot read a growing answer.
        """
        if options.mix is not None:
            for skill in options.mix.scales:
                self._pack.skill(skill)
            return self.router.fixed(options.mix)
        if options.policy == "base" or not self.router.skills:
            return self.router.fixed(Mix.EMPTY)
        if self.reader is None:
            raise InvalidArtifact(NO_GATE)
        if options.policy == "token":
            self.reader.need_reread()
        reading = self.reader.read(prompt)
        route = self.router.decide(reading.probabilities, options.policy)
        began = time.perf_counter()
        if options.plans and route.mix:
            if plan := self._steps.split(reading.tags, route.probabilities, prompt):
                route = self.router.planned(reading.probabilities, plan)
            elif self._knows_plans(reading, route):
                route = replace(self.router.decide(reading.probabilities, "top1"), policy=options.policy)
            if not (route.plan or route.then):
                route = replace(
                    route, plan=self._steps.one_step(reading.tags, route.probabilities, route.mix, prompt)
                )
        if options.policy == "token" and len(route.mix) > 1:
            self._decoder.pool.size = max(self._decoder.pool.size, TOKEN_CONTEXTS)
        spent = reading.timings["gate"] + time.perf_counter() - began
        return replace(route, words=reading.words, timings={**reading.timings, "gate": spent})

    def _classes(self, message: str) -> dict[str, float]:
        """The gate's probabilities by skill, and for the base, of a message of its own."""
        assert isinstance(self.reader, EarlyReader)  # only its readings have tags
        tokens = self._decoder.model.chat([{"role": "user", "content": message}])
        return self.router.table(self.reader.probabilities(tokens))

    def _knows_plans(self, reading: Reading, route: Route) -> bool:
        """Whether the gate was trained to split such a request: what it does not split is answered as one."""
        skills = (self._pack.skill(name) for mix in route.steps for name in mix.scales)
        known = reading.tags is not None and ANSWER in reading.tags.names
        return known and all(skill.instruction is not None for skill in skills)

    def reread(self, prompt: PreparedPrompt, answer: Sequence[int], mix: Mix) -> tuple[dict[str, float], int]:
        """Read a growing answer, if its next reading is due.

        Args:
            prompt: the tokenized prompt.
            answer: the tokens so far.
            mix: the mix that decoded the last of them.

        Returns:
            The gate's probabilities by skill, and the number of tokens that they stand for; empty if not due.
        """
        if self.reader is None or len(answer) % self.reader.every:
            return {}, 0
        probabilities = self.reader.reread(prompt, answer, mix)
        return dict(zip(self.router.names, map(float, probabilities), strict=False)), self.reader.every

    @property
    def uses_base_context(self) -> bool:
        """Whether routing prefills prompts in the answers' context of the bare base."""
        return self.reader is not None and self.reader.uses_base_context

    def close(self) -> None:
        """Free the gate's native memory; may be called more than once."""
        if self.reader is not None:
            self.reader.close()
