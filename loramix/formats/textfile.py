"""Reads text files of users: byte-order marks, UTF-16, gzip, line ends, and files of other formats.

Notepad, Excel and PowerShell write byte-order marks that are not part of the text. All code that reads such files
uses this module, so that all commands accept and reject the same files.
"""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from loramix.errors import InvalidData, LoramixError
from loramix.formats.sniff import HEAD, sniff

_GZIP = b"\x1f\x8b"
# UTF-32's mark begins with UTF-16's, so it is tested first
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_LONE_CR = re.compile(rb"\r(?!\n)")  # line ends of classic Mac OS
_NOT_TEXT = "save it as UTF-8 text"


def decode_text(data: bytes, name: str, error: type[LoramixError] = InvalidData) -> str:
    r"""Decode a user's text: UTF-8 with or without a byte-order mark, or UTF-16 or UTF-32 with one.

    Line ends become ``\n``.

    Args:
        data: content of the file.
        name: name of the file, for messages.
        error: type of the error to raise.

    Returns:
        The text without its mark.

    Raises:
        LoramixError: of type ``error``, if the data is not text; the message names the line of the first bad byte.
    """
    encoding, mark = _encoding(data[:4])
    try:
        text = data[mark:].decode(encoding)
    except UnicodeDecodeError as bad:
        line = data[mark : mark + bad.start].decode(encoding, "replace").count("\n") + 1
        raise _undecodable(name, line, bad, error) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path, error: type[LoramixError] = InvalidData, *, limit: int = 1 << 30) -> str:
    """Read a user's text file; see `decode_text`. Gzip is unpacked.

    Args:
        path: an existing file.
        error: type of the error to raise.
        limit: maximum size of the text in bytes.

    Raises:
        LoramixError: of type ``error``, if the file is not text or too long; the message names the kind of file.
        OSError: the system cannot read the file.
    """
    with _opened(path, error) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise error(f"{path} has more than {limit} bytes of text; give a shorter file.")
    if found := wrong_file(data):
        raise error(f"{path} cannot be read: {found}.")
    return decode_text(data, str(path), error)


def read_lines(path: Path, error: type[LoramixError] = InvalidData) -> Iterator[tuple[int, str]]:
    """Yield the lines of a user's text file one by one; see `decode_text`. Gzip is unpacked.

    Args:
        path: an existing file.
        error: type of the error to raise.

    Yields:
        Line numbers from 1 with the lines, without their ends.

    Raises:
        LoramixError: of type ``error``; see `read_text`.
        OSError: the system cannot read the file.
    """
    for number, line in utf8_lines(path, error):
        try:
            yield number, line.decode().rstrip("\r\n")
        except UnicodeDecodeError as bad:
            raise _undecodable(str(path), number, bad, error) from None


def utf8_lines(
    path: Path | IO[bytes], error: type[LoramixError] = InvalidData, *, name: str | None = None
) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a text file as UTF-8 bytes, including invalid ones, for readers that skip bad lines.

    Args:
        path: an existing file, or an open one, which is left open.
        error: type of the error to raise for another kind of file, or for UTF-16 that cannot be decoded.
        name: name of an open file, for messages.

    Yields:
        Line numbers from 1 with the lines; their ends are kept.
    """
    name = name or str(path)
    with _opened(path, error, name) as file:
        head = file.peek(HEAD)[:HEAD]
        if found := wrong_file(head):
            raise error(f"{name} cannot be read: {found}.")
        encoding, mark = _encoding(head[:4])
        file.read(mark)
        number = 0
        try:
            for whole in file if encoding == "utf-8" else _encoded(file, encoding):
                for line in _LONE_CR.split(whole):
                    number += 1
                    yield number, line
        except UnicodeDecodeError as bad:
            raise _undecodable(name, number + 1, bad, error) from None


def wrong_file(head: bytes) -> str:
    """Explain what a file is if it is not text, e.g. a Git LFS pointer or an archive; empty if it is text.

    Args:
        head: the file's first bytes; an empty file is text.
    """
    head = head[:HEAD]
    if not head or (head.lstrip()[:1] in (b"{", b"[") and b"\0" not in head):
        return ""
    if found := sniff(head):
        return str(found)
    if b"\0" not in head or _encoding(head[:4]) != ("utf-8", 0):
        return ""
    every_second = max(head[::2].count(0), head[1::2].count(0)) > len(head) // 5
    what = "UTF-16 text without a byte-order mark" if every_second else "binary, not text"
    return f"it is {what}: {_NOT_TEXT}"


def is_plain_utf8(path: Path) -> bool:
    """Whether a text file has no byte-order mark and is not compressed, so that libraries can read it."""
    with path.open("rb") as file:
        head = file.read(4)
    return _encoding(head) == ("utf-8", 0) and not head.startswith(_GZIP)


def has_lone_surrogate(text: str) -> bool:
    """Whether a text has a lone surrogate: half a character, or a byte that was not UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in text) if not text.isascii() else False


@contextmanager
def _opened(path: Path | IO[bytes], error: type[LoramixError], name: str | None = None) -> Iterator[Any]:
    """Open a file, or read an open one; gzip is unpacked, whatever the file's name."""
    with path.open("rb") if isinstance(path, Path) else nullcontext(_peekable(path)) as file:
        packed = file.peek(2)[:2] == _GZIP
        try:
            with io.BufferedReader(_unpacked(file)) if packed else nullcontext(file) as content:
                yield content
        except (gzip.BadGzipFile, EOFError, zlib.error) as bad:
            raise error(f"{name or path} is damaged gzip ({bad}); copy or compress it again.") from None


def _peekable(file: Any) -> io.BufferedReader:
    return file if isinstance(file, io.BufferedReader) else io.BufferedReader(file)


def _encoded(file: io.BufferedReader, encoding: str) -> Iterator[bytes]:
    """Yield the lines of a text in another encoding as UTF-8."""
    with io.TextIOWrapper(file, encoding, newline="") as text:
        for line in text:
            yield line.encode()


def _unpacked(file: IO[bytes]) -> gzip.GzipFile:
    return gzip.GzipFile(fileobj=file)


def _encoding(head: bytes) -> tuple[str, int]:
    """Return the name of the encoding and the length of its mark in bytes."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding, len(mark)
    return "utf-8", 0


def _undecodable(name: str, line: int, bad: UnicodeDecodeError, error: type[LoramixError]) -> LoramixError:
    if bad.encoding not in ("utf-8", "utf8"):
        return error(
            f"{name}, line {line} cannot be used: not {bad.encoding.upper()} text ({bad.reason}); {_NOT_TEXT}."
        )
    byte = bad.object[bad.start]
    return error(
        f"{name}, line {line} cannot be used: 0x{byte:02X} is not UTF-8 text (byte {bad.start}); {_NOT_TEXT}, "
        "e.g. with 'iconv -f WINDOWS-1252 -t UTF-8'."
    )
