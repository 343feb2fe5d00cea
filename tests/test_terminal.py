"""Surroundings: no home, streams of other encodings or closed, directories that cannot be written, odd bytes."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_textfile import ENCODINGS, written

from loramix.cli import main
from loramix.commands.options import read_prompt
from loramix.commands.terminal import explain, need_cwd, read_stdin
from loramix.errors import InvalidPrompt, LoramixError, NotFound, UsageError
from loramix.models.hub import Place
from loramix.models.hub_errors import asking
from loramix.paths import cache_dir, data_dir
from loramix.prompts import as_messages


def own_process(*words: str | bytes, cwd: Path | None = None, **environment: str | None) -> Any:
    """The command in a process of its own; a variable that is None is unset."""
    known = {**os.environ, **{key: value for key, value in environment.items() if value is not None}}
    for key, value in environment.items():
        if value is None:
            known.pop(key, None)
    command = [sys.executable, "-m", "loramix", *words]
    return subprocess.run(
        command, capture_output=True, check=False, env=known, cwd=cwd, stdin=subprocess.DEVNULL
    )


def sentence(result: Any, code: int = 1) -> str:
    """The one line of an error."""
    said = str(result.stderr.decode("latin-1"))
    assert result.returncode == code and "Traceback" not in said, said
    return said


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user that the system does not know, without HOME: as in a container with ``--user 12345``."""
    for name in (
        "HOME",
        "LORAMIX_CACHE",
        "LORAMIX_DATA",
        "XDG_CACHE_HOME",
        "XDG_DATA_HOME",
        "HF_HOME",
        "HF_HUB_CACHE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_it_is_said_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for directory in (cache_dir, data_dir):
        with pytest.raises(NotFound, match="set HOME to one, or LORAMIX_CACHE and LORAMIX_DATA"):
            directory()
    result = CliRunner().invoke(main, ["pack", "list"])
    assert result.exit_code == 1 and "set HOME" in result.stderr
    with pytest.raises(NotFound, match="set HF_HOME, or HOME"), asking(Place("a/b")):
        pass
    monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path / "c"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "d"))
    assert cache_dir() == tmp_path / "c" and data_dir() == tmp_path / "d" / "loramix"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "cp437:strict", "utf-8"])
def test_output_replaces_what_it_cannot_write(encoding: str, tiny_pack: Path) -> None:
    result = own_process("plan", "--pack", str(tiny_pack), PYTHONIOENCODING=encoding)
    assert result.returncode == 0 and b"in all" in result.stdout, result.stderr
    result = own_process("route", "--pack", str(tiny_pack), "naïve – 你好", PYTHONIOENCODING=encoding)
    assert result.returncode == 0 and b"mix: " in result.stdout, result.stderr
    bad = own_process("pack", "show", "naïve–你好", PYTHONIOENCODING=encoding)
    assert "is not usable" in sentence(bad, 2)


@pytest.mark.parametrize("columns", ["0", "1"])
def test_a_table_needs_no_terminal_width(columns: str, tiny_pack: Path) -> None:
    result = own_process("plan", "--pack", str(tiny_pack), COLUMNS=columns)
    assert result.returncode == 0 and b"in all" in result.stdout


def test_bytes_that_are_no_text_are_named(tiny_pack: Path, tmp_path: Path) -> None:
    assert "argument 2" in sentence(own_process("run", b"caf\xe9", "--pack", str(tiny_pack)), 2)
    assert "not UTF-8" in sentence(own_process("chat", "--system", b"\xff", "--pack", str(tiny_pack)), 2)
    odd = os.fsencode(tmp_path) + b"/b\xe9.jsonl"
    with open(odd, "w") as file:  # noqa: PTH123  # a name that is no text
        file.write('{"prompt": "hi"}\n')
    out = tmp_path / "out.jsonl"
    result = own_process("batch", odd, str(out), "--pack", str(tiny_pack), "--mix", "base", "-n", "2")
    assert result.returncode == 0 and out.is_file(), "a file may have any name: " + str(result.stderr)
    with pytest.raises(InvalidPrompt, match="not UTF-8"):
        as_messages("caf\udce9")
    with pytest.raises(InvalidPrompt, match="half a character"):
        as_messages([{"role": "user", "content": "\ud83d"}])


class Stdin:
    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


@pytest.mark.parametrize("how", ENCODINGS[:5])
def test_stdin_may_have_a_mark(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = written(tmp_path / "a", "naïve\n你好", how).read_bytes()
    monkeypatch.setattr(sys, "stdin", Stdin(content))
    assert read_prompt(()) == "naïve\n你好"
    monkeypatch.setattr(sys, "stdin", Stdin(content))
    assert read_prompt(("-",)) == "naïve\n你好"


def test_stdin_that_is_closed_or_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"one\ntwo \xe9"))
    with pytest.raises(UsageError, match="stdin, line 2 cannot be used: 0xE9"):
        read_stdin()
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="stdin is closed"):
        read_stdin()


def test_a_chat_survives_bytes_that_are_no_text(tiny_pack: Path) -> None:
    command = [sys.executable, "-m", "loramix", "chat", "--pack", str(tiny_pack), "-n", "2"]
    result = subprocess.run(
        command, input=b"caf\xe9\n/skill \xff\n/history\nhello\n", capture_output=True, check=False
    )
    assert result.returncode == 0 and b"Traceback" not in result.stderr
    assert result.stderr.count(b"error: ") == 2 and b"not UTF-8" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_stdout_that_takes_nothing(tiny_pack: Path) -> None:
    command = [sys.executable, "-m", "loramix", "pack", "show", str(tiny_pack)]
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert result.returncode == 1 and b"make room on the disk" in result.stderr
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writer)
    assert result.returncode in (0, 1) and result.stderr == b"", "nobody is left to tell"


def test_a_directory_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    code = "import os, sys; os.rmdir(os.getcwd()); from loramix.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "train",
        "skill",
        "sentiment",
        "--data",
        "/dev/null",
        "--base",
        "/dev/null",
    ]
    result = subprocess.run(command, cwd=gone, capture_output=True, check=False)
    assert result.returncode == 1 and b"Traceback" not in result.stderr and b"error: " in result.stderr
    need_cwd()


def test_refusals_of_the_system_say_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("LORAMIX_CACHE", str(blocked / "cache"))
    monkeypatch.setenv("LORAMIX_DATA", str(tmp_path / "data"))
    with pytest.raises(OSError) as caught:
        (cache_dir() / "bases").mkdir(parents=True)
    assert explain(caught.value).endswith("; set LORAMIX_CACHE to a directory that can be written.")
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "data" / "packs"))
    assert "set LORAMIX_DATA" in explain(denied)
    assert "No space left on device; make room" in explain(OSError(errno.ENOSPC, "No space left on device"))
    temporary = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
    assert "set TMPDIR" in explain(temporary)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "--out" in explain(PermissionError(errno.EACCES, "Permission denied", "runs"))
    assert issubclass(NotFound, LoramixError)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}, "'image_url' (image)"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "'input_audio' (audio)"),
        ({"type": "file", "file": {"file_id": "x"}}, "'file' (file)"),
        ({"image": "x"}, "'without a type' (other)"),
    ],
)
def test_a_part_that_is_no_text_is_named(part: dict[str, Any], says: str) -> None:
    text = {"type": "text", "text": "What is this?"}
    with pytest.raises(InvalidPrompt) as caught:
        as_messages([{"role": "user", "content": [text, part]}])
    assert says in str(caught.value) and "text alone" in str(caught.value)
    assert as_messages([{"role": "user", "content": [text, text]}])[0]["content"] == "What is this?" * 2
