"""Answers files of prompts with the workers of a Ray cluster, and resumes after a kill of anything.

Ray Data reads, schedules, restarts workers and repeats their tasks. The output is a directory: each finished chunk of
rows is one file, and the files that are there are what a resume leaves out.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loramix.cluster.batch_worker import Answerer, Job
from loramix.cluster.chunks import ROWS, Chunk, SourceFile, find_files, read_chunks
from loramix.cluster.output_files import OutputFiles
from loramix.cluster.session import need_ray, pool_size, session, unwrap
from loramix.defaults import PARALLEL
from loramix.diagnose.memory_plan import make_plan
from loramix.errors import UsageError
from loramix.formats.table_output import output_kind
from loramix.models import bases
from loramix.pack.manifest import MANIFEST
from loramix.pack.pack import Pack
from loramix.paths import sha256_file
from loramix.runtime.options import GenerationOptions

JOB = "_job.json"
_READERS = 64


def run_cluster_batch(
    source: str,
    out: str,
    *,
    pack: str,
    n_ctx: int,
    column: str = "prompt",
    parallel: int = PARALLEL,
    address: str | None = None,
    workers: int | None = None,
    cpus_per_worker: int = 1,
    rows_per_file: int = ROWS,
    report: Callable[[int], None] = lambda done: None,
    **options: Any,
) -> dict[str, int]:
    """Answer every row of files with the workers of a cluster.

    Args:
        source: a file, directory or glob of JSONL, CSV or Parquet; a path or a URI that every worker can read.
        out: directory of the output, a path or a URI that every worker can write. Files are Parquet if its name ends
            with ``.parquet``, else JSONL; columns as in `loramix.runtime.batch.run_batch`.
        pack: name or directory of a pack that is on every machine.
        n_ctx: maximum tokens of prompt and answer together.
        column: column of the prompt.
        parallel: maximum answers that a worker decodes at once.
        address: see `loramix.cluster.session.session`.
        workers: number of workers; by default as many as the cluster's CPUs and memory hold.
        cpus_per_worker: CPUs and threads of a worker.
        rows_per_file: rows of a file of the output, which a worker answers at a time.
        report: progress callback with the number of rows finished in this run.
        **options: see `Engine.stream`.

    Returns:
        ``rows`` and ``errors`` of this run, and ``files`` of earlier runs.

    Raises:
        NotFound: no input, no cluster, or no such pack.
        UsageError: the output belongs to another job, an input changed since, or an option is invalid.
        NativeError: workers died too often at one chunk.
    """
    need_ray()
    options = {name: value for name, value in options.items() if value is not None}
    GenerationOptions.of(**options)  # raises here rather than in a worker
    files = find_files(source)
    loaded = Pack.load(pack)
    job = Job(
        pack=pack if not Path(pack).is_dir() else str(Path(pack).absolute()),
        pack_digest=sha256_file(loaded.directory / MANIFEST),
        out=out if "://" in out else str(Path(out).absolute()),
        kind=output_kind(out),
        column=column,
        parallel=parallel,
        n_ctx=n_ctx,
        n_threads=cpus_per_worker,
        options=options,
    )
    done = _open_output(job, files, rows_per_file)
    memory = make_plan(bases.resolve(loaded.manifest.base.name), n_ctx=n_ctx, pack=loaded).memory_bytes
    counts = {"rows": 0, "errors": 0, "files": sum(map(len, done.values()))}
    with session(address) as started_here:
        size = pool_size(workers, cpus_per_worker, memory, started_here)
        try:
            for row in _answers(source, files, job, done, rows_per_file, size, memory):
                counts["rows"] += int(row["rows"])
                counts["errors"] += int(row["errors"])
                report(counts["rows"])
        except Exception as error:
            raise unwrap(error) or error from None
    OutputFiles(job.out).tidy()
    return counts


def _answers(
    source: str,
    files: list[SourceFile],
    job: Job,
    done: Mapping[str, set[int]],
    rows_per_file: int,
    workers: int,
    memory: int,
) -> Iterator[dict[str, Any]]:
    """Run the pipeline: files → chunks → counts of answers."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised as well
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # Ray's wrapper loses it on the way to the driver
    context.target_max_block_size = 1  # one chunk is one block, so that chunks of one file go to all workers

    def chunks(row: dict[str, Any]) -> Iterator[dict[str, Chunk]]:
        file = SourceFile(row["path"], row["name"], row["state"])
        for chunk in read_chunks(source, file, job.column, rows_per_file, done.get(file.name, set())):
            yield {"chunk": chunk}

    items = [{"path": file.path, "name": file.name, "state": file.state} for file in files]
    rows = ray.data.from_items(items, override_num_blocks=min(len(items), _READERS))
    answered = rows.flat_map(chunks, num_cpus=0).map_batches(
        Answerer,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
        num_cpus=job.n_threads,
        memory=memory,
    )
    yield from answered.iter_rows()


def _open_output(job: Job, files: list[SourceFile], rows_per_file: int) -> dict[str, set[int]]:
    """Create the output or find what is done in it.

    Returns:
        Numbers of the finished chunks by file name.

    Raises:
        UsageError: the output belongs to another job, or a file changed since.
    """
    what = [job.pack_digest, job.kind, job.column, job.n_ctx, rows_per_file, sorted(job.options.items())]
    digest = hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()
    output = OutputFiles(job.out)
    if not output.create():
        raise UsageError(f"{job.out} is a file; name a directory, which is created.")
    found, old = output.names(), output.read_json(JOB)
    states = {file.name: file.state for file in files}
    if old is None and found:
        raise UsageError(f"{job.out} holds other files; name a directory that is new or empty.")
    if old is not None and old["job"] != digest:
        raise UsageError(f"{job.out} is of another pack or other options; delete it, or name another output.")
    for name, state in old["files"].items() if old else ():
        if states.setdefault(name, state) != state:
            raise UsageError(f"{name} has changed since {job.out} was begun; name another output.")
    output.write(JOB, json.dumps({"loramix batch": 1, "job": digest, "files": states}).encode())
    return {file.name: numbers for file in files if (numbers := file.chunk_numbers(found))}
