"""The terminal chat: a full context, messages of several lines, pastes."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from loramix import Engine
from loramix.cli import main
from loramix.commands.chat_loop import Chat
from loramix.errors import InvalidPrompt


def chat(pack: Path, typed: str, *options: str) -> Result:
    words = ["chat", "--pack", str(pack), "--ctx", "256", "--mix", "base", "-n", "2", *options]
    result = CliRunner().invoke(main, words, input=typed)
    assert result.exit_code == 0 and "Traceback" not in result.output, result.output
    return result


def users(result: Result) -> list[str]:
    return [line[6:] for line in result.stdout.splitlines() if line.startswith("user: ")]


def test_a_full_context_forgets_the_oldest_turns_and_says_so_once(tiny_pack: Path) -> None:
    turns = [f"turn {i} " + "x" * 60 for i in range(9)]
    result = chat(tiny_pack, "\n".join([*turns, "/history", "/reset", *turns, "/history"]) + "\n")
    assert "error" not in result.stderr
    assert result.stderr.count("the oldest turns are forgotten from now on") == 2  # once a conversation
    assert "/reset" in result.stderr
    found = users(result)
    assert turns[-1] in found and turns[0] not in found and len(found) == 2 * found.index(turns[-1]) + 2


def test_the_system_message_stays_and_turns_go_in_pairs(tiny_engine: Engine, monkeypatch: Any) -> None:
    asked: list[list[dict[str, str]]] = []
    stream = tiny_engine.stream

    def seen(messages: Sequence[dict[str, str]], **options: Any) -> Any:
        asked.append(list(messages))
        return stream(messages, **options)

    monkeypatch.setattr(tiny_engine, "stream", seen)
    talk = Chat(tiny_engine, system="be brief", mix="base", max_tokens=3)
    for i in range(8):
        talk.turn(f"turn {i} " + "y" * 50)
    for messages in asked:
        assert messages[0] == {"role": "system", "content": "be brief"}
        assert [m["role"] for m in messages[1:]] == ["user", "assistant"] * (len(messages) // 2 - 1) + [
            "user"
        ]
        assert tiny_engine.count_tokens(messages) + 3 <= tiny_engine.n_ctx
    assert len(asked[-1]) < 16 and asked[-1][-1]["content"].startswith("turn 7")


@pytest.mark.parametrize("system", ["", "s" * 300])
def test_one_message_that_is_too_long(system: str, tiny_engine: Engine) -> None:
    talk = Chat(tiny_engine, system=system or None, mix="base", max_tokens=3)
    if not system:
        talk.turn("hello")
    kept = list(talk.messages)
    with pytest.raises(InvalidPrompt, match=r"holds 256.*--ctx.*/reset") as error:
        talk.turn("hi" if system else "z" * 400)
    assert ("system message" in str(error.value)) == bool(system)
    assert talk.messages == kept
    if not system:
        talk.turn("again")
        assert [m["content"] for m in talk.messages if m["role"] == "user"] == ["hello", "again"]


@pytest.mark.parametrize(
    "typed, message",
    [
        ('"""\none\n  two\n"""\n', "one\n  two"),
        ('"""one\n\n/quit\ntwo"""\n', "one\n\n/quit\ntwo"),
        ('"""all in one"""\n', "all in one"),
        ('"""/reset"""\n', "/reset"),
        ('  """a "quoted" word\n""" \n', 'a "quoted" word'),
    ],
)
def test_messages_of_several_lines(typed: str, message: str, tiny_pack: Path) -> None:
    result = chat(tiny_pack, f"{typed}/history\n")
    assert f"user: {message}\nassistant: " in result.stdout
    assert result.stdout.count("user: ") == 1


def test_quotes_that_are_not_closed(tiny_pack: Path) -> None:
    result = chat(tiny_pack, 'hello\n/history\n"""\nnever sent\n')
    assert "not sent" in result.stderr and '"""' in result.stderr
    assert result.stderr.count("[base]") == 1
    nothing = chat(tiny_pack, '""""""\n"""\n\n"""\n/history\n')
    assert "user: " not in nothing.stdout and "error" not in nothing.stderr


def test_help_names_quotes_and_reset(tiny_pack: Path) -> None:
    said = chat(tiny_pack, "/help\n").stderr
    assert '"""' in said and "several lines" in said and "/reset" in said


@pytest.mark.parametrize("bracketed", [False, True])
def test_a_paste_is_one_message(bracketed: bool, tiny_pack: Path, tmp_path: Path) -> None:
    """On a real terminal: lines that come at once belong together, with or without bracketed paste."""
    inputrc = tmp_path / "inputrc"
    inputrc.write_text(f"set enable-bracketed-paste {'on' if bracketed else 'off'}\n")
    master, slave = pty.openpty()
    words = ["chat", "--pack", str(tiny_pack), "--ctx", "256", "--mix", "base", "-n", "2", "--threads", "1"]
    child = subprocess.Popen(
        [sys.executable, "-m", "loramix", *words],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "INPUTRC": str(inputrc), "TERM": "xterm"},
        start_new_session=True,
    )
    os.close(slave)
    seen = ""

    def wait_for(text: str) -> None:
        nonlocal seen
        limit = time.monotonic() + 120
        while text not in seen:
            assert time.monotonic() < limit, seen
            seen += os.read(master, 4096).decode("utf-8", "replace")

    try:
        wait_for("> ")
        paste = "first\nsecond\nthird"
        typed = f"\x1b[200~{paste}\x1b[201~\n" if bracketed else paste + "\n"
        os.write(master, typed.encode())
        wait_for("[base]")
        seen = seen.partition("[base]")[2]
        wait_for("> ")
        os.write(master, b"/history\n")
        wait_for("assistant: ")
        assert seen.count("user: ") == 1
        assert "user: first\r\nsecond\r\nthird" in seen
        os.write(master, b"/quit\n")
        child.wait(60)
    finally:
        child.kill()
        child.wait()
        os.close(master)


def test_a_piped_file_with_a_mark(tiny_pack: Path) -> None:
    result = chat(tiny_pack, "\ufeffhello\n\ufeff/history\n")
    assert "user: hello\nassistant: " in result.stdout and result.stderr.count("[base]") == 1


def test_a_message_that_begins_like_a_command_is_named(tiny_pack: Path) -> None:
    said = chat(tiny_pack, "/etc/passwd is what?\n/policy nosuch\n/help\n").stderr
    assert (
        said.count("is no command") == 1
        and "/etc/passwd is no command; put a message that begins with /" in said
    )
    assert said.count("/reset") == 3
