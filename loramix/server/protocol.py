"""What the server and the worker say to each other: msgpack, each message behind its length in four bytes.

Plain records of numbers and texts: nothing that is received can run.
"""

from __future__ import annotations

import os
import struct
from typing import Any, BinaryIO

import msgspec

from loramix.defaults import N_CTX, SERVER_CONTEXTS
from loramix.runtime.options import GenerationOptions

LENGTH = struct.Struct(">I")


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How the worker opens its engine."""

    pack: str
    n_ctx: int = N_CTX
    n_threads: int | None = None
    contexts: int = SERVER_CONTEXTS
    parallel: int = 8
    """Most answers in one batch."""
    n_cells: int = 4096
    """Tokens of all answers in that batch together."""


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    number: int
    """Of the request; 0 where there is none."""


class Answer(_Message, frozen=True, kw_only=True):
    """Answer these messages; see `Engine.stream`."""

    messages: list[dict[str, str]]
    options: GenerationOptions
    whole: bool = False
    """Nobody reads along: what comes after the first piece is said at the end."""
    explain: bool = False
    """Measure what each skill added, before it ends; see `loramix.runtime.contributions`."""


class Route(_Message, frozen=True, kw_only=True):
    """Choose the mix, without answering."""

    messages: list[dict[str, str]]
    policy: str


class Embed(_Message, frozen=True, kw_only=True):
    """Vectors of texts; see `Engine.embed`."""

    texts: list[str]
    truncate: bool = False


class Reload(_Message, frozen=True, kw_only=True):
    """Take up the pack as it is on disk now."""


class Cancel(_Message, frozen=True, kw_only=True):
    """End that request; what ends it is still said."""


class Ready(_Message, frozen=True, kw_only=True):
    """The engine is open."""

    n_ctx: int
    n_ctx_train: int


class Started(_Message, frozen=True, kw_only=True):
    """The route is known."""

    route: dict[str, Any]
    timings: dict[str, float]


class Said(_Message, frozen=True, kw_only=True):
    """A piece of the answer."""

    text: str
    scores: list[tuple[bytes, float, list[tuple[bytes, float]]]] = []
    """Of each token since the last piece: its bytes, its log-probability, and the likeliest ones there."""


class Ended(_Message, frozen=True, kw_only=True):
    """The answer is whole."""

    finish_reason: str
    """``stop`` or ``length``."""
    usage: dict[str, int]
    timings: dict[str, float]
    mixes: list[dict[str, float]] = []
    """The mix of each token, where it changed on the way."""
    contributions: dict[str, Any] | None = None
    """`Contributions.to_json`, where it was asked for."""


class Result(_Message, frozen=True, kw_only=True):
    """What a request other than an answer gave."""

    value: Any
    tokens: int = 0


class Failed(_Message, frozen=True, kw_only=True):
    """It will not be answered."""

    message: str
    status: int
    """As HTTP counts."""


Request = Answer | Route | Embed | Reload | Cancel
Reply = Ready | Started | Said | Ended | Result | Failed

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request)
_replies = msgspec.msgpack.Decoder(Reply)


def frame(message: Request | Reply) -> bytes:
    """A message as it goes through the pipe."""
    body = _encoder.encode(message)
    return LENGTH.pack(len(body)) + body


def read_reply(body: bytes) -> Reply:
    """A reply without its length."""
    reply: Reply = _replies.decode(body)
    return reply


def read_request(file: BinaryIO) -> Request | None:
    """The next request, or None at the end."""
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
