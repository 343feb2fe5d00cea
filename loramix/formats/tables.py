"""Reads rows of users' files: JSONL, CSV and Parquet. A row that cannot be read is an error in its place.

Knows nothing of prompts and answers. Parquet needs the optional package pyarrow.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import IO, Any, Literal

from loramix.errors import InvalidData, MissingExtra
from loramix.formats.textfile import has_lone_surrogate, utf8_lines

Kind = Literal["jsonl", "csv", "parquet"]
Row = tuple[int, dict[str, Any] | InvalidData]
"""Number from 1 (of CSV and Parquet without the header), and the row by column, or why it cannot be read."""

MAX_ROW = 1 << 20
MAX_DEPTH = 100
_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
_PARQUET_ROWS = 256  # read at once


def kind_of(name: str) -> Kind | None:
    """Return the format that a file's name says, gzip aside; None for an unknown suffix."""
    path = PurePath(name.lower().removesuffix(".gz"))
    return _KINDS.get(path.suffix)


def read_rows(file: IO[bytes], name: str, kind: Kind, column: str) -> Iterator[Row]:
    """Yield the rows of a file.

    Args:
        file: an open file; Parquet must be seekable.
        name: name of the file, for messages and, of CSV, for the separator: a tab for ``.tsv``.
        kind: format of the file.
        column: a column that is needed. A row of JSONL that lacks it is an error row.

    Yields:
        Row numbers with rows, see `Row`; blank lines are left out.

    Raises:
        InvalidData: the file is of another kind, or its header lacks the column.
        MissingExtra: pyarrow is not installed.
    """
    if kind == "jsonl":
        return _json_rows(file, name, column)
    if kind == "csv":
        return _csv_rows(file, name, column)
    return _parquet_rows(file, name, column)


def parquet_schema(file: IO[bytes], name: str) -> Any:
    """Return the Arrow schema of a Parquet file.

    Raises:
        InvalidData: it is no Parquet file.
        MissingExtra: pyarrow is not installed.
    """
    return _open_parquet(file, name).schema_arrow


def need_pyarrow() -> Any:
    """Return pyarrow with its Parquet module.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as _  # noqa: F401  # pa.parquet
    except ModuleNotFoundError:
        raise MissingExtra("Parquet files need pyarrow: pip install 'loramix[parquet]'.") from None
    return pa


def _json_rows(file: IO[bytes], name: str, column: str) -> Iterator[Row]:
    for number, line in utf8_lines(file, name=name):
        if line.strip():
            try:
                yield number, _json_row(number, line, column)
            except InvalidData as error:
                yield number, error


def _json_row(number: int, line: bytes, column: str) -> dict[str, Any]:
    if len(line) > MAX_ROW:
        raise InvalidData(f"line {number} has {len(line)} bytes; at most {MAX_ROW} are read.")
    try:
        found = json.loads(line.decode().removeprefix("\ufeff"))  # of files put behind each other
    except UnicodeDecodeError as error:
        raise InvalidData(f"line {number} is not UTF-8 text (byte 0x{line[error.start]:02X}).") from None
    except (ValueError, RecursionError) as error:
        raise InvalidData(f"line {number} is not JSON: {error}.") from None
    if not isinstance(found, dict) or column not in found:
        keys = ", ".join(map(repr, list(found)[:8])) if isinstance(found, dict) else type(found).__name__
        raise InvalidData(f"line {number} has no {column!r} (it has {keys}); give --column.")
    if _is_deep(found):
        raise InvalidData(f"line {number} is nested deeper than {MAX_DEPTH} levels.")
    return found


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.values()
            elif isinstance(one, list):
                inner += one
        if not inner:
            return False
        level = inner
    return True


def _csv_rows(file: IO[bytes], name: str, column: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_ROW)  # of the process; Python's own is 128 kB
    # bytes that are not UTF-8 become half characters, so that they cost one row only
    text = (line.decode(errors="surrogateescape") for _, line in utf8_lines(file, name=name))
    separator = "\t" if name.lower().removesuffix(".gz").endswith(".tsv") else ","
    reader = csv.reader(text, delimiter=separator, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise InvalidData(f"{name} has no readable header: {error}.") from None
    _check_columns(header, name, column)
    number = 0
    while True:
        number += 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, InvalidData(f"row {number} is not CSV: {error}.")
            continue
        if not fields:  # a blank line
            number -= 1
        elif len(fields) != len(header):
            yield (
                number,
                InvalidData(f"row {number} has {len(fields)} fields, the header has {len(header)} columns."),
            )
        elif has_lone_surrogate("".join(fields)):
            yield number, InvalidData(f"row {number} is not UTF-8 text.")
        else:
            yield number, dict(zip(header, fields, strict=True))


def _parquet_rows(file: IO[bytes], name: str, column: str) -> Iterator[Row]:
    pa = need_pyarrow()
    opened = _open_parquet(file, name)
    _check_columns(opened.schema_arrow.names, name, column)
    number = 0
    try:
        for batch in opened.iter_batches(batch_size=_PARQUET_ROWS):
            for row in batch.cast(micro_schema(batch.schema), safe=False).to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError) as error:
        raise InvalidData(f"{name} is damaged after row {number}: {error}; write it again.") from None


def micro_schema(schema: Any) -> Any:
    """Return an Arrow schema with microseconds for nanoseconds, which Python's own times do not have."""
    pa = need_pyarrow()
    for i, field in enumerate(schema):
        kind = field.type
        if pa.types.is_timestamp(kind) and kind.unit == "ns":
            schema = schema.set(i, field.with_type(pa.timestamp("us", kind.tz)))
        elif pa.types.is_time64(kind) and kind.unit == "ns":
            schema = schema.set(i, field.with_type(pa.time64("us")))
        elif pa.types.is_duration(kind) and kind.unit == "ns":
            schema = schema.set(i, field.with_type(pa.duration("us")))
    return schema


def _open_parquet(file: IO[bytes], name: str) -> Any:
    pa = need_pyarrow()
    try:
        return pa.parquet.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise InvalidData(f"{name} is not a Parquet file that can be read: {error}.") from None


def _check_columns(columns: Sequence[str], name: str, column: str) -> None:
    if column not in columns:
        shown = ", ".join(map(repr, columns[:8]))
        raise InvalidData(f"{name} has no column {column!r} (it has {shown or 'none'}); give --column.")
    if twice := next((one for one in columns if list(columns).count(one) > 1), None):
        raise InvalidData(f"{name} has two columns {twice!r}; rename one.")
