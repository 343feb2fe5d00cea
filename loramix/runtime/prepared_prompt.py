"""A validated, tokenized prompt, shared by routing and answering."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from loramix.errors import InvalidPrompt
from loramix.models.early_head import EarlyHead
from loramix.models.gate_file import Gate
from loramix.models.gate_window import window
from loramix.prompts import Message, as_messages
from loramix.runtime.llama.vocabulary import Vocabulary
from loramix.templates.chat_template import Segment


@dataclass(frozen=True)
class PreparedPrompt:
    """A conversation tokenized with the base's chat template; created by `of`."""

    tokens: list[int]
    """Ids of the whole conversation, ending with the answer's header."""
    routed: list[int]
    """Ids of the rendered last turns, which the gate reads, see `gate_window`; with a gate of the old format those of
    the last user message; none without a gate."""
    contents: tuple[str, ...] = ()
    """Texts of the messages in `routed`."""
    messages: tuple[Message, ...] = ()
    """The whole conversation."""

    @classmethod
    def of(
        cls,
        prompt: str | Sequence[Message],
        vocabulary: Vocabulary,
        n_ctx: int,
        n_ctx_train: int,
        gate: Gate | None,
    ) -> PreparedPrompt:
        """Validate and tokenize a prompt.

        Args:
            prompt: text, or OpenAI-style messages.
            vocabulary: vocabulary of the base.
            n_ctx: maximum tokens of prompt and answer together.
            n_ctx_train: maximum context of the base, for the error message.
            gate: the gate that will read it, or None.

        Raises:
            InvalidPrompt: empty, of an unknown role, or no shorter than the context.
        """
        messages = as_messages(prompt)
        whole = vocabulary.template.segments(messages, vocabulary.controls)
        ids = vocabulary.tokenize(whole)
        tokens = vocabulary.with_bos(ids)
        if len(tokens) >= n_ctx:
            raise InvalidPrompt(
                f"the prompt has {len(tokens)} tokens and the context holds {n_ctx}: "
                f"shorten it, or give --ctx {2 * len(tokens)} (the base reads at most {n_ctx_train})."
            )
        if gate is None:
            return cls(tokens, [], (), tuple(messages))
        read = window(messages) if isinstance(gate, EarlyHead) else messages[-1:]
        routed = tokens if read == messages else _window_tokens(read, vocabulary, whole, ids)
        return cls(tokens, routed, tuple(message["content"] for message in read), tuple(messages))


def _window_tokens(
    read: Sequence[Message], vocabulary: Vocabulary, whole: Sequence[Segment], ids: Sequence[int]
) -> list[int]:
    """Tokenize the messages that the gate reads; those that the whole prompt has uncut keep the ids they have there.

    Args:
        read: messages of the window.
        vocabulary: vocabulary of the base.
        whole: the rendered prompt.
        ids: its tokens, without an added beginning-of-sequence token.
    """
    segments = vocabulary.template.segments(read, vocabulary.controls)
    if len(whole) > 1 or len(segments) > 1:  # the text of a control token in a message is no boundary
        return vocabulary.with_bos(vocabulary.tokenize(segments))
    known = _known_runs(vocabulary, whole[0][0], ids)
    tokens: list[int] = []
    for run in _runs(vocabulary, segments[0][0]):
        tokens += known.get(run) or vocabulary.tokenize(run, special=True)
    return vocabulary.with_bos(tokens)


def _known_runs(vocabulary: Vocabulary, text: str, ids: Sequence[int]) -> dict[str, Sequence[int]]:
    """The tokens of each run of a text that begins with a control token; empty if its tokens have other boundaries."""
    cuts = [i for i, token in enumerate(ids) if token in vocabulary.boundaries]
    runs = _runs(vocabulary, text)[-len(cuts) :] if cuts else []
    texts = [vocabulary.boundaries[ids[i]] for i in cuts]
    if len(runs) != len(cuts) or not all(map(str.startswith, runs, texts)):
        return {}
    return {run: ids[start:end] for run, start, end in zip(runs, cuts, [*cuts, len(ids)][1:], strict=True)}


def _runs(vocabulary: Vocabulary, text: str) -> list[str]:
    """Split a rendered text before each control token."""
    tokens = sorted(vocabulary.boundaries.values(), key=len, reverse=True)
    pattern = "|".join(map(re.escape, tokens)) or "(?!)"
    cuts = [0, *(found.start() for found in re.finditer(pattern, text)), len(text)]
    return [text[start:end] for start, end in pairwise(cuts) if start < end]
