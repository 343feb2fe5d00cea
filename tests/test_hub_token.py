"""Tokens that the hub does not accept, or that lack a right: named by where they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_hub
from hub_server import TOKEN, Hub
from test_cli import refused, run
from test_hub import NAME

gguf = test_hub.gguf


@pytest.mark.parametrize("command", [["pull", NAME], ["pack", "pull", "some/tiny-GGUF"]])
def test_a_stale_token_is_named_even_for_a_public_repository(
    command: list[str], standin: Hub, gguf: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    repo = standin.add("some/tiny-GGUF", **{"tiny.Q4_K_M.gguf": gguf})
    monkeypatch.setenv("HF_TOKEN", "hf_of_last_year")
    for gated, private in ((False, False), (True, False), (False, True)):
        repo.gated, repo.private = gated, private
        result = run(*command)
        refused(result, says="rejects the token in the environment variable HF_TOKEN (401)")
        assert "unset HF_TOKEN" in result.stderr and "hf_of_last_year" not in result.stderr
        assert "log in" not in result.stderr
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "hf").mkdir(exist_ok=True)
    (tmp_path / "hf" / "token").write_text("hf_of_last_year\n")
    repo.gated = repo.private = False
    result = run(*command)
    refused(result, says=f"the token in the file {tmp_path / 'hf' / 'token'} (401)")
    assert "hf auth logout" in result.stderr and "unset HF_TOKEN" not in result.stderr


def test_a_valid_token_without_the_right_is_named(
    standin: Hub, gguf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin.add("some/tiny-GGUF", **{"tiny.Q4_K_M.gguf": gguf})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    standin.failing = 403
    refused(run("pull", NAME), says="the token in the environment variable HF_TOKEN lacks the permission")
    monkeypatch.delenv("HF_TOKEN")
    refused(run("pull", NAME), says="log in with 'hf auth login', or set HF_TOKEN")


def test_a_token_with_an_odd_character_is_named_and_not_shown(
    standin: Hub, gguf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin.add("some/tiny-GGUF", **{"tiny.Q4_K_M.gguf": gguf})
    monkeypatch.setenv("HF_TOKEN", "hf_s\u00e9cret")
    result = run("pull", NAME)
    assert (
        result.exit_code == 2
        and "the token in the environment variable HF_TOKEN has a character" in result.stderr
    )
    assert "cret" not in result.stderr and "Traceback" not in result.stderr


def test_a_token_that_is_not_sent_is_not_blamed(
    standin: Hub, gguf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin.add("some/tiny-GGUF", **{"tiny.Q4_K_M.gguf": gguf}).private = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    refused(run("pull", NAME), says="unset HF_HUB_DISABLE_IMPLICIT_TOKEN")
