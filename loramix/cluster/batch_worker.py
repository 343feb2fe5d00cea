"""A worker of a batch on a cluster: an engine that answers chunks of rows, and writes each as one file."""

from __future__ import annotations

import io
import socket
from dataclasses import dataclass, field
from typing import Any

from loramix.cluster.attempts import Attempt
from loramix.cluster.chunks import Chunk
from loramix.cluster.output_files import OutputFiles
from loramix.errors import InvalidData, NotFound, WrongBase
from loramix.formats.table_output import output_row, write_rows
from loramix.formats.tables import Kind
from loramix.pack.manifest import MANIFEST
from loramix.pack.pack import Pack
from loramix.paths import sha256_file
from loramix.runtime.engine import Engine
from loramix.runtime.row_answers import answer_rows


@dataclass(frozen=True)
class Job:
    """What a worker must know."""

    pack: str
    pack_digest: str
    """SHA-256 of the pack's manifest, which names each of its files by digest."""
    out: str
    kind: Kind
    column: str
    parallel: int
    n_ctx: int
    n_threads: int
    options: dict[str, Any] = field(default_factory=dict)


class Answerer:
    """Answers chunks; Ray creates one in each worker.

    Args:
        job: what to answer, and where the files go.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._files = OutputFiles(job.out)
        self._engine: Engine | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Answer and write chunks.

        Args:
            batch: ``chunk``, an array of `Chunk`.

        Returns:
            ``rows`` and ``errors`` by chunk.

        Raises:
            NotFound: the pack or its base is not on this machine.
            WrongBase: the pack on this machine is another one.
            NativeError: the process died too often at a chunk.
        """
        counts = [self._answer(chunk) for chunk in batch["chunk"]]
        return {"rows": [rows for rows, _ in counts], "errors": [errors for _, errors in counts]}

    def _answer(self, chunk: Chunk) -> tuple[int, int]:
        job = self._job
        attempt = Attempt(self._files, chunk.name)
        attempt.begin()
        if self._engine is None:  # not in the constructor, whose errors Ray repeats
            self._engine = _open_engine(job)
        rows = [(n, InvalidData(row) if isinstance(row, str) else row) for n, row in chunk.rows]
        answers: dict[int, dict[str, Any]] = {}
        for group in attempt.groups(rows):
            answers.update(answer_rows(self._engine, iter(group), job.column, job.parallel, job.options))
        columns = dict.fromkeys(name for _, row in rows if isinstance(row, dict) for name in row)
        if chunk.schema is not None:
            columns = dict.fromkeys(chunk.schema.names)
        file = io.BytesIO()
        merged = (output_row(number, row, answers[number]) for number, row in rows)
        write_rows(file, job.kind, merged, columns, chunk.schema)
        self._files.write(f"{chunk.name}.{job.kind}", file.getvalue())
        attempt.end()
        return len(rows), sum("error" in answer for answer in answers.values())


def _open_engine(job: Job) -> Engine:
    try:
        pack = Pack.load(job.pack)
        if sha256_file(pack.directory / MANIFEST) != job.pack_digest:
            raise WrongBase(f"pack {job.pack} is another one there: copy the driver's to each machine.")
        return Engine(pack, n_ctx=job.n_ctx, n_threads=job.n_threads)
    except (NotFound, WrongBase) as error:
        raise type(error)(f"on the worker {socket.gethostname()}: {error}") from None
