"""Tokens of an answer to its text, one at a time."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from loramix.runtime.llama.vocabulary import Vocabulary


def visible_bytes(vocabulary: Vocabulary, token: int, *, first: bool) -> bytes:
    """A token's bytes in an answer; none of a token that ends one.

    SentencePiece puts a space before every text when it is tokenized: it is no part of the answer.

    Args:
        vocabulary: the base's.
        token: its id.
        first: whether nothing of the answer is before it.
    """
    if vocabulary.is_end(token):
        return b""
    piece = vocabulary.piece(token)
    return piece.removeprefix(b" ") if first and vocabulary.space_prefix else piece


class Detokenizer:
    """The text of an answer's tokens as they come, whole characters each.

    Args:
        vocabulary: the base's.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary, self._first = vocabulary, True
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The characters that a token completes."""
        piece = visible_bytes(self._vocabulary, token, first=self._first)
        self._first = self._first and not self._vocabulary.piece(token)
        return self._decoder.decode(piece)


def detokenize(vocabulary: Vocabulary, tokens: Iterable[int]) -> str:
    """The text of a whole answer; a character that is not whole at its end is left out."""
    return "".join(map(Detokenizer(vocabulary).add, tokens))
