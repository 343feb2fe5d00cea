"""Additional tokens that end an answer, as listed in a GGUF base's metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable

from loramix.errors import InvalidArtifact

END_TOKENS = "loramix.end_token_ids"
"""GGUF key: ids as text with commas. llama.cpp has keys for three end tokens, and shows no arrays."""
_MOST = 64


def end_tokens_text(ids: Iterable[int]) -> str:
    """The key's value."""
    return ",".join(map(str, ids))


def parse_end_tokens(text: str, n_vocab: int, base: str) -> frozenset[int]:
    """Ids that a base lists; none for an empty text.

    Args:
        text: the key's value.
        n_vocab: tokens of the vocabulary.
        base: for messages.

    Raises:
        InvalidArtifact: not ids with commas, or more than the vocabulary has.
    """
    if not re.fullmatch(rf"([0-9]{{1,9}}(,[0-9]{{1,9}}){{0,{_MOST - 1}}})?", text):
        raise InvalidArtifact(
            f"{base}: {END_TOKENS} is no list of token ids with commas; convert the base again."
        )
    ids = frozenset(int(number) for number in text.split(",") if number)
    if ids and max(ids) >= n_vocab:
        raise InvalidArtifact(
            f"{base}: {END_TOKENS} names token {max(ids)}, the vocabulary has {n_vocab}; convert the base again."
        )
    return ids
