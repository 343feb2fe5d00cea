"""Converts an answer's tokens to text incrementally."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from loramix.runtime.llama.vocabulary import Vocabulary


def visible_bytes(vocabulary: Vocabulary, token: int, *, first: bool) -> bytes:
    """Return a token's bytes in an answer; empty for a token that ends the answer.

    Removes the space that SentencePiece puts before each text from the first token.

    Args:
        vocabulary: vocabulary of the base.
        token: token id.
        first: whether it is the first token of the answer.
    """
    if vocabulary.is_end(token):
        return b""
    piece = vocabulary.piece(token)
    return piece.removeprefix(b" ") if first and vocabulary.space_prefix else piece


class Detokenizer:
    """Converts tokens to text one by one; buffers incomplete UTF-8 characters.

    Args:
        vocabulary: vocabulary of the base.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary, self._first = vocabulary, True
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """Return the characters that a token completes."""
        piece = visible_bytes(self._vocabulary, token, first=self._first)
        self._first = self._first and not self._vocabulary.piece(token)
        return self._decoder.decode(piece)


def detokenize(vocabulary: Vocabulary, tokens: Iterable[int]) -> str:
    """Return the text of a complete answer, without an incomplete character at its end."""
    return "".join(map(Detokenizer(vocabulary).add, tokens))
