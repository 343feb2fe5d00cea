"""The plugin of ``llm``: unmodified ``llm`` finds it by its entry point, answers, streams and logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

llm = pytest.importorskip("llm")


@pytest.fixture
def environment(tiny_pack: Path, tmp_path: Path) -> dict[str, str]:
    """A user directory with the tiny pack, and llm's own."""
    packs = tmp_path / "data" / "packs"
    packs.mkdir(parents=True)
    (packs / "tiny").symlink_to(tiny_pack)
    return {**os.environ, "LORAMIX_DATA": str(tmp_path / "data"), "LLM_USER_PATH": str(tmp_path / "llm")}


def ask(environment: dict[str, str], *words: str) -> str:
    command = [sys.executable, "-m", "llm", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_packs_and_skills_are_models(environment: dict[str, str]) -> None:
    listed = ask(environment, "models", "list")
    for name in ("loramix/tiny", "loramix/tiny/sentiment", "loramix/tiny/base"):
        assert f"Loramix: {name}\n" in listed + "\n"


@pytest.mark.parametrize("streaming", [[], ["--no-stream"]])
def test_an_answer_is_the_engines_own(
    environment: dict[str, str], tiny_engine: Any, streaming: list[str]
) -> None:
    words = ["-m", "loramix/tiny/sentiment", "the quick fox", "-o", "max_tokens", "6", *streaming]
    said = ask(environment, *words)
    expected = tiny_engine.generate("the quick fox", mix="sentiment", max_tokens=6)
    assert said.strip() == expected.text.strip()
    logged = json.loads(ask(environment, "logs", "--json", "-n", "1"))[0]
    assert logged["response_json"]["mix"] == {"sentiment": 1.0}
    assert logged["output_tokens"] == len(expected.tokens)


def test_a_conversation_goes_on(environment: dict[str, str], tiny_engine: Any) -> None:
    first = ask(environment, "-m", "loramix/tiny/summarize", "one", "-o", "max_tokens", "4").rstrip("\n")
    second = ask(environment, "-c", "two", "-o", "max_tokens", "4")
    chat = [("user", "one"), ("assistant", first), ("user", "two")]
    messages = [{"role": role, "content": text} for role, text in chat]
    expected = tiny_engine.generate(messages, mix="summarize", max_tokens=4).text
    assert second.strip() == expected.strip()
