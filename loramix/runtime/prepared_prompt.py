"""A validated, tokenized prompt, shared by routing and answering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loramix.errors import InvalidPrompt
from loramix.models.early_head import EarlyHead
from loramix.models.gate_file import Gate
from loramix.models.gate_window import window
from loramix.prompts import Message, as_messages
from loramix.runtime.llama.vocabulary import Vocabulary


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
        tokens = vocabulary.chat(messages)
        if len(tokens) >= n_ctx:
            raise InvalidPrompt(
                f"the prompt has {len(tokens)} tokens and the context holds {n_ctx}: "
                f"shorten it, or give --ctx {2 * len(tokens)} (the base reads at most {n_ctx_train})."
            )
        if gate is None:
            return cls(tokens, [], (), tuple(messages))
        read = window(messages) if isinstance(gate, EarlyHead) else messages[-1:]
        routed = tokens if read == messages else vocabulary.chat(read)
        return cls(tokens, routed, tuple(message["content"] for message in read), tuple(messages))
