"""Identifies a file by its first bytes, for error messages on unexpected files.

Checks signatures only; the reader of each format decides what it accepts.
"""

from __future__ import annotations

import re
from typing import NamedTuple

HEAD = 1024
"""Number of bytes that `sniff` needs."""
_LFS = b"version https://git-lfs"
_ANNEX = re.compile(rb"\S{0,200}/annex/objects/")
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_MARKUP = re.compile(rb"(?i)\s*(<!--.*?-->\s*)?<(!doctype\s+html|html|head|body)\b", re.DOTALL)
_XML = re.compile(rb"\s*<\?xml|\s*<Error>")
_SERVER_ERROR = re.compile(rb'\s*\{\s*"(error|errors|message|detail)"\s*:')
_TORCH_ZIP = re.compile(
    rb"PK\x03\x04.{26}[^/]{1,200}/(data\.pkl|\.format_version|\.data/|byteorder|version)", re.DOTALL
)
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"BZh", "a bzip2 archive"),
    (b"Rar!", "a RAR archive"),
)
_FORMATS: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"PAR1", "a Parquet file"),
    (b"%PDF", "a PDF"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
)
_OLD_GGML = (b"lmgg", b"fmgg", b"tjgg", b"algg")


class Found(NamedTuple):
    """The detected kind of an unexpected file, and the fix."""

    what: str
    """The kind with its article, e.g. ``a Git LFS pointer``."""
    advice: str
    """The fix, as an imperative without a full stop."""

    def __str__(self) -> str:
        return f"it is {self.what}: {self.advice}"


def sniff(head: bytes, size: int | None = None) -> Found | None:
    """Identify a file that has another format than its name says.

    Args:
        head: the file's first bytes, up to `HEAD` of them.
        size: the file's size in bytes, if known.

    Returns:
        The kind of file and the fix; None if the kind is unknown.
    """
    if not head or size == 0:
        return Found("empty (0 bytes)", "copy or download it again")
    if head.startswith(_LFS):
        return Found(
            "a Git LFS pointer, a text file in place of the content",
            "fetch the content with 'git lfs pull' in that repository, or download the file itself",
        )
    if _ANNEX.match(head):
        return Found(
            "a git-annex pointer, a text file in place of the content",
            "fetch the content with 'git annex get'",
        )
    if _MARKUP.match(head) or _XML.match(head):
        return Found(
            "a web page (HTML or XML), such as an error or login page of a server",
            "download the file itself, e.g. from a link with /resolve/ instead of /blob/",
        )
    if _SERVER_ERROR.match(head):
        return Found(
            "a server's error message (JSON)", "download the file again with an account that may read it"
        )
    if _PICKLE.match(head) or _TORCH_ZIP.match(head):
        return Found(
            "a pickle (a .bin, .pt or .ckpt of PyTorch), which can run code",
            "save the weights as safetensors, with save_pretrained or safetensors.torch.save_file",
        )
    for signature, what in _SIGNATURES:
        if head.startswith(signature):
            return Found(what, "unpack it, and give the file inside")
    if head.startswith(b"PK\x03\x04"):
        return Found(
            "a zip archive, which may be a pickle of PyTorch",
            "unpack it and give the file inside, or save weights as safetensors",
        )
    if head[257:262] == b"ustar":
        return Found("a tar archive", "unpack it, and give the file inside")
    if head[:4] in _OLD_GGML:
        return Found("a GGML file, the predecessor of GGUF", "get or convert the model as GGUF")
    for signature, what in _FORMATS:
        if head.startswith(signature):
            return Found(what, "give a file of the right format")
    if len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 2**32:
        return Found("a safetensors file", "give a file of the right format")
    if not head.strip(b"\0"):
        return Found(
            "only zeros, which an interrupted download or a full disk can leave", "download it again"
        )
    return None
