"""Every error a user can meet, in one tree.

LoramixError                 exit 1  HTTP 500
├── UsageError               exit 2  HTTP 400   an argument that cannot be meant
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
└── NativeError              exit 1  HTTP 500   llama.cpp refused or failed
    └── Interrupted          exit 1  HTTP 499   what it computed was not wanted any more

A message is one sentence or two: what was found, what is needed, and the command that mends it.
"""

from __future__ import annotations


class LoramixError(Exception):
    """Base of all errors shown to a user without a traceback."""

    exit_code = 1
    http_status = 500


class UsageError(LoramixError):
    exit_code = 2
    http_status = 400


class UnknownSkill(UsageError):
    http_status = 404


class InvalidMix(UsageError):
    pass


class InvalidPrompt(LoramixError):
    http_status = 400


class InvalidArtifact(LoramixError):
    http_status = 422


class WrongBase(InvalidArtifact):
    pass


class InvalidRecipe(LoramixError):
    http_status = 422


class InvalidData(LoramixError):
    http_status = 422


class NotFound(LoramixError):
    http_status = 404


class Unsupported(LoramixError):
    http_status = 422


class SelfCheckFailed(LoramixError):
    pass


class MissingExtra(LoramixError):
    pass


class Busy(LoramixError):
    http_status = 409


class NoSpace(LoramixError):
    http_status = 507


class RequestFailed(LoramixError):
    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.http_status = status


class NativeError(LoramixError):
    pass


class Interrupted(NativeError):
    http_status = 499
