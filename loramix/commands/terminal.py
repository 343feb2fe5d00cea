"""Standard streams, the current directory, and error messages for failed system calls."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from pathlib import Path

from loramix.errors import LoramixError, NotFound, UsageError
from loramix.formats.textfile import decode_text
from loramix.paths import cache_dir, data_dir

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ELOOP)
_NO_CWD = "the current directory no longer exists: change to another with cd."
_FULL = (errno.ENOSPC, errno.EDQUOT)


def prepare_streams() -> None:
    """Let stdout and stderr replace characters that they cannot encode, and stdin keep undecodable bytes."""
    for stream, errors in (
        (sys.stdout, "replace"),
        (sys.stderr, "backslashreplace"),
        (sys.stdin, "surrogateescape"),
    ):
        if isinstance(stream, io.TextIOWrapper):  # None if closed; tests may replace it
            with suppress(OSError):  # a stream that is already in use may not be reconfigured
                stream.reconfigure(errors=errors)


def need_stdin() -> None:
    """Check that stdin is open.

    Raises:
        UsageError: stdin is closed.
    """
    if sys.stdin is None:
        raise UsageError(
            "stdin is closed, so there is nothing to read; give the text as words, or open stdin."
        )


def read_stdin() -> str:
    """Read all of stdin and decode it with `loramix.formats.textfile.decode_text`.

    Raises:
        UsageError: stdin is closed or is not text.
    """
    need_stdin()
    return decode_text(sys.stdin.buffer.read(), "stdin", UsageError)


def drop_stdout() -> None:
    """Redirect stdout to the null device, after the reader of the pipe has closed it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, sys.__stdout__.fileno() if sys.__stdout__ is not None else 1)
    except (OSError, ValueError):  # a stream of a test, without a descriptor
        pass
    finally:
        os.close(nowhere)


def need_cwd() -> None:
    """Check that the current directory exists; PyTorch's libraries crash otherwise.

    Raises:
        NotFound: the current directory was deleted.
    """
    if not _has_cwd():
        raise NotFound(_NO_CWD)


def explain(error: OSError) -> str:
    """Describe a failed system call and its fix in one sentence.

    Args:
        error: the error; its file name, if any, is used in the message.
    """
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return f"the system refused{_where(error)}: {reason}; make room on the disk, or write to another."
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"too many files are open{_where(error)}: allow more with 'ulimit -n 4096'."
    if "temporary directory" in reason:
        return "no directory for temporary files can be written: set TMPDIR to one that can."
    if error.filename is None and not _has_cwd():
        return _NO_CWD
    advice = ""
    if error.errno in _REFUSED and isinstance(error.filename, str | bytes):
        advice = _advice(Path(os.fsdecode(error.filename)))
    return f"the system refused{_where(error)}: {reason}{advice}."


def _where(error: OSError) -> str:
    return f" {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes) else ""


def _has_cwd() -> bool:
    try:
        os.getcwd()  # noqa: PTH109  # Path.cwd() does the same
    except OSError:
        return False
    return True


def _advice(path: Path) -> str:
    """Return the setting that changes the location of a path."""
    for root, variable in ((cache_dir, "LORAMIX_CACHE"), (data_dir, "LORAMIX_DATA")):
        try:
            directory = root()
        except LoramixError:
            continue
        # the path may be a parent directory that could not be created
        if path.is_relative_to(directory) or directory.is_relative_to(path):
            return f"; set {variable} to a directory that can be written"
    if not path.is_absolute():
        if not _has_cwd():
            return f"; {_NO_CWD.rstrip('.')}"
        if not os.access(".", os.W_OK):
            return "; the current directory cannot be written: change to another, or name one with --out"
    return ""
