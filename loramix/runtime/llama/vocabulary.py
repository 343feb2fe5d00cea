"""A base's vocabulary: tokenizes text and conversations, and knows the tokens that end an answer.

Shared by training, evaluation and serving.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from loramix.errors import InvalidArtifact, InvalidPrompt
from loramix.prompts import Message
from loramix.runtime.llama.native import C
from loramix.templates.chat_template import ChatTemplate, Segment, usable_template
from loramix.templates.end_tokens import END_TOKENS, parse_end_tokens
from loramix.templates.normalizer import NORMALIZER, normalized, normalizer_of

_NAMED = {  # GGUF's keys by the names that transformers gives a template
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}
_UNKNOWN, _CONTROL, _USER_DEFINED, _LSTRIP = 1, 8, 16, 128  # llama_token_attr


class Vocabulary:
    """The tokens of a loaded model.

    Args:
        pointer: llama.cpp's model, owned by the caller.
        name: name of the base for messages.
    """

    def __init__(self, pointer: Any, name: str) -> None:
        self._model, self._base = pointer, name
        self.vocab = C.llama_model_get_vocab(pointer)
        self.n_vocab = int(C.llama_vocab_n_tokens(self.vocab))
        self.bos = int(C.llama_vocab_bos(self.vocab))
        self.eos = int(C.llama_vocab_eos(self.vocab))
        self.add_bos = bool(C.llama_vocab_get_add_bos(self.vocab))
        template = C.llama_model_chat_template(pointer, None)
        self.chat_template = template.decode("utf-8", "replace") if template else ""

    @cached_property
    def template(self) -> ChatTemplate:
        """The base's chat template.

        Raises:
            InvalidArtifact: the base has no chat template, or an unusable one.
        """
        return usable_template(self.chat_template, self.named_tokens, self._base)

    @cached_property
    def named_tokens(self) -> dict[str, str]:
        """Texts of special tokens by their names in chat templates, for those that the base defines."""
        found = {name: self._value(f"tokenizer.ggml.{key}") for name, key in _NAMED.items()}
        return {
            name: self.text(int(value))
            for name, value in found.items()
            if value.isdecimal() and int(value) < self.n_vocab
        }

    @cached_property
    def _attributes(self) -> list[int]:
        return [int(C.llama_vocab_get_attr(self.vocab, i)) for i in range(self.n_vocab)]

    @cached_property
    def controls(self) -> tuple[str, ...]:
        """Texts that are one token in the template's output, and plain text in the user's input."""
        special = (i for i, kind in enumerate(self._attributes) if kind & (_CONTROL | _UNKNOWN))
        return tuple(text for i in special if (text := self.text(i)).strip()) + self._template_tokens

    @cached_property
    def _template_tokens(self) -> tuple[str, ...]:
        """User-defined tokens that the template writes; llama.cpp would also find them in the user's text."""
        added = (self.text(i) for i, kind in enumerate(self._attributes) if kind & _USER_DEFINED)
        try:
            return tuple(text for text in added if len(text) > 1 and self.template.writes(text))
        except InvalidArtifact:
            return ()

    @cached_property
    def boundaries(self) -> dict[int, str]:
        """Control tokens, id to text, at which a text can be cut and its parts tokenized alone, with the same ids."""
        found = (i for i, kind in enumerate(self._attributes) if kind & _CONTROL and not kind & _LSTRIP)
        return {i: text for i in found if (text := self.text(i)).strip()}

    @cached_property
    def ends(self) -> frozenset[int]:
        """All tokens that end an answer: those known to llama.cpp, listed by the base, or written by the template.

        Raises:
            InvalidArtifact: the base's list is invalid.
        """
        known = {i for i in range(self.n_vocab) if C.llama_vocab_is_eog(self.vocab, i)}
        known |= parse_end_tokens(self._value(END_TOKENS), self.n_vocab, self._base)
        return frozenset(known | {self._turn_end} - {-1})

    @cached_property
    def unknown_ends(self) -> frozenset[int]:
        """Tokens of `ends` that llama.cpp treats as text."""
        return frozenset(i for i in self.ends if not C.llama_vocab_is_eog(self.vocab, i))

    @cached_property
    def _turn_end(self) -> int:
        """The special token that the template writes after an answer, or -1."""
        try:
            rest = self.template.after_answer()
        except InvalidArtifact:
            return -1
        for token in self.tokenize(rest.lstrip(), special=True):
            if self._attributes[token] & (_CONTROL | _USER_DEFINED) and self.text(token).strip():
                return token
            if self.piece(token).strip():  # text of the next turn
                break
        return -1

    @cached_property
    def eot(self) -> int:
        """The token that ends answers in training: the template's, else the base's end-of-sequence token."""
        # llama.cpp guesses the end-of-turn token by name and can miss the template's
        if self._turn_end >= 0:
            return self._turn_end
        return self.eos if self.eos >= 0 else int(C.llama_vocab_eot(self.vocab))

    def is_end(self, token: int) -> bool:
        """Whether a token ends an answer."""
        return token in self.ends

    def text(self, token: int) -> str:
        """Return a token's text in the vocabulary."""
        raw = C.llama_vocab_get_text(self.vocab, token)
        return raw.decode("utf-8", "replace") if raw else ""

    def piece(self, token: int) -> bytes:
        """Return a token's bytes in the output; empty for control tokens."""
        buffer = ctypes.create_string_buffer(64)
        count = C.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, False)
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = C.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[: max(count, 0)]

    @cached_property
    def space_prefix(self) -> bool:
        """Whether the tokenizer puts a space before each text, as SentencePiece does."""
        return b"".join(map(self.piece, self._ids("a", False))) == b" a"

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Apply the chat template and tokenize a conversation; the answer's header comes last.

        Args:
            messages: validated messages, see `loramix.prompts.as_messages`.

        Raises:
            InvalidArtifact, InvalidPrompt: see `ChatTemplate.segments`.
        """
        return self.with_bos(self.tokenize(self.template.segments(messages, self.controls)))

    def with_bos(self, tokens: list[int]) -> list[int]:
        """Prepend the beginning-of-sequence token if the vocabulary requires it and it is missing."""
        wanted = self.add_bos and self.bos >= 0 and tokens[:1] != [self.bos]
        return [self.bos, *tokens] if wanted else tokens

    def tokenize(self, segments: Sequence[Segment] | str, *, special: bool = False) -> list[int]:
        """Tokenize text, or the segments of a rendered conversation.

        Args:
            segments: plain text, or (text, whether to parse special tokens) pairs in order.
            special: for plain text, whether to parse special tokens.
        """
        if isinstance(segments, str):
            segments = [(segments, special)]
        tokens: list[int] = []
        for segment, segment_special in segments:
            for text, parse_special in self._normalized(segment, segment_special):
                for part in [text] if parse_special else self._split_template_tokens(text):
                    after_special = bool(tokens) and bool(
                        self._attributes[tokens[-1]] & (_CONTROL | _UNKNOWN | _USER_DEFINED)
                    )
                    tokens += self._ids(part, parse_special, continues=bool(tokens) and not after_special)
        return tokens

    def _normalized(self, text: str, parse_special: bool) -> list[Segment]:
        """Normalize a text as the base does; special tokens are split off first and stay unchanged."""
        if normalized(text, self._normalizer) == text:
            return [(text, parse_special)]
        # normalized text must not become a special token, nor combine with one before it
        parts = (self._specials if parse_special else self._text_tokens).split(text)
        found = [
            (part, parse_special) if i % 2 else (normalized(part, self._normalizer), False)
            for i, part in enumerate(parts)
        ]
        return [segment for segment in found if segment[0]]

    @cached_property
    def _normalizer(self) -> str:
        """The name of the base's normalizer.

        Raises:
            InvalidArtifact: the normalizer is not supported.
        """
        return normalizer_of(self._value(NORMALIZER), self._value("tokenizer.ggml.pre"), self._base)

    @cached_property
    def _specials(self) -> re.Pattern[str]:
        """Matches each token that is split off before pretokenization, as a group."""
        return self._token_pattern(_CONTROL | _UNKNOWN | _USER_DEFINED)

    @cached_property
    def _text_tokens(self) -> re.Pattern[str]:
        """Matches the tokens that are also split off in plain text."""
        return self._token_pattern(_USER_DEFINED)

    def _token_pattern(self, kinds: int) -> re.Pattern[str]:
        texts = {self.text(i) for i, kind in enumerate(self._attributes) if kind & kinds} - {""}
        longest = sorted(texts, key=lambda text: (-len(text), text))
        return re.compile(f"({'|'.join(map(re.escape, longest)) or '(?!)'})")

    def _split_template_tokens(self, text: str) -> list[str]:
        """Split plain text within each template token, so that llama.cpp does not find the token."""
        if not self._template_tokens:
            return [text]
        pattern = "|".join(map(re.escape, sorted(self._template_tokens, key=len, reverse=True)))
        cuts = [0, *(found.start() + 1 for found in re.finditer(f"(?={pattern})", text)), len(text)]
        return [text[a:b] for a, b in pairwise(cuts) if a < b]

    def _ids(self, text: str, parse_special: bool, *, continues: bool = False) -> list[int]:
        """Tokenize a text; without SentencePiece's space if it continues a previous text."""
        if continues and self.space_prefix:
            line = self._ids("\n", False)
            ids = self._ids("\n" + text, parse_special)
            if ids[: len(line)] == line:
                return ids[len(line) :]
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 8
        buffer = (C.llama_token * room)()
        count = C.llama_tokenize(self.vocab, raw, len(raw), buffer, room, False, parse_special)
        if count < 0:
            raise InvalidPrompt("the prompt cannot be tokenized; shorten it.")
        return list(buffer[:count])

    def _value(self, key: str) -> str:
        """Return a metadata value as text; empty if it is missing."""
        buffer = ctypes.create_string_buffer(1024)
        count = C.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if count >= 0 else ""
