"""Opens a GGUF file for writing, closes it even after a failure, and reports a full disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from loramix.errors import NoSpace

_FULL = (None, errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # NumPy's own error for a short write has no errno


@contextmanager
def gguf_output(
    path: Path,
    architecture: str,
    *,
    name: str = "",
    fix: str = "free some space, or write to another disk with --out.",
) -> Iterator[Any]:
    """Open a ``gguf.GGUFWriter``; its file is closed when the block ends or fails.

    Args:
        path: file to write.
        architecture: value of the key ``general.architecture``.
        name: name of the file for the message; by default its path.
        fix: how to free space, for the message.

    Yields:
        The writer.

    Raises:
        NoSpace: the disk is full.
    """
    import gguf

    try:
        with closing(gguf.GGUFWriter(path, architecture)) as writer:
            yield writer
            _check_size(writer)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise NoSpace(
            f"{name or path} could not be written to the end ({error.strerror or error}); {fix}"
        ) from None


def _check_size(writer: Any) -> None:
    """Check that the file is as long as what was written: ``numpy.tofile`` ignores a failure of its last flush.

    Raises:
        OSError: it is shorter.
    """
    if writer.fout is None:  # nothing was written
        return
    writer.flush()
    (file,) = writer.fout
    if os.fstat(file.fileno()).st_size < file.tell():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
