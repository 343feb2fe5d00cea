"""A base that is missing: asked about on a terminal, with its size; a sentence in a script."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import Hub

from loramix.models import bases

BASE = "some/tiny-GGUF:tiny.gguf"


@pytest.fixture
def away(standin: Hub, tiny_pack: Path, tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny pack, its base on the hub and not on this machine."""
    standin.add("some/tiny-GGUF", **{"tiny.gguf": tiny_base.read_bytes()})
    pack = Path(shutil.copytree(tiny_pack, tmp_path / "away"))
    manifest = pack / "pack.toml"
    manifest.write_text(manifest.read_text().replace(str(tiny_base), BASE))
    return pack


def run(pack: Path, hub: Hub, typed: str | None, tmp_path: Path, command: str = "run") -> tuple[int, str]:
    """Exit code and what a terminal shows; ``typed`` answers the question, None is a script without a terminal."""
    words = [sys.executable, "-m", "loramix", command, "--pack", str(pack), "--ctx", "256"]
    words += ["--mix", "base", "-n", "2", "hello"] if command == "run" else ["hello"]
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    if typed is None:
        done = subprocess.run(
            words, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr
    master, slave = pty.openpty()
    child = subprocess.Popen(words, env=env, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    seen, asked, limit = "", False, time.monotonic() + 240
    while time.monotonic() < limit:
        try:
            part = os.read(master, 4096)
        except OSError:  # Linux: the child's end is closed
            break
        if not part:
            break
        seen += part.decode("utf-8", "replace")
        if not asked and "[Y/n]" in seen:
            asked = True
            os.write(master, typed.encode())
    os.close(master)
    return child.wait(60), seen


def test_yes_fetches_it_and_the_command_goes_on(away: Path, standin: Hub, tmp_path: Path) -> None:
    code, seen = run(away, standin, "\n", tmp_path)  # Enter is yes
    assert code == 0, seen
    assert f"Base {BASE} is not on this machine. Fetch it now (1 MB)?" in seen
    assert bases.find(BASE) is not None
    code, seen = run(away, standin, "\n", tmp_path, "route")
    assert code == 0 and "[Y/n]" not in seen


@pytest.mark.parametrize("typed", ["n\n", "\x04"])
def test_no_leaves_the_sentence(typed: str, away: Path, standin: Hub, tmp_path: Path) -> None:
    code, seen = run(away, standin, typed, tmp_path, "route")
    assert code == 1 and f"loramix pull {BASE}" in seen and "Traceback" not in seen, seen
    assert bases.find(BASE) is None


def test_a_script_is_not_asked(away: Path, standin: Hub, tmp_path: Path) -> None:
    code, said = run(away, standin, None, tmp_path)
    assert code == 1 and "[Y/n]" not in said and not standin.requests
    assert len(said.splitlines()) == 1 and f"loramix pull {BASE}" in said


def test_what_cannot_be_fetched_is_not_asked_about(away: Path, standin: Hub, tmp_path: Path) -> None:
    del standin.repos["some/tiny-GGUF"]
    code, seen = run(away, standin, "\n", tmp_path, "route")
    assert code == 1 and "[Y/n]" not in seen and "is on this machine" in seen


def test_sizes(standin: Hub, tiny_base: Path) -> None:
    standin.add("some/tiny-GGUF", **{"tiny.gguf": tiny_base.read_bytes()})
    for name in (BASE, "some/tiny-GGUF", "some/tiny-GGUF@main"):
        assert bases.download_bytes(name) == tiny_base.stat().st_size
    for name in ("some/none:x.gguf", "nosuch", "./x.gguf", "dir/x.gguf"):
        assert bases.download_bytes(name) is None
    for base in bases.BASES:
        assert (bases.download_bytes(base) or 0) > 50_000_000
