"""Normalizes text before tokenization, as a GGUF base's metadata or pre-tokenizer requires.

llama.cpp does not normalize, so Loramix does, in training and serving.
"""

from __future__ import annotations

import unicodedata

from loramix.errors import InvalidArtifact

NORMALIZER = "loramix.templates.normalizer"
"""GGUF key: ``NFC``, or ``none`` where the pre-tokenizer would imply one."""
NFC, NONE = "NFC", "none"
_IMPLIED = {"qwen2": NFC}  # files of other converters have no key; Qwen's own tokenizers all use NFC


def normalizer_of(value: str, pre: str, base: str) -> str:
    """The normalizer of a base: `NFC` or `NONE`.

    Args:
        value: of the key `NORMALIZER`; empty where the file has none.
        pre: llama.cpp's name of its pre-tokenizer.
        base: for messages.

    Raises:
        InvalidArtifact: the file names another normalizer.
    """
    found = value or _IMPLIED.get(pre, NONE)
    if found not in (NFC, NONE):
        raise InvalidArtifact(
            f"{base}: {NORMALIZER} is {found[:40]!r}, known are {NFC} and {NONE}; convert the base again."
        )
    return found


def normalized(text: str, normalizer: str) -> str:
    """A text as the tokenizer's model was trained to see it.

    Args:
        text: any text without special tokens.
        normalizer: `NFC` or `NONE`.
    """
    return unicodedata.normalize("NFC", text) if normalizer == NFC else text
