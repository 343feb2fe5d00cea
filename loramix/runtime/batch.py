"""Answers a file of prompts (JSONL, CSV or Parquet), several prompts of a mix at once, and resumes after a kill.

Answers are appended to ``OUT.part`` as they finish, each with its row's number. A killed run resumes from this
partial output when it is called again. The complete output is written atomically, in input order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from loramix.defaults import PARALLEL
from loramix.errors import Busy, NotFound, UsageError
from loramix.formats.table_output import (
    NUMBER,
    json_line,
    output_kind,
    output_row,
    write_rows,
)
from loramix.formats.tables import Kind, Row, kind_of, need_pyarrow, parquet_schema, read_rows
from loramix.pack.manifest import MANIFEST
from loramix.paths import atomic_write, open_lines, sha256_file, write_bytes
from loramix.runtime.engine import Engine
from loramix.runtime.row_answers import answer_rows


def run_batch(
    engine: Engine,
    source: Path,
    out: Path,
    *,
    column: str = "prompt",
    parallel: int = PARALLEL,
    report: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> dict[str, int]:
    """Answer every row of a file.

    Args:
        engine: generates the answers.
        source: input by its suffix: ``.csv``, ``.tsv``, ``.parquet``, any other is JSONL, one object per line.
        out: output, ``.parquet`` or JSONL, one row per row of the input: ``line`` (the row's number from 1), the
            columns of the input, ``text``, ``mix``, ``reason``, ``finish_reason``, ``usage``, of a label skill
            ``labels``, of several mixes ``answers``, of a plan ``steps``; or ``error`` for a row that could not be
            answered. A column of the input whose name is taken is called ``input_text`` etc.
        column: column of the prompt, which is text or OpenAI-style messages.
        parallel: maximum answers decoded at once; each needs memory for its KV.
        report: progress callback with the number of finished rows and of all rows.
        **options: see `Engine.stream`.

    Returns:
        ``lines``, ``answered`` and ``errors``, including those of resumed runs.

    Raises:
        NotFound: the input does not exist.
        InvalidData: the input is not of its kind, or has no such column.
        MissingExtra: Parquet was asked for and pyarrow is not installed.
        UsageError: the output exists, the partial output belongs to another job, or an option is invalid.
        Busy: another process writes the output.
    """
    if not source.is_file():
        raise NotFound(f"no file at {source}; name a file with one prompt per row: JSONL, CSV or Parquet.")
    if out.exists():
        raise UsageError(f"{out} already exists; move it away, or name another file.")
    kind = output_kind(out.name)
    if kind == "parquet":
        need_pyarrow()
    total, columns = 0, dict[str, None]()
    for _, row in _rows_of(source, column):
        total += 1
        if isinstance(row, dict):
            columns.update(dict.fromkeys(row))
    part = out.with_name(out.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{part}.lock", timeout=0):
            part_file, given = _open_partial(part, _job_header(engine, source, column, options))
            answers: dict[int, dict[str, Any]] = {row.pop(NUMBER): row for row in map(json.loads, given)}
            report(len(answers), total)
            with part_file as file:
                left = (row for row in _rows_of(source, column) if row[0] not in answers)
                for number, answer in answer_rows(engine, left, column, parallel, options):
                    file.write(json_line({NUMBER: number, **answer}))
                    file.flush()
                    answers[number] = answer
                    report(len(answers), total)
            _write_output(source, out, kind, column, columns, answers)
            part.unlink()
    except Timeout:
        raise Busy(f"another process writes {out}; wait for it, or name another file.") from None
    Path(f"{part}.lock").unlink(missing_ok=True)
    errors = sum("error" in answer for answer in answers.values())
    return {"lines": len(answers), "answered": len(answers) - errors, "errors": errors}


def _rows_of(source: Path, column: str) -> Iterator[Row]:
    with source.open("rb") as file:
        yield from read_rows(file, str(source), kind_of(source.name) or "jsonl", column)


def _write_output(
    source: Path,
    out: Path,
    kind: Kind,
    column: str,
    columns: Mapping[str, None],
    answers: Mapping[int, Mapping[str, Any]],
) -> None:
    """Write the complete output: each row of the input with its answer."""
    schema = None
    if kind == "parquet" and kind_of(source.name) == "parquet":
        with source.open("rb") as file:
            schema = parquet_schema(file, str(source))
    rows = (output_row(number, row, answers[number]) for number, row in _rows_of(source, column))
    with atomic_write(out) as whole:
        write_rows(whole, kind, rows, columns, schema)


def _job_header(engine: Engine, source: Path, column: str, options: Mapping[str, Any]) -> bytes:
    """First line of the partial output: a digest of all inputs that the answers depend on."""
    given = {name: value for name, value in sorted(options.items()) if value is not None}
    what = [sha256_file(source), sha256_file(engine.pack.directory / MANIFEST), column, engine.n_ctx, given]
    digest = hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()
    return json.dumps({"loramix batch": 1, "job": digest}).encode() + b"\n"


def _open_partial(part: Path, job: bytes) -> tuple[IO[bytes], list[bytes]]:
    """Open the partial output for appending; also return its rows as lines."""
    if not part.is_file() or b"\n" not in part.read_bytes():
        write_bytes(part, job)
    part_file = open_lines(part, job)
    if part_file is None:
        raise UsageError(f"{part} is of another input, pack or options; delete it, or name another output.")
    return part_file
