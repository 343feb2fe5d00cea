"""Writes rows as JSONL or Parquet, with the columns of the input kept beside those of the answers.

Parquet's types are those of the input's Parquet file; values of other inputs are text, and what is not text is JSON.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

from loramix.errors import UsageError
from loramix.formats.tables import Kind, kind_of, micro_schema, need_pyarrow

NUMBER = "line"
"""Column of a row's number."""
ANSWER_FIELDS = (
    "text",
    "mix",
    "reason",
    "steps",
    "finish_reason",
    "usage",
    "answers",
    "labels",
    "step_labels",
    "error",
)
"""Fields of an answer; in Parquet all are text, and what is not text is JSON."""


def output_kind(name: str) -> Kind:
    """Return the format of an output: Parquet if its name says so, else JSONL.

    Raises:
        UsageError: the name says CSV, which cannot hold an answer's fields.
    """
    kind = kind_of(name)
    if kind == "csv":
        raise UsageError(f"answers are written as .jsonl or .parquet; name the output so, not {name}.")
    return kind or "jsonl"


def kept_name(column: str) -> str:
    """Return the output's name of an input column: ``text``, whose name is taken, is called ``input_text``."""
    taken = re.sub("^(input_)*", "", column) in (NUMBER, *ANSWER_FIELDS)
    return f"input_{column}" if taken else column


def output_row(number: int, row: Mapping[str, Any] | Exception, answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of the output.

    Args:
        number: the row's number.
        row: the row of the input, or why it could not be read.
        answer: fields of the answer.
    """
    kept = {kept_name(column): value for column, value in row.items()} if isinstance(row, Mapping) else {}
    return {NUMBER: number, **kept, **answer}


def json_line(row: Mapping[str, Any]) -> bytes:
    """Return a row as a line of JSON: times in ISO 8601, NaN as null."""
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, default=_as_json)
        return text.encode() + b"\n"
    except ValueError:  # NaN or infinite, or half a character
        return json.dumps(_finite(row), default=_as_json).encode() + b"\n"


def write_rows(
    file: IO[bytes], kind: Kind, rows: Iterable[Mapping[str, Any]], columns: Iterable[str], schema: Any = None
) -> None:
    """Write rows.

    Args:
        file: an open file.
        kind: ``jsonl`` or ``parquet``.
        rows: results of `output_row`.
        columns: of Parquet, the columns of the input.
        schema: of Parquet, the Arrow schema of the input; by default all columns are text.
    """
    if kind == "jsonl":
        file.writelines(map(json_line, rows))
        return
    pa = need_pyarrow()
    types = {field.name: field.type for field in micro_schema(schema)} if schema is not None else {}
    fields = [(NUMBER, pa.int64())]
    fields += [(kept_name(name), types.get(name, pa.string())) for name in columns]
    fields += [(name, pa.string()) for name in ANSWER_FIELDS]
    target = pa.schema(fields)
    batch: list[Mapping[str, Any]] = []
    with pa.parquet.ParquetWriter(file, target) as writer:
        for row in rows:
            batch.append(row)
            if len(batch) == 4096:
                writer.write_table(_table(batch, target))
                batch = []
        if batch:
            writer.write_table(_table(batch, target))


def _table(rows: Sequence[Mapping[str, Any]], schema: Any) -> Any:
    pa = need_pyarrow()
    arrays = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        if pa.types.is_string(field.type):
            values = [_as_text(value) for value in values]
        arrays.append(pa.array(values, field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _as_text(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        return json_line(value)[:-1].decode()
    return value.encode(errors="replace").decode()  # half a character is no text in Parquet


def _as_json(value: Any) -> Any:
    """Value of a Parquet column that JSON does not have."""
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
