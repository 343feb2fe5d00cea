"""The steps of an answer: finding them in a prompt, their prompts, and their fields in JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from loramix.models.clauses import Read
from loramix.models.message_reading import TEXT, read_message
from loramix.models.message_units import units_of
from loramix.models.plan import Step, find_plan, may_be_split
from loramix.models.text_frame import Span
from loramix.pack.pack import Pack
from loramix.prompts import Message, fill
from loramix.runtime.gate_reader import TokenTags
from loramix.runtime.labels import label_fields
from loramix.runtime.llama.vocabulary import Vocabulary
from loramix.runtime.prepared_prompt import PreparedPrompt
from loramix.runtime.token_places import places_of

TEXT_TOKENS = 4.0
"""Tokens of text from which a message has a text of its own."""


class StepFinder:
    """Finds the steps in which prompts are answered.

    Args:
        pack: the gate's pack.
        vocabulary: vocabulary of the base.
        n_ctx: maximum tokens of prompt and answer together.
        read: see `find_plan`.
    """

    def __init__(self, pack: Pack, vocabulary: Vocabulary, n_ctx: int, read: Read) -> None:
        self._pack, self._vocabulary, self._n_ctx, self._read = pack, vocabulary, n_ctx, read

    def split(
        self, tags: TokenTags | None, classes: Mapping[str, float], prompt: PreparedPrompt
    ) -> tuple[Step, ...]:
        """Split a prompt for two or three skills into steps.

        Args:
            tags: of the prompt's tokens; None if the gate has none.
            classes: the gate's probability by skill, and of the base.
            prompt: the prompt that was read.

        Returns:
            Two or three steps; none if the prompt is answered as one, a skill has no instruction of its own, or a
            step's prompt would not fit the context.
        """
        if tags is None or not may_be_split(tags.names, classes):
            return ()
        skills = self._pack.skills
        message, places = _last_message(tags, prompt, self._vocabulary)
        free = [skill.name for skill in skills if not skill.labels]
        follows = {skill.name: skill.follows for skill in skills}
        plan = find_plan(tags.probabilities, tags.names, places, message, classes, free, follows, self._read)
        if any(self._pack.skill(step.skill).instruction is None for step in plan):
            return ()
        return self._fitting(plan, prompt)

    def one_step(
        self,
        tags: TokenTags | None,
        classes: Mapping[str, float],
        mix: Mapping[str, float],
        prompt: PreparedPrompt,
    ) -> tuple[Step, ...]:
        """Ask one skill in its own words where they serve better than the conversation.

        In a conversation a skill with labels is asked about the last message alone if that has a text of its own:
        with the earlier turns before it, it tends to repeat its last label (docs/blending.md). In a first message a
        skill with ``own_words`` is asked about the text if that is sure.

        Args:
            tags: of the prompt's tokens; None if the gate has none.
            classes: the gate's probability by skill, and of the base.
            mix: the mix that it chose.
            prompt: the prompt that was read.

        Returns:
            One step; none if the conversation is answered as a whole.
        """
        if tags is None or TEXT not in tags.names or len(mix) != 1:
            return ()
        skill, roles = self._pack.skill(next(iter(mix))), [message["role"] for message in prompt.messages]
        follows_up = bool(skill.labels) and "assistant" in roles
        own_words = skill.own_words and roles.count("user") == 1
        if skill.instruction is None or not (follows_up or own_words):
            return ()
        message, places = _last_message(tags, prompt, self._vocabulary)
        span: Span | None = None
        if follows_up and _has_text(tags, places):
            span = 0, len(message)
        elif own_words:
            span = _sure_text(tags, places, message, classes, skill.name)
        return self._fitting((Step(skill.name, message[slice(*span)], span),), prompt) if span else ()

    def _fitting(self, plan: tuple[Step, ...], prompt: PreparedPrompt) -> tuple[Step, ...]:
        """The steps if each one's prompt fits the context; an answer that a step works on is not known yet."""
        prompts = StepPrompts(prompt, plan, self._pack, self._vocabulary)
        return plan if all(len(prompts.of(i, "")) < self._n_ctx for i in range(len(plan))) else ()


def _has_text(tags: TokenTags, places: Sequence[Span | None]) -> bool:
    """Whether the last message has a text of its own."""
    inside = np.asarray([place is not None for place in places])
    return bool(tags.probabilities[inside, tags.names.index(TEXT)].sum() >= TEXT_TOKENS)


def _sure_text(
    tags: TokenTags,
    places: Sequence[Span | None],
    message: str,
    classes: Mapping[str, float],
    skill: str,
) -> Span | None:
    """Where the text of a message for one skill alone is; None if that is not sure."""
    units = units_of(np.asarray(tags.probabilities, np.float64), places, message)
    found = read_message(units, tags.names, message, 1)
    if found is None or not found.is_whole or {name for name, _ in found.asks(classes)} != {skill}:
        return None
    return found.texts[0]


def _last_message(
    tags: TokenTags, prompt: PreparedPrompt, vocabulary: Vocabulary
) -> tuple[str, list[Span | None]]:
    """Return the last message, and for each tagged token its characters in it."""
    message = prompt.messages[-1]["content"]
    return message, places_of(tags.tokens, tags.first, prompt.contents, vocabulary.piece, message)


class StepPrompts:
    """The prompt of each step: the request itself, or with a plan a conversation of its own.

    Args:
        prompt: the request.
        plan: its steps; none if all mixes answer the whole request.
        pack: the pack whose skills the plan names.
        vocabulary: vocabulary of the base.
    """

    def __init__(
        self, prompt: PreparedPrompt, plan: Sequence[Step], pack: Pack, vocabulary: Vocabulary
    ) -> None:
        self.request, self._plan, self._vocabulary = prompt, plan, vocabulary
        self._instructions = [pack.skill(step.skill).instruction or "{input}" for step in plan]
        self._system: list[Message] = [one for one in prompt.messages if one["role"] == "system"]

    def of(self, number: int, before: str) -> list[int]:
        """Tokens of a step's prompt.

        Args:
            number: the step, from 0.
            before: the answer of the step before; a step that works on it falls back to the text if it is blank.
        """
        if not self._plan:
            return self.request.tokens
        step = self._plan[number]
        text = before if step.on_answer and before.strip() else step.text
        asked = {"role": "user", "content": fill(self._instructions[number], text)}
        return self._vocabulary.chat([*self._system, asked])


def answer_fields(answers: Sequence[str], step_labels: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the JSON fields on the parts of an answer.

    Args:
        answers: text of each mix that answered.
        step_labels: see `label_fields`.

    Returns:
        ``answers`` if several mixes answered in turn, and the fields on labels.
    """
    return {**({"answers": list(answers)} if len(answers) > 1 else {}), **label_fields(step_labels)}
