"""A strict reader of SentencePiece's ``tokenizer.model``: pieces with scores and kinds, and the algorithm.

The file is a protocol buffer (sentencepiece_model.proto). Only four fields are needed, so its wire format is parsed
here, and no native parser reads the untrusted bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from loramix.errors import InvalidArtifact
from loramix.formats.sniff import HEAD, sniff

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
MAX_PIECES = 2**20
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary."""

    text: str
    score: float
    kind: int
    """SentencePiece.Type, which has the same numbers as GGUF's token types."""


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """The part of a ``tokenizer.model`` that determines tokenization."""

    pieces: list[Piece]
    model_type: int
    add_dummy_prefix: bool
    """Whether a space is added before the text."""
    changes_text: bool
    """Whether the normalizer maps characters or removes spaces."""


def read_sentencepiece(data: bytes, name: str) -> SentencePieceModel:
    """Read a SentencePiece model.

    Args:
        data: content of the file.
        name: name of the file, for messages.

    Raises:
        InvalidArtifact: not a SentencePiece model, or scores that are not finite.
    """

    def bad(why: str) -> InvalidArtifact:
        return InvalidArtifact(f"{name} is not a usable SentencePiece model: {why}; download it again.")

    if wrong := sniff(data[:HEAD], len(data)):
        raise InvalidArtifact(f"{name} is not a usable SentencePiece model: {wrong}.")
    pieces: list[Piece] = []
    model_type, prefix, changes = UNIGRAM, True, True  # the format's defaults
    try:
        for field, value in _fields(data):
            if field == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif field == 2 and isinstance(value, bytes):  # TrainerSpec
                model_type = _last(value, 3, model_type)
            elif field == 3 and isinstance(value, bytes):  # NormalizerSpec
                prefix = bool(_last(value, 3, 1))
                mapped = any(number == 2 and content for number, content in _fields(value))
                changes = mapped or bool(_last(value, 4, 1))
            if len(pieces) > MAX_PIECES:
                raise bad(f"it has more than {MAX_PIECES} pieces")
    except (ValueError, struct.error) as error:
        raise bad(str(error)) from None
    if not pieces:
        raise bad("it has no pieces")
    return SentencePieceModel(pieces, model_type, prefix, changes)


def _piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, 1
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif field == 2 and isinstance(value, float):
            score = value
        elif field == 3 and isinstance(value, int):
            kind = value
    if not math.isfinite(score) or not 1 <= kind <= 6:
        raise ValueError(f"piece {text[:40]!r} has the score {score} and the kind {kind}")
    return Piece(text, score, kind)


def _last(data: bytes, field: int, default: int) -> int:
    values = [value for number, value in _fields(data) if number == field and isinstance(value, int)]
    return values[-1] if values else default


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Yield field numbers with their values: varints as int, 4 bytes as float, all others as bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield field, value
            continue
        if kind == _BYTES:
            length, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"field {field} has the unknown kind {kind}")
        if length > len(data) - at:
            raise ValueError(f"it ends inside field {field}")
        content = data[at : at + length]
        at += length
        yield field, struct.unpack("<f", content)[0] if kind == _FIXED32 else content


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("it ends inside a number")
        value |= (data[at] & 0x7F) << shift
        at += 1
        if not data[at - 1] & 0x80:
            return value, at
        shift += 7
