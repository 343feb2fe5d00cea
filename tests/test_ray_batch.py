"""Batches on a Ray cluster: the rows of the one-machine batch, kills of workers and drivers, bad inputs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from loramix.cli import main
from loramix.cluster import attempts, session
from loramix.cluster import batch as cluster_batch
from loramix.cluster.attempts import Attempt
from loramix.cluster.batch import run_cluster_batch
from loramix.cluster.chunks import find_files, read_chunks
from loramix.cluster.output_files import NOTE, OutputFiles
from loramix.errors import InvalidData, LoramixError, NativeError, NotFound, UsageError, WrongBase
from loramix.runtime.batch import run_batch
from loramix.runtime.engine import Engine

pytest.importorskip("ray", reason="Ray is not installed: pip install 'loramix[ray]'")
OPTIONS: dict[str, Any] = {"n_ctx": 256, "max_tokens": 5}


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def prompts(count: int) -> list[dict[str, Any]]:
    words = ["sunny", "rainy", "windy", "cloudy", "snowy"]
    return [{"prompt": f"the {words[i % 5]} day {i}", "id": f"n{i}"} for i in range(count)]


def command(source: Path, out: Path, pack: Path) -> list[str]:
    """Words of the command line, with one worker and four rows a file."""
    words = ["batch", str(source), str(out), "--ray", "--workers", "1", "--rows-per-file", "4"]
    return [*words, "--pack", str(pack), "-n", str(OPTIONS["max_tokens"]), "--ctx", str(OPTIONS["n_ctx"])]


def files_of(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Rows of a file, or of a directory's files in the order of their names; without what depends on caches."""
    files = sorted(out.glob("[!_.]*.jsonl")) if out.is_dir() else [out]
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row.get("usage", {}).pop("cached_tokens", None)
    return rows


@pytest.fixture
def single(tiny_pack: Path, tmp_path: Path) -> Any:
    """Rows of the one-machine batch."""

    def answered(source: Path) -> list[dict[str, Any]]:
        out = tmp_path / "single.jsonl"
        with Engine.open(tiny_pack, n_ctx=OPTIONS["n_ctx"], n_threads=1) as engine:
            run_batch(engine, source, out, max_tokens=OPTIONS["max_tokens"])
        rows = rows_of(out)
        out.unlink()
        return rows

    return answered


def workers() -> list[int]:
    """Process ids of the workers that answer."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any("MapBatches(Answerer)" in word for word in process.cmdline()):
                found.append(process.pid)
    return found


def test_rows_are_those_of_one_machine_and_finished_files_are_not_answered_again(
    ray_cluster: None, tiny_pack: Path, tmp_path: Path, single: Any
) -> None:
    rows = [
        *prompts(20),
        b"{not json",
        {"other": "x"},
        {"prompt": ""},
        {"prompt": "word " * 900},
        *prompts(14),
    ]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out"
    killed: list[int] = []

    def kill(done: int) -> None:
        """Kill a worker, two times."""
        if len(killed) < 2 and (found := workers()):
            os.kill(found[0], signal.SIGKILL)
            killed.append(found[0])

    arguments: dict[str, Any] = {"pack": str(tiny_pack), "workers": 2, "rows_per_file": 4, **OPTIONS}
    counts = run_cluster_batch(str(source), str(out), report=kill, **arguments)
    assert counts == {"rows": 38, "errors": 4, "files": 0} and len(killed) == 2
    assert rows_of(out) == single(source)
    names = files_of(out)
    assert len(names) == 11 and names[0] == "_job.json"
    before = (out / names[1]).stat().st_mtime_ns
    (out / names[3]).unlink()
    counts = run_cluster_batch(str(source), str(out), **{**arguments, "workers": 1})
    assert counts == {"rows": 4, "errors": 0, "files": 9}
    assert files_of(out) == names and (out / names[1]).stat().st_mtime_ns == before
    assert rows_of(out) == single(source)
    with pytest.raises(UsageError, match="another pack or other options"):
        run_cluster_batch(str(source), str(out), **{**arguments, "max_tokens": 6})
    with source.open("ab") as file:
        file.write(b'{"prompt": "more"}\n')
    with pytest.raises(UsageError, match=r"in.jsonl has changed since"):
        run_cluster_batch(str(source), str(out), **arguments)


@pytest.mark.long
def test_a_killed_driver_resumes_and_a_row_that_kills_its_worker_is_an_error(
    ray_cluster: None, tiny_pack: Path, tmp_path: Path, single: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray

    rows = [{**row, "id": str(i)} for i, row in enumerate(prompts(24))]
    source, out = tmp_path / "in", tmp_path / "out.parquet"
    write(source / "a.jsonl", rows[:8])
    (source / "b.csv").write_text("prompt,id\n" + "".join(f"{r['prompt']},{r['id']}\n" for r in rows[8:16]))
    pq.write_table(pa.Table.from_pylist(rows[16:]), source / "c.parquet")
    address = ray.get_runtime_context().gcs_address
    words = command(source, out, tiny_pack)
    driver = subprocess.Popen([sys.executable, "-m", "loramix", *words, "--address", address])
    while driver.poll() is None and not list(out.glob("[!.]*.parquet")):
        time.sleep(0.02)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL

    class Dying(cluster_batch.Answerer):
        """Dies at one row, as native code may."""

        def _answer(self, chunk: Any) -> Any:
            import os

            from loramix.cluster import attempts, batch_worker

            attempts.TOGETHER = attempts.PER_ROW = 1  # a test need not die four times
            found = batch_worker.answer_rows

            def answer_rows(engine: Any, rows: Any, *rest: Any) -> Any:
                rows = list(rows)
                if any(isinstance(row, dict) and row["id"] == "22" for _, row in rows):
                    os.kill(os.getpid(), 9)
                return found(engine, iter(rows), *rest)

            batch_worker.answer_rows = answer_rows  # type: ignore[assignment]
            try:
                return super()._answer(chunk)
            finally:
                batch_worker.answer_rows = found

    monkeypatch.setattr(cluster_batch, "Answerer", Dying)
    result = CliRunner().invoke(main, words)
    assert (
        result.exit_code == 0 and "1 errors; " in result.output and "files of earlier runs" in result.output
    )
    table = pq.read_table(out)
    found = sorted(table.to_pylist(), key=lambda row: int(row["id"]))
    assert [row["id"] for row in found] == [str(i) for i in range(24)]
    assert found[22]["error"] == "the process that answers row 7 dies." and found[22]["text"] is None
    alone = single(write(tmp_path / "all.jsonl", rows))
    assert [row["text"] for row in found if row["id"] != "22"] == [
        r["text"] for r in alone if r["id"] != "22"
    ]
    assert not [name for name in files_of(out) if name.startswith((NOTE, "."))]


@pytest.mark.long
def test_what_workers_lack_is_one_sentence_and_what_was_answered_is_kept(
    ray_cluster: None, tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write(tmp_path / "in.jsonl", prompts(8)), tmp_path / "out"
    arguments: dict[str, Any] = {"workers": 1, "rows_per_file": 4, **OPTIONS}
    monkeypatch.setenv("LORAMIX_DATA", str(tmp_path / "data"))  # where the workers do not look
    shutil.copytree(tiny_pack, tmp_path / "data" / "packs" / "mine")
    with pytest.raises(NotFound, match=r"on the worker .*mine"):
        run_cluster_batch(str(source), str(out), pack="mine", **arguments)
    assert not [name for name in files_of(out) if not name.startswith("_")]
    shutil.rmtree(out)

    class Full(cluster_batch.Answerer):
        """Finds the disk full at its second file."""

        def _answer(self, chunk: Any) -> Any:
            if chunk.name.endswith("1"):
                raise OSError(errno.ENOSPC, "No space left on device", chunk.name)
            return super()._answer(chunk)

    with monkeypatch.context() as patch:
        patch.setattr(cluster_batch, "Answerer", Full)
        result = CliRunner().invoke(main, command(source, out, tiny_pack))
    last = result.output.splitlines()[-1]
    assert (
        result.exit_code == 1
        and last.startswith("error: ")
        and "No space left" in last
        and "UDF" not in result.output
    )
    csv = tmp_path / "in.csv"
    csv.write_text("text,id\na,1\n")
    with pytest.raises(InvalidData, match=r"no column 'prompt' \(it has 'text', 'id'\); give --column\.$"):
        run_cluster_batch(str(csv), str(tmp_path / "csv"), pack=str(tiny_pack), **arguments)
    result = CliRunner().invoke(main, command(source, out, tiny_pack))
    assert result.exit_code == 0 and " 0 errors" in result.output
    assert [row["id"] for row in rows_of(out)] == [f"n{i}" for i in range(8)]


def test_files_of_a_source(tmp_path: Path) -> None:
    for name in (
        "b.jsonl",
        "a.csv.gz",
        "sub/c.parquet",
        "notes.txt",
        "_job.json",
        "sub/.tmp.jsonl",
        "_x/d.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [file.name for file in find_files(str(tmp_path))] == ["a.csv.gz", "b.jsonl", "sub/c.parquet"]
    assert [file.name for file in find_files(f"{tmp_path}/*.jsonl")] == ["b.jsonl"]
    assert [file.name for file in find_files(tmp_path.as_uri() + "/s*/*")] == [
        "sub/.tmp.jsonl",
        "sub/c.parquet",
    ]
    assert [file.name for file in find_files(str(tmp_path / "notes.txt"))] == ["notes.txt"]
    prefixes = {file.chunk_prefix for file in find_files(str(tmp_path))}
    assert len(prefixes) == 3
    for nothing in ("no.jsonl", "*.xml", "sub/none"):
        with pytest.raises(NotFound, match="no file at"):
            find_files(str(tmp_path / nothing))
    with pytest.raises(UsageError, match="cannot be used"):
        find_files("nowhere://bucket/x.jsonl")


def test_chunks_are_the_same_whatever_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in.jsonl", [*prompts(5), b"", b"bad", *prompts(4)])
    file = find_files(str(source))[0]
    chunks = list(read_chunks(str(source), file, "prompt", 4, set()))
    assert [[number for number, _ in chunk.rows] for chunk in chunks] == [
        [1, 2, 3, 4],
        [5, 7, 8, 9],
        [10, 11],
    ]
    assert isinstance(chunks[1].rows[1][1], str)
    assert list(read_chunks(str(source), file, "prompt", 4, {0, 2})) == [chunks[1]]
    monkeypatch.setattr("loramix.cluster.chunks.MAX_CHARACTERS", 60)
    chunks = list(read_chunks(str(source), file, "prompt", 4, set()))
    assert [[number for number, _ in chunk.rows] for chunk in chunks] == [
        [1, 2],
        [3, 4],
        [5, 7],
        [8, 9],
        [10, 11],
    ]


def test_deaths_lead_to_the_row(tmp_path: Path) -> None:
    files = OutputFiles(str(tmp_path))
    rows = [(n, {"prompt": "x"}) for n in (1, 2, 3)]

    def dies_at(bad: int | None) -> list[Any]:
        """One attempt of a worker that dies at a row, or ends."""
        attempt, found = Attempt(files, "c"), []
        attempt.begin()
        for group in attempt.groups(rows):
            if any(number == bad and isinstance(row, dict) for number, row in group):
                return []
            found += group
        attempt.end()
        return found

    for _ in range(attempts.TOGETHER + attempts.PER_ROW):
        assert dies_at(2) == []
    found = dies_at(2)
    assert [type(row) for _, row in found] == [dict, InvalidData, dict] and not list(tmp_path.iterdir())
    dies_at(3)
    assert dies_at(None) == rows and not list(tmp_path.iterdir())  # killed by somebody else
    for _ in range(attempts.IN_VAIN):
        Attempt(files, "c").begin()
    with pytest.raises(NativeError, match="workers died at c before its first row"):
        Attempt(files, "c").begin()


def test_an_output_that_is_something_else_is_refused(tmp_path: Path, tiny_pack: Path) -> None:
    source = write(tmp_path / "in.jsonl", prompts(2))
    write(tmp_path / "full" / "x.jsonl", [])
    for out, message in (
        ("in.jsonl", "is a file"),
        ("full", "holds other files"),
        ("out.csv", "are written as"),
    ):
        with pytest.raises(UsageError, match=message):
            run_cluster_batch(str(source), str(tmp_path / out), pack=str(tiny_pack), **OPTIONS)
    for words, message in (
        (["--workers", "2"], "--workers needs --ray"),
        (["--ray", "--threads", "1"], "give --cpus"),
    ):
        result = CliRunner().invoke(
            main, ["batch", str(source), str(tmp_path / "o"), "-p", str(tiny_pack), *words]
        )
        assert result.exit_code == 2 and message in result.output


def test_workers_that_do_not_fit_are_refused_where_no_machine_can_be_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0, "memory": 5e9})
    size = session.pool_size
    assert [size(None, cpus, memory, True) for cpus, memory in ((1, 10**9), (2, 10**9), (1, 3 * 10**9))] == [
        4,
        2,
        1,
    ]
    assert size(4, 1, 10**9, True) == 4 and size(9, 1, 10**9, False) == 9 and size(None, 8, 1, False) == 1
    for workers, cpus, memory in ((5, 1, 1), (None, 8, 1), (1, 1, 10**10)):
        with pytest.raises(UsageError, match="do not fit this machine, which has 4 CPUs and 5"):
            size(workers, cpus, memory, True)


def test_no_ray_or_no_cluster_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFound, match=r"no Ray cluster answers at 127\.0\.0\.1:9"):
        session._need_answer("127.0.0.1:9")
    for bad in ("here", "host:port", "ray://"):
        with pytest.raises(UsageError, match="is not HOST:PORT"):
            session._need_answer(bad)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(
        main, ["batch", str(tmp_path), str(tmp_path / "o"), "--ray", "-p", str(tmp_path)]
    )
    assert result.exit_code == 1 and "pip install 'loramix[ray]'" in result.output


def test_errors_behind_those_of_ray_are_found() -> None:
    from ray.exceptions import RayActorError

    class Wrapper(Exception):
        cause: BaseException | None = None

    outer, inner = Wrapper("many lines"), Wrapper("task")
    outer.__cause__, inner.cause = inner, WrongBase("the pack is another one", "advice of Ray")
    assert repr(session.unwrap(outer)) == "WrongBase('the pack is another one')"
    inner.cause = InvalidData("no such column.\nFailed to apply UDF after 1/1 attempts.\nTo change retry …")
    assert repr(session.unwrap(outer)) == "InvalidData('no such column.')"
    inner.cause = OSError(errno.ENOSPC, "No space left on device", "advice of Ray\nof many lines")
    assert str(session.unwrap(outer)) == "[Errno 28] No space left on device"
    lost = RayActorError(
        error_msg="The actor died.\n  File ...\nModuleNotFoundError: No module named 'loramix'\n"
    )
    assert str(session.unwrap(lost)).endswith("failed: ModuleNotFoundError: No module named 'loramix'")
    inner.cause = KeyError("x")
    assert session.unwrap(outer) is None
    assert isinstance(session.unwrap(LoramixError("x")), LoramixError)


@pytest.mark.parametrize(
    "code", ["import loramix, loramix.cluster.batch", "from loramix.cli import main; main(['--help'])"]
)
def test_ray_is_not_loaded_where_nobody_asks_for_it(code: str) -> None:
    script = f"import sys, atexit; atexit.register(lambda: print('ray' in sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
