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
from loramix.runtime.gate_reader import Reading, TokenTags
from loramix.runtime.labels import label_fields
from loramix.runtime.llama.vocabulary import Vocabulary
from loramix.runtime.prepared_prompt import PreparedPrompt
from loramix.runtime.token_places import places_of

TEXT_TOKENS = 4.0
"""Tokens of text from which a message has a text of its own."""


def plan_of(
    reading: Reading,
    skills: Sequence[str],
    prompt: PreparedPrompt,
    pack: Pack,
    vocabulary: Vocabulary,
    n_ctx: int,
    read: Read,
) -> tuple[Step, ...]:
    """Split a prompt for two or three skills into steps.

    Args:
        reading: what the gate says of the prompt.
        skills: the gate's classes but the base.
        prompt: the prompt that was read.
        pack: the gate's pack.
        vocabulary: vocabulary of the base.
        n_ctx: maximum tokens of prompt and answer together.
        read: see `find_plan`.

    Returns:
        Two or three steps; none if the prompt is answered as one, a skill has no instruction of its own, or a
        step's prompt would not fit the context.
    """
    tags = reading.tags
    classes = dict(zip(skills, map(float, reading.probabilities), strict=False))
    if tags is None or not may_be_split(tags.names, classes):
        return ()
    message, places = _last_message(tags, prompt, vocabulary)
    free = [skill.name for skill in pack.skills if not skill.labels]
    follows = {skill.name: skill.follows for skill in pack.skills}
    plan = find_plan(tags.probabilities, tags.names, places, message, classes, free, follows, read)
    if any(pack.skill(step.skill).instruction is None for step in plan):
        return ()
    return plan if _fits(plan, prompt, pack, vocabulary, n_ctx) else ()


def follow_up(
    reading: Reading,
    mix: Mapping[str, float],
    prompt: PreparedPrompt,
    pack: Pack,
    vocabulary: Vocabulary,
    n_ctx: int,
) -> tuple[Step, ...]:
    """Ask a skill with labels about the last message alone if that message of a conversation has a text of its own.

    With the earlier turns before it, such a skill tends to repeat its last label (docs/blending.md).

    Args:
        reading: what the gate says of the prompt.
        mix: the mix that it chose.
        prompt: the prompt that was read.
        pack: the gate's pack.
        vocabulary: vocabulary of the base.
        n_ctx: maximum tokens of prompt and answer together.

    Returns:
        One step; none if the conversation is answered as a whole.
    """
    tags = reading.tags
    if tags is None or TEXT not in tags.names or len(mix) != 1:
        return ()
    skill = pack.skill(next(iter(mix)))
    answered = any(message["role"] == "assistant" for message in prompt.messages)
    if not answered or not skill.labels or skill.instruction is None:
        return ()
    message, places = _last_message(tags, prompt, vocabulary)
    inside = np.asarray([place is not None for place in places])
    if tags.probabilities[inside, tags.names.index(TEXT)].sum() < TEXT_TOKENS:
        return ()
    plan = (Step(skill.name, message, (0, len(message))),)
    return plan if _fits(plan, prompt, pack, vocabulary, n_ctx) else ()


def in_own_words(
    reading: Reading,
    skills: Sequence[str],
    mix: Mapping[str, float],
    prompt: PreparedPrompt,
    pack: Pack,
    vocabulary: Vocabulary,
    n_ctx: int,
) -> tuple[Step, ...]:
    """Ask a skill with ``own_words`` in its instruction, if the text of a first message is sure.

    Args:
        reading: what the gate says of the prompt.
        skills: the gate's classes but the base.
        mix: the mix that it chose.
        prompt: the prompt that was read.
        pack: the gate's pack.
        vocabulary: vocabulary of the base.
        n_ctx: maximum tokens of prompt and answer together.

    Returns:
        One step; none if the prompt is answered as it stands.
    """
    tags, users = reading.tags, [message for message in prompt.messages if message["role"] == "user"]
    if tags is None or TEXT not in tags.names or len(mix) != 1 or len(users) != 1:
        return ()
    skill = pack.skill(next(iter(mix)))
    if not skill.own_words or skill.instruction is None:
        return ()
    message, places = _last_message(tags, prompt, vocabulary)
    classes = dict(zip(skills, map(float, reading.probabilities), strict=False))
    found = read_message(
        units_of(np.asarray(tags.probabilities, np.float64), places, message), tags.names, message, 1
    )
    if found is None or not found.is_whole or {name for name, _ in found.asks(classes)} != {skill.name}:
        return ()
    plan = (Step(skill.name, message[slice(*found.texts[0])], found.texts[0]),)
    return plan if _fits(plan, prompt, pack, vocabulary, n_ctx) else ()


def _last_message(
    tags: TokenTags, prompt: PreparedPrompt, vocabulary: Vocabulary
) -> tuple[str, list[Span | None]]:
    """Return the last message, and for each tagged token its characters in it."""
    message = prompt.messages[-1]["content"]
    return message, places_of(tags.tokens, tags.first, prompt.contents, vocabulary.piece, message)


def _fits(
    plan: Sequence[Step], prompt: PreparedPrompt, pack: Pack, vocabulary: Vocabulary, n_ctx: int
) -> bool:
    """Whether each step's prompt fits the context; an answer that a step works on is not known yet."""
    prompts = StepPrompts(prompt, plan, pack, vocabulary)
    return all(len(prompts.of(i, "")) < n_ctx for i in range(len(plan)))


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
