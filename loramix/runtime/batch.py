"""Answers a JSONL file of prompts, several prompts of a mix at once, and resumes after a kill.

Answers are appended to ``OUT.part`` as they finish, each with its line number. A killed run resumes from this
partial output when it is called again. The complete output is written atomically, in input order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from loramix.errors import Busy, InvalidData, LoramixError, NotFound, UsageError
from loramix.formats.textfile import utf8_lines
from loramix.pack.manifest import MANIFEST
from loramix.paths import atomic_write, open_lines, sha256_file, write_bytes
from loramix.runtime.engine import Engine
from loramix.runtime.options import GenerationOptions
from loramix.runtime.prepared_prompt import PreparedPrompt
from loramix.runtime.router import Route
from loramix.runtime.scheduler import Scheduler
from loramix.runtime.steps import answer_fields
from loramix.runtime.stream import Stream

WINDOW = 128  # lines that are routed, then answered grouped by mix
MAX_LINE = 1 << 20

Line = tuple[int, bytes]
Routed = tuple[Route, dict[str, Any], PreparedPrompt]


def run_batch(
    engine: Engine,
    source: Path,
    out: Path,
    *,
    column: str = "prompt",
    parallel: int = 8,
    report: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> dict[str, int]:
    """Answer every line of a JSONL file.

    Args:
        engine: generates the answers.
        source: JSONL input, one object per line.
        out: JSONL output, one object per line: ``line`` (from 1), ``id`` if the input has one, ``text``, ``mix``,
            ``reason``, ``finish_reason``, ``usage``, of a label skill ``labels``, of several mixes ``answers``, of a
            plan ``steps``; or ``error`` for a line that could not be answered.
        column: key of the prompt, which is text or OpenAI-style messages.
        parallel: maximum answers decoded at once; each needs memory for its KV.
        report: progress callback with the number of finished lines and of all lines.
        **options: see `Engine.stream`.

    Returns:
        ``lines``, ``answered`` and ``errors``, including those of resumed runs.

    Raises:
        NotFound: the input does not exist.
        UsageError: the output exists, the partial output belongs to another job, or an option is invalid.
        Busy: another process writes the output.
    """
    if not source.is_file():
        raise NotFound(f"no file at {source}; name a JSONL file with one prompt per line.")
    if out.exists():
        raise UsageError(f"{out} already exists; move it away, or name another file.")
    part = out.with_name(out.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{part}.lock", timeout=0):
            part_file, given = _open_partial(part, _job_header(engine, source, column, options))
            rows = [json.loads(line) for line in given]
            done = {row["line"] for row in rows}
            total = sum(1 for _, line in utf8_lines(source) if line.strip())
            report(len(rows), total)
            with part_file as file:
                numbered = ((n, line) for n, line in utf8_lines(source) if line.strip() and n not in done)
                for row in _answers(engine, numbered, column, parallel, options):
                    file.write(_line(row))
                    file.flush()
                    rows.append(row)
                    report(len(rows), total)
            rows.sort(key=lambda row: int(row["line"]))
            with atomic_write(out) as whole:
                whole.writelines(map(_line, rows))
            part.unlink()
    except Timeout:
        raise Busy(f"another process writes {out}; wait for it, or name another file.") from None
    Path(f"{part}.lock").unlink(missing_ok=True)
    errors = sum("error" in row for row in rows)
    return {"lines": len(rows), "answered": len(rows) - errors, "errors": errors}


def _answers(
    engine: Engine, lines: Iterator[Line], column: str, parallel: int, options: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield an output row for each line; each window is routed first, then answered grouped by mix."""
    request = GenerationOptions.of(**{name: value for name, value in options.items() if value is not None})
    if request.policy == "token":
        parallel = 1  # the mix changes within an answer, so answers cannot share a batch
    with closing(_BatchRunner(engine, parallel)) as runner:
        while window := list(islice(lines, WINDOW)):
            routed: list[Routed] = []
            for number, line in window:
                row: dict[str, Any] = {"line": number}
                try:
                    row, prompt = _read(number, line, column)
                    prepared = engine.prepare(prompt)
                    routed.append((engine.route(prepared, request), row, prepared))
                except UsageError:  # caused by the options, not by the line
                    raise
                except LoramixError as error:
                    yield {**row, "error": str(error)}
            routed.sort(key=lambda item: (item[0].named, item[1]["line"]))
            yield from runner.rows(routed, request)


class _BatchRunner:
    """Runs concurrent answers and collects their rows; an `AnswerListener`."""

    def __init__(self, engine: Engine, parallel: int) -> None:
        self._engine, self._parallel = engine, parallel
        self._scheduler = Scheduler(engine, self, parallel=parallel)
        self._finished: list[tuple[int, dict[str, Any]]] = []

    def rows(self, routed: Sequence[Routed], options: GenerationOptions) -> Iterator[dict[str, Any]]:
        """Yield the completed rows of routed prompts in the order in which answers end."""
        rows = {row["line"]: row for _, row, _ in routed}
        waiting = iter(routed)
        while rows:
            for route, row, prompt in islice(waiting, self._parallel - len(self._scheduler)):
                open_stream = partial(self._engine.stream, prompt, options, route=route)
                self._scheduler.add(row["line"], open_stream)
            self._scheduler.step()
            found, self._finished = self._finished, []
            for number, more in found:
                yield {**rows.pop(number), **more}

    def close(self) -> None:
        """Close the scheduler."""
        self._scheduler.close()

    def started(self, number: int, stream: Stream) -> None:
        pass

    def text_added(self, number: int, stream: Stream, text: str) -> None:
        pass

    def ended(self, number: int, stream: Stream) -> None:
        answer = stream.answer
        assert answer is not None
        row = {
            "text": answer.text,
            "mix": answer.route.named,
            "reason": answer.route.reason,
            **({"steps": [step.to_json() for step in answer.route.plan]} if answer.route.plan else {}),
            "finish_reason": answer.finish_reason,
            "usage": answer.usage,
            **answer_fields(answer.parts, answer.step_labels),
        }
        self._finished.append((number, row))

    def failed(self, number: int, error: LoramixError) -> None:
        if isinstance(error, UsageError):
            raise error
        self._finished.append((number, {"error": str(error)}))


def _read(number: int, line: bytes, column: str) -> tuple[dict[str, Any], Any]:
    """Parse an input line; return the first fields of its output row, and the prompt."""
    if len(line) > MAX_LINE:
        raise InvalidData(f"line {number} has {len(line)} bytes; at most {MAX_LINE} are read.")
    try:
        found = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InvalidData(f"line {number} is not UTF-8 text (byte 0x{line[error.start]:02X}).") from None
    except (ValueError, RecursionError) as error:
        raise InvalidData(f"line {number} is not JSON: {error}.") from None
    if not isinstance(found, dict) or column not in found:
        keys = ", ".join(map(repr, list(found)[:8])) if isinstance(found, dict) else type(found).__name__
        raise InvalidData(f"line {number} has no {column!r} (it has {keys}); give --column.")
    row: dict[str, Any] = {"line": number}
    if isinstance(found.get("id"), str | int):
        row["id"] = found["id"]
    return row, found[column]


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


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"
