"""A file of prompts answered line by line: bad lines, kills, another job, the order of the output."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from loramix.cli import main
from loramix.errors import Busy, UsageError
from loramix.pack.edit import remove_skill
from loramix.runtime import batch
from loramix.runtime.batch import run_batch
from loramix.runtime.engine import Engine
from loramix.runtime.llama.batch_context import BatchContext


def write(path: Path, rows: list[Any]) -> Path:
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_are_those_of_single_requests_in_the_order_of_the_input(
    tiny_engine: Any, tmp_path: Path, batch_sizes: list[int]
) -> None:
    prompts = [f"the {word} day" for word in ["sunny", "rainy", "windy", "cloudy"] * 3]
    source = write(tmp_path / "in.jsonl", [{"prompt": text, "id": f"n{i}"} for i, text in enumerate(prompts)])
    counts = run_batch(tiny_engine, source, tmp_path / "out.jsonl", max_tokens=5)
    rows = read(tmp_path / "out.jsonl")
    assert counts == {"lines": 12, "answered": 12, "errors": 0}
    assert max(batch_sizes) > 2
    assert [row["line"] for row in rows] == list(range(1, 13)) and rows[3]["id"] == "n3"
    for text, row in zip(prompts, rows, strict=True):
        alone = tiny_engine.generate(text, max_tokens=5)
        assert (row["text"], row["mix"]) == (alone.text, alone.route.named)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    batch_sizes.clear()
    for options in ({"parallel": 1}, {"policy": "token"}):
        run_batch(tiny_engine, source, tmp_path / "again.jsonl", max_tokens=5, **options)
        assert [row["id"] for row in read(tmp_path / "again.jsonl")] == [row["id"] for row in rows]
        assert not batch_sizes
        (tmp_path / "again.jsonl").unlink()


def test_nothing_native_is_left_behind(tiny_pack: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": f"day {i}"} for i in range(4)])
    pack = shutil.copytree(tiny_pack, tmp_path / "pack")
    with Engine.open(pack, n_ctx=256, n_threads=1) as engine:
        run_batch(engine, source, tmp_path / "out.jsonl", max_tokens=5, mix="sentiment")
        assert not [c for c in engine.model.contexts if isinstance(c, BatchContext)]
        remove_skill(pack, "sentiment")
        assert engine.reload()  # refused while a context holds the adapter


def test_a_bad_line_becomes_an_error_and_the_rest_is_answered(tiny_engine: Any, tmp_path: Path) -> None:
    rows = [
        {"q": "one"}, b"{not json", {"other": "x"}, {"q": ""}, b"", {"q": 7}, b"\xff\xfe", [1],
        b"[" * 2000, {"q": "x" * (1 << 20)}, {"q": [{"role": "user", "content": "two"}]}, {"q": "word " * 900},
    ]  # fmt: skip
    source = write(tmp_path / "in.jsonl", rows)
    counts = run_batch(tiny_engine, source, tmp_path / "out.jsonl", column="q", max_tokens=3)
    found = {row["line"]: row for row in read(tmp_path / "out.jsonl")}
    assert counts == {"lines": 11, "answered": 2, "errors": 9}
    assert {line for line, row in found.items() if "text" in row} == {1, 11}
    assert "no 'q' (it has 'other')" in found[3]["error"] and "not JSON" in found[2]["error"]


DYING = """
import os, signal, sys
from loramix.cli import main
from loramix.runtime import batch
line, left = batch.json_line, int(sys.argv.pop(1))
def dying(row):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return line(row)
batch.json_line = dying
main()
"""


def test_killed_again_and_again_no_line_is_lost_or_doubled(tiny_pack: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": f"number {i}", "id": i} for i in range(120)])
    out = tmp_path / "out.jsonl"
    part = tmp_path / "out.jsonl.part"
    words = ["batch", str(source), str(out)]
    words += ["--pack", str(tiny_pack), "-n", "4", "--ctx", "256", "--threads", "1"]
    seen = 1  # the job's own line
    for rows in (19, 0, 8, 27, 40):
        command = [sys.executable, "-c", DYING, str(rows), *words]
        child = subprocess.run(command, stderr=subprocess.DEVNULL, check=False)
        assert child.returncode == -signal.SIGKILL
        seen += rows
        assert part.read_bytes().count(b"\n") == seen
    with part.open("ab") as file:  # what a kill in the middle of a write leaves
        file.write(b'{"line": 9')
    assert not out.exists()
    command = [sys.executable, "-m", "loramix", *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "120 answers, 0 errors" in done.stderr
    assert [row["id"] for row in read(out)] == list(range(120))


def test_another_job_does_not_go_on_in_the_beginnings_of_one(
    tiny_engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    out = tmp_path / "out.jsonl"

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(batch, "answer_rows", stop)
        with pytest.raises(KeyboardInterrupt):
            run_batch(tiny_engine, source, out, max_tokens=3)
    with pytest.raises(UsageError, match="another input, pack or options"):
        run_batch(tiny_engine, source, out, max_tokens=4)
    assert run_batch(tiny_engine, source, out, max_tokens=3)["answered"] == 2
    with pytest.raises(UsageError, match="already exists"):
        run_batch(tiny_engine, source, out, max_tokens=3)


def test_a_bad_option_is_no_error_of_the_lines(tiny_engine: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "a"}])
    for options in ({"mix": "nobody"}, {"temperature": -1.0}):
        with pytest.raises(UsageError):
            run_batch(tiny_engine, source, tmp_path / "out.jsonl", **options)
        (tmp_path / "out.jsonl.part").unlink()


def test_two_processes_do_not_write_one_file(tiny_engine: Any, tmp_path: Path) -> None:
    from filelock import FileLock

    source = write(tmp_path / "in.jsonl", [{"prompt": "a"}])
    with FileLock(tmp_path / "out.jsonl.part.lock"), pytest.raises(Busy):
        run_batch(tiny_engine, source, tmp_path / "out.jsonl")


def test_no_such_input_is_one_sentence(tmp_path: Path, tiny_pack: Path) -> None:
    result = CliRunner().invoke(main, ["batch", "no.jsonl", str(tmp_path / "o"), "--pack", str(tiny_pack)])
    assert result.exit_code == 1 and "no file at no.jsonl" in result.output
    assert list(tmp_path.iterdir()) == []
