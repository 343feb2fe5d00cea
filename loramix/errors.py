"""The tree of all errors that Loramix raises for users.

LoramixError                 exit 1  HTTP 500
├── UsageError               exit 2  HTTP 400   an invalid argument
│   ├── UnknownSkill         exit 2  HTTP 404   a skill the pack does not have
│   └── InvalidMix           exit 2  HTTP 400   a scale that is negative, NaN, huge or unreadable
├── InvalidPrompt            exit 1  HTTP 400   empty, or longer than the context
├── InvalidArtifact          exit 1  HTTP 422   a GGUF, safetensors, gate or pack that must not be loaded
│   └── WrongBase            exit 1  HTTP 422   an adapter or pack made for another base
├── InvalidRecipe            exit 1  HTTP 422   a training recipe that cannot be read
├── InvalidData              exit 1  HTTP 422   a data row that cannot be read
├── NotFound                 exit 1  HTTP 404   a base, pack or file that is not there
├── Unsupported              exit 1  HTTP 422   a kind of adapter or base that Loramix cannot run
├── SelfCheckFailed          exit 1  HTTP 500   a converted file that does not do what its source does
├── MissingExtra             exit 1  HTTP 500   an optional package that is not installed
├── Busy                     exit 1  HTTP 409   another process holds the directory
├── NoSpace                  exit 1  HTTP 507   the disk or the memory cannot hold it
├── RequestFailed            exit 1  HTTP …     a request to the server, with the status that it gets
└── NativeError              exit 1  HTTP 500   a llama.cpp call failed
    └── Interrupted          exit 1  HTTP 499   a computation was stopped, its result is no longer needed

A message has one or two sentences: what was found, what is needed, and the command that fixes it.
"""

from __future__ import annotations

REFUSED = 3
"""Exit code of a child process that failed because of its input; the last line on stderr is the reason."""


class LoramixError(Exception):
    """Base of all errors shown to a user without a traceback."""

    exit_code = 1
    http_status = 500


class UsageError(LoramixError):
    """An invalid argument."""

    exit_code = 2
    http_status = 400


class UnknownSkill(UsageError):
    """A skill that the pack does not have."""

    http_status = 404


class InvalidMix(UsageError):
    """A scale that is negative, NaN, huge or unreadable."""


class InvalidPrompt(LoramixError):
    """A prompt that is empty, or longer than the context."""

    http_status = 400


class InvalidArtifact(LoramixError):
    """A GGUF, safetensors file, gate or pack that must not be loaded."""

    http_status = 422


class WrongBase(InvalidArtifact):
    """An adapter or pack made for another base."""


class InvalidRecipe(LoramixError):
    """A training recipe that cannot be read."""

    http_status = 422


class InvalidData(LoramixError):
    """A data row that cannot be read."""

    http_status = 422


class NotFound(LoramixError):
    """A base, pack or file that is not there."""

    http_status = 404


class Unsupported(LoramixError):
    """A kind of adapter or base that Loramix cannot run."""

    http_status = 422


class SelfCheckFailed(LoramixError):
    """A converted file whose results differ from its source."""


class MissingExtra(LoramixError):
    """An optional package that is not installed."""


class Busy(LoramixError):
    """Another process holds the directory."""

    http_status = 409


class NoSpace(LoramixError):
    """Not enough disk space or memory."""

    http_status = 507


class RequestFailed(LoramixError):
    """A request to the server failed.

    Args:
        message: one sentence for the client.
        status: HTTP status that the client gets.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.http_status = status


class NativeError(LoramixError):
    """A llama.cpp call failed."""


class Interrupted(NativeError):
    """A computation was stopped because its result is no longer wanted."""

    http_status = 499
