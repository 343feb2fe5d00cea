"""Additional tokens that end an answer, as listed in a GGUF base's metadata."""

from __future__ import annotations

import re
from collections.abc import Iterable

from loramix.errors import InvalidArtifact

END_TOKENS = "loramix.end_token_ids"
"""GGUF key: ids as comma-separated text, because llama.cpp has keys for only three and cannot read arrays."""
_MOST = 64


def end_tokens_text(ids: Iterable[int]) -> str:
    """Format ids as the key's value."""
    return ",".join(map(str, ids))


def parse_end_tokens(text: str, n_vocab: int, base: str) -> frozenset[int]:
    """Parse the ids that a base lists; empty for an empty text.

    Args:
        text: the key's value.
        n_vocab: number of tokens in the vocabulary.
        base: name of the base, for messages.

    Raises:
        InvalidArtifact: not comma-separated ids, or an id out of range.
    """
    if not re.fullmatch(rf"([0-9]{{1,9}}(,[0-9]{{1,9}}){{0,{_MOST - 1}}})?", text):
        raise InvalidArtifact(
            f"{base}: {END_TOKENS} is not a comma-separated list of token ids; convert the base again."
        )
    ids = frozenset(int(number) for number in text.split(",") if number)
    if ids and max(ids) >= n_vocab:
        raise InvalidArtifact(
            f"{base}: {END_TOKENS} names token {max(ids)}, the vocabulary has {n_vocab}; convert the base again."
        )
    return ids
