"""A file of prompts → a file of answers: routed, several of a mix at once, and going on after any kill.

Answers are appended to ``OUT.part`` as they come, each with its line's number; killed, the same call reads what
is answered and does the rest. When all are there, OUT appears in one step, in the order of the input.
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
from loramix.runtime.stream import Stream

WINDOW = 128  # lines routed together, then answered mix by mix
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
        engine: answers.
        source: a JSON object a line.
        out: the file to make: an object a line with ``line`` (from 1), ``id`` where the input has one, ``text``,
            ``mix`` and ``reason``, ``finish_reason`` and ``usage``; or ``error`` for a line that has no answer.
        column: key of the prompt: text, or OpenAI-style messages.
        parallel: most answers that decode at once; more need more memory for their KV.
        report: told how many lines of all are done.
        **options: as `Engine.stream` takes them.

    Returns:
        ``lines``, ``answered`` and ``errors``, over all runs.

    Raises:
        NotFound: no such input.
        UsageError: the output is there already, its beginnings are of another job, or an option is bad.
        Busy: another process writes it.
    """
    if not source.is_file():
        raise NotFound(f"no file at {source}; name a JSONL file with a prompt a line.")
    if out.exists():
        raise UsageError(f"{out} is there already; move it away, or name another file.")
    part = out.with_name(out.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{part}.lock", timeout=0):
            opened, known = _opened(part, _job(engine, source, column, options))
            rows = [json.loads(line) for line in known]
            done = {row["line"] for row in rows}
            total = sum(1 for _, line in utf8_lines(source) if line.strip())
            report(len(rows), total)
            with opened as file:
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
    """A row for each line: those of a window routed first, then answered mix by mix."""
    asked = GenerationOptions.of(**{name: value for name, value in options.items() if value is not None})
    if asked.policy == "token":
        parallel = 1  # its mix moves within an answer, so that no two share one
    with closing(_BatchRunner(engine, parallel)) as together:
        while window := list(islice(lines, WINDOW)):
            routed: list[Routed] = []
            for number, line in window:
                row: dict[str, Any] = {"line": number}
                try:
                    row, prompt = _read(number, line, column)
                    prepared = engine.prepare(prompt)
                    routed.append((engine.route(prepared, asked), row, prepared))
                except UsageError:  # the options' fault, not the line's
                    raise
                except LoramixError as error:
                    yield {**row, "error": str(error)}
            routed.sort(key=lambda item: (item[0].named, item[1]["line"]))
            yield from together.rows(routed, asked)


class _BatchRunner:
    """Answers side by side, and hears of them; see `loramix.runtime.listener.AnswerListener`."""

    def __init__(self, engine: Engine, parallel: int) -> None:
        self._engine, self._parallel = engine, parallel
        self._scheduler = Scheduler(engine, self, parallel=parallel)
        self._found: list[tuple[int, dict[str, Any]]] = []

    def rows(self, routed: Sequence[Routed], options: GenerationOptions) -> Iterator[dict[str, Any]]:
        """The rows of routed prompts, made whole, as they end."""
        rows = {row["line"]: row for _, row, _ in routed}
        waiting = iter(routed)
        while rows:
            for route, row, prompt in islice(waiting, self._parallel - len(self._scheduler)):
                open_stream = partial(self._engine.stream, prompt, options, route=route)
                self._scheduler.add(row["line"], open_stream)
            self._scheduler.step()
            found, self._found = self._found, []
            for number, more in found:
                yield {**rows.pop(number), **more}

    def close(self) -> None:
        """Free what only answers side by side need."""
        self._scheduler.close()

    def started(self, number: int, stream: Stream) -> None:
        pass

    def said(self, number: int, stream: Stream, text: str) -> None:
        pass

    def ended(self, number: int, stream: Stream) -> None:
        answer = stream.answer
        assert answer is not None
        row = {
            "text": answer.text,
            "mix": answer.route.named,
            "reason": answer.route.reason,
            "finish_reason": answer.finish_reason,
            "usage": answer.usage,
        }
        self._found.append((number, row))

    def failed(self, number: int, error: LoramixError) -> None:
        if isinstance(error, UsageError):
            raise error
        self._found.append((number, {"error": str(error)}))


def _read(number: int, line: bytes, column: str) -> tuple[dict[str, Any], Any]:
    """What an answer's row begins with, and the prompt."""
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


def _job(engine: Engine, source: Path, column: str, options: Mapping[str, Any]) -> bytes:
    """First line of the beginnings: what their answers depend on."""
    known = {name: value for name, value in sorted(options.items()) if value is not None}
    what = [sha256_file(source), sha256_file(engine.pack.directory / MANIFEST), column, engine.n_ctx, known]
    digest = hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()
    return json.dumps({"loramix batch": 1, "job": digest}).encode() + b"\n"


def _opened(part: Path, job: bytes) -> tuple[IO[bytes], list[bytes]]:
    """The beginnings, open for more, and their rows as lines."""
    if not part.is_file() or b"\n" not in part.read_bytes():
        write_bytes(part, job)
    opened = open_lines(part, job)
    if opened is None:
        raise UsageError(
            f"{part} was begun from another input, pack or options; delete it, or name another output."
        )
    return opened


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"
