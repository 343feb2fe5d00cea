"""Normalizes text before tokenization, as a GGUF base's metadata or pre-tokenizer requires.

llama.cpp does not normalize, so Loramix does, in training and serving.
"""

from __future__ import annotations

import unicodedata

from loramix.errors import InvalidArtifact

NORMALIZER = "loramix.normalizer"
"""GGUF key: ``NFC``, or ``none`` if the pre-tokenizer would imply a normalizer."""
NFC, NONE = "NFC", "none"
_IMPLIED = {"qwen2": NFC}  # files of other converters lack the key; all of Qwen's tokenizers use NFC


def normalizer_of(value: str, pre: str, base: str) -> str:
    """Return the normalizer of a base: `NFC` or `NONE`.

    Args:
        value: value of the key `NORMALIZER`; empty if the file has none.
        pre: llama.cpp's name of the pre-tokenizer.
        base: name of the base, for messages.

    Raises:
        InvalidArtifact: the file names another normalizer.
    """
    found = value or _IMPLIED.get(pre, NONE)
    if found not in (NFC, NONE):
        raise InvalidArtifact(
            f"{base}: {NORMALIZER} is {found[:40]!r}, supported are {NFC} and {NONE}; convert the base again."
        )
    return found


def normalized(text: str, normalizer: str) -> str:
    """Normalize a text.

    Args:
        text: any text without special tokens.
        normalizer: `NFC` or `NONE`.
    """
    return unicodedata.normalize("NFC", text) if normalizer == NFC else text
