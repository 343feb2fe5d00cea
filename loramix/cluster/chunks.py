"""Splits files into chunks of rows, the unit that a worker answers, writes as one file, and that a resume skips.

A chunk's name follows from its file and its place in it alone, so that a chunk that is answered twice is the same
file.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from loramix.errors import InvalidData, NotFound, UsageError
from loramix.formats.tables import Kind, kind_of, parquet_schema, read_rows

ROWS = 128
"""Rows of a chunk: what a killed worker loses, a minute's work at most."""
MAX_CHARACTERS = 8_000_000
"""Text of a chunk; with long rows it has fewer of them, so that chunks fit into Ray's shared memory."""
_GLOB = re.compile(r"[*?\[]")
_DIGITS = 7  # of a chunk's number, so that names sort in its order
PlainRow = tuple[int, dict[str, Any] | str]
"""A row's number, and the row or why it cannot be read."""


@dataclass(frozen=True)
class SourceFile:
    """A file of prompts: path on its file system, name under the source, and its state, which a resume compares."""

    path: str
    name: str
    state: str

    @property
    def chunk_prefix(self) -> str:
        """Beginning of the names of its chunks; sorted, these are in the order of the files' rows."""
        stem = re.sub(r"[^A-Za-z0-9.-]+", "-", PurePosixPath(self.name).name.split(".")[0]).strip("-.")[:40]
        return f"{stem or 'rows'}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"

    def chunk_name(self, number: int) -> str:
        """Return the name of a chunk, counted from 0, and of its file without the suffix."""
        return f"{self.chunk_prefix}-{number:0{_DIGITS}}"

    def chunk_numbers(self, names: Iterable[str]) -> set[int]:
        """Return the numbers of the chunks whose files are among some names."""
        start = f"{self.chunk_prefix}-"
        return {int(name[len(start) :][:_DIGITS]) for name in names if name.startswith(start)}


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a file, with the error in place of a row that cannot be read."""

    name: str
    rows: list[PlainRow]
    schema: Any
    """Arrow schema of a Parquet file."""


def file_system(place: str) -> tuple[Any, str]:
    """Return the file system of a path or URI, and the path on it.

    Raises:
        UsageError: a URI of a scheme that pyarrow does not know, or that lacks its settings.
    """
    import pyarrow as pa
    from pyarrow import fs

    try:
        if "://" in place:
            found, path = fs.FileSystem.from_uri(place)
        else:
            found, path = fs.LocalFileSystem(), Path(place).absolute().as_posix()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UsageError(f"{place} cannot be used: {error}.") from None
    return found, path.rstrip("/")


def find_files(source: str) -> list[SourceFile]:
    """Find the files of a source, sorted by name.

    Args:
        source: a file, a directory, or a glob, as a path or as a URI such as ``s3://bucket/reviews/*.csv``. Of a
            directory and below it, files named as JSONL, CSV or Parquet count; names that begin with ``_`` or ``.``
            do not.

    Raises:
        NotFound: there are none.
    """
    from pyarrow import fs

    system, path = file_system(source)
    if special := _GLOB.search(path):
        fixed = path[: special.start()].rpartition("/")[0]
        infos = system.get_file_info(fs.FileSelector(fixed or "/", recursive=True, allow_not_found=True))
        infos = [
            i for i in infos if fnmatch.fnmatchcase(i.path, path) and i.path.count("/") == path.count("/")
        ]
        root = fixed
    elif (info := system.get_file_info(path)).type == fs.FileType.Directory:
        infos = system.get_file_info(fs.FileSelector(path, recursive=True))
        root = path
        infos = [i for i in infos if kind_of(i.path) and not re.search(r"/[._]", i.path[len(root) :])]
    else:
        infos, root = [info], path.rpartition("/")[0]
    files = [
        SourceFile(i.path, i.path[len(root) :].lstrip("/"), f"{i.size} bytes, {i.mtime}")
        for i in infos
        if i.type == fs.FileType.File
    ]
    if not files:
        raise NotFound(f"no file at {source}; name JSONL, CSV or Parquet files, a directory or a glob.")
    return sorted(files, key=lambda file: file.name)


def read_chunks(
    source: str, file: SourceFile, column: str, rows_per_chunk: int, done: set[int]
) -> Iterator[Chunk]:
    """Yield the chunks of a file that are not done.

    Args:
        source: see `find_files`; says the file system.
        file: the file.
        column: column of the prompt.
        rows_per_chunk: rows of a chunk.
        done: numbers of the chunks to leave out.

    Raises:
        InvalidData: see `read_rows`.
    """
    system, _ = file_system(source)
    kind: Kind = kind_of(file.path) or "jsonl"
    schema = None
    if kind == "parquet":
        with system.open_input_file(file.path) as stream:
            schema = parquet_schema(stream, file.name)
    opened = system.open_input_file if kind == "parquet" else system.open_input_stream
    options = {} if kind == "parquet" else {"compression": None}  # gzip is known by its content
    with opened(file.path, **options) as stream:
        rows = read_rows(stream, file.name, kind, column)
        plain = ((n, str(row) if isinstance(row, InvalidData) else row) for n, row in rows)
        for number, found in enumerate(_groups(plain, rows_per_chunk)):
            if number not in done:
                yield Chunk(file.chunk_name(number), found, schema)


def _groups(rows: Iterable[PlainRow], most: int) -> Iterator[list[PlainRow]]:
    group: list[PlainRow] = []
    size = 0
    for row in rows:
        group.append(row)
        size += len(str(row[1]))
        if len(group) == most or size > MAX_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group
