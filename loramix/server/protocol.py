"""Messages between server and worker: msgpack, each preceded by its length in four bytes, big-endian.

The records hold only numbers and texts, so decoding never executes code.
"""

from __future__ import annotations

import os
import struct
from typing import Any, BinaryIO

import msgspec

from loramix.defaults import N_CELLS, N_CTX, PARALLEL, SERVER_CONTEXTS
from loramix.runtime.options import GenerationOptions

LENGTH = struct.Struct(">I")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings with which the worker opens its engine."""

    pack: str
    n_ctx: int = N_CTX
    n_threads: int | None = None
    contexts: int = SERVER_CONTEXTS
    parallel: int = PARALLEL
    """Largest number of answers in a batch."""
    n_cells: int = N_CELLS
    """KV cells that the answers of a batch share."""


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    number: int
    """Number of the request; 0 if the message belongs to none."""


class Answer(_Message, frozen=True, kw_only=True):
    """Answer a conversation; see `Engine.stream`."""

    messages: list[dict[str, str]]
    options: GenerationOptions
    buffered: bool = False
    """The client does not stream: everything after the first piece is sent at the end."""
    explain: bool = False
    """Measure the contributions of the skills; see `loramix.runtime.contributions`."""


class Route(_Message, frozen=True, kw_only=True):
    """Choose the mix without answering."""

    messages: list[dict[str, str]]
    policy: str


class Embed(_Message, frozen=True, kw_only=True):
    """Embed texts; see `Engine.embed`."""

    texts: list[str]
    truncate: bool = False


class Reload(_Message, frozen=True, kw_only=True):
    """Reload the pack from disk."""


class Cancel(_Message, frozen=True, kw_only=True):
    """Cancel the request with this number; its last reply is still sent."""


class Ready(_Message, frozen=True, kw_only=True):
    """The engine is open."""

    n_ctx: int
    n_ctx_train: int


class Started(_Message, frozen=True, kw_only=True):
    """The route is known."""

    route: dict[str, Any]
    timings: dict[str, float]


class Piece(_Message, frozen=True, kw_only=True):
    """A piece of the answer."""

    text: str
    scores: list[tuple[bytes, float, list[tuple[bytes, float]]]] = []
    """For each token since the last piece: its bytes, its log-probability, and the likeliest tokens there."""


class Ended(_Message, frozen=True, kw_only=True):
    """The answer is complete."""

    finish_reason: str
    """``stop`` or ``length``."""
    usage: dict[str, int]
    timings: dict[str, float]
    mixes: list[dict[str, float]] = []
    """The mix of each token; empty if all tokens have the same."""
    step_labels: list[dict[str, float]] = []
    """Probability by label for each mix that answered."""
    parts: list[str] = []
    """Text of each mix that answered."""
    contributions: dict[str, Any] | None = None
    """`Contributions.to_json`, if requested."""


class Result(_Message, frozen=True, kw_only=True):
    """Result of a request other than `Answer`."""

    value: Any
    tokens: int = 0


class Failed(_Message, frozen=True, kw_only=True):
    """The request failed."""

    message: str
    status: int
    """HTTP status."""


Request = Answer | Route | Embed | Reload | Cancel
Reply = Ready | Started | Piece | Ended | Result | Failed

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request)
_replies = msgspec.msgpack.Decoder(Reply)


def frame(message: Request | Reply) -> bytes:
    """Encode a message with its length."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


def read_reply(body: bytes) -> Reply:
    """Decode a reply, given without its length."""
    reply: Reply = _replies.decode(body)
    return reply


def read_request(file: BinaryIO) -> Request | None:
    """Read the next request; None at the end of the file."""
    head = file.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(head)
    body = file.read(size)
    if len(body) < size:
        return None
    request: Request = _requests.decode(body)
    return request


def write_all(descriptor: int, data: bytes) -> None:
    """Write all bytes to a file descriptor."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
