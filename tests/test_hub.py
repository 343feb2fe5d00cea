"""Pulling bases from a stand-in hub over loopback, through the hub's real client: what comes, and what is refused."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, Hub
from test_cli import refused, run
from tiny import write_base

from loramix.errors import Busy, InvalidArtifact, NoSpace, NotFound, Unsupported, UsageError
from loramix.models import bases, hub
from loramix.models.known_bases import BASES, Base

constants = pytest.importorskip("huggingface_hub.constants")

NAME = "some/tiny-GGUF:tiny.Q4_K_M.gguf"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_base(tmp_path_factory.mktemp("gguf") / "tiny.gguf", kind="F16").read_bytes()


def left(tmp_path: Path) -> list[str]:
    """Files of the client's cache that hold content."""
    return sorted(path.name for path in (tmp_path / "hf").rglob("blobs/*"))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_pull_lands_in_the_hubs_cache_checked_and_is_found_by_name(
    standin: Hub, gguf: bytes, tmp_path: Path
) -> None:
    standin.add(
        "some/tiny-GGUF", **{"tiny.Q4_K_M.gguf": gguf, "tiny.Q8_0.gguf": gguf[::-1], "README.md": b"#"}
    )
    shown = run("pull", "some/tiny-GGUF")  # Q4_K_M, where there are several
    assert shown.exit_code == 0, shown.output
    path = Path(shown.stdout.strip())
    assert path.read_bytes() == gguf
    assert path.is_relative_to(tmp_path / "hf" / "hub")
    assert path.resolve().name == digest(gguf)
    assert bases.find(NAME) == bases.find("some/tiny-GGUF") == bases.resolve(NAME + "@main") == path
    record = json.loads((tmp_path / "data" / "pulled.json").read_text())[NAME + "@main"]
    assert record["sha256"] == digest(gguf) and record["commit"] == f"{1:040x}"
    asked = len(standin.downloads())
    assert bases.pull(NAME) == path and len(standin.downloads()) == asked == 1


def test_no_token_follows_to_another_host(standin: Hub, gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    standin.add("some/tiny-GGUF", **{"tiny.Q4_K_M.gguf": gguf}).private = True
    bases.pull(NAME)
    sent = {request.path.split("/")[1]: request.headers.get("authorization") for request in standin.requests}
    assert sent["some"] == f"Bearer {TOKEN}"
    assert sent["cdn"] is None


def test_a_cut_download_goes_on_where_it_was(standin: Hub, gguf: bytes) -> None:
    standin.add("some/tiny-GGUF", **{"tiny.Q4_K_M.gguf": gguf})
    at = len(gguf) * 9 // 10
    standin.cuts = [at]
    assert bases.pull(NAME).read_bytes() == gguf
    assert [request.headers.get("range") for request in standin.downloads()] == [
        None,
        f"bytes={at // 4096 * 4096}-",
    ]


def test_a_dead_line_leaves_what_came_and_the_next_pull_takes_it_up(
    standin: Hub, gguf: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    standin.add("some/tiny-GGUF", **{"tiny.Q4_K_M.gguf": gguf})
    at = len(gguf) * 9 // 10
    standin.cuts = [at] + 20 * [0]
    with pytest.raises(NotFound, match="run the same command again; it resumes the download"):
        bases.pull(NAME)
    assert left(tmp_path) == [digest(gguf) + ".loramix.incomplete"]
    assert bases.find(NAME) is None
    standin.cuts, asked = [], len(standin.downloads())
    assert bases.pull(NAME).read_bytes() == gguf
    assert [request.headers["range"] for request in standin.downloads()[asked:]] == [
        f"bytes={at // 4096 * 4096}-"
    ]
    assert left(tmp_path) == [digest(gguf)]


def test_content_with_another_digest_is_not_kept(standin: Hub, gguf: bytes, tmp_path: Path) -> None:
    standin.add("some/tiny-GGUF", **{"tiny.Q4_K_M.gguf": gguf})
    standin.spoil = True
    refused(run("pull", NAME), says=f"needs {digest(gguf)[:12]}; it was discarded")
    assert left(tmp_path) == [] and bases.find(NAME) is None
    standin.spoil = False
    refused(
        run("pull", NAME, "--sha256", "0" * 64),
        says=f"sha256 {digest(gguf)[:12]}, needs 000000000000; it was not",
    )
    assert len(standin.downloads()) == 1  # not even asked for
    assert run("pull", NAME, "--sha256", digest(gguf)).exit_code == 0
    refused(run("pull", NAME, "--sha256", "xyz"), code=2, says="64 lower-case hex digits")


def test_a_name_that_stands_for_another_content_than_before_is_refused(
    standin: Hub, gguf: bytes, tmp_path: Path
) -> None:
    repo = standin.add("some/tiny-GGUF", **{"tiny.Q4_K_M.gguf": gguf})
    old = bases.pull(NAME)
    other = write_base(tmp_path / "other.gguf", seed=5, kind="F16").read_bytes()
    repo.files["tiny.Q4_K_M.gguf"] = other
    refused(
        run("pull", NAME),
        says=f"pulled before with sha256 {digest(gguf)[:12]} and now has {digest(other)[:12]}",
    )
    assert bases.find(NAME) == old and old.read_bytes() == gguf and len(standin.downloads()) == 1
    assert bases.pull(NAME, revision=f"{1:040x}") == old  # a commit stands for the same for ever
    new = bases.pull(NAME, sha256=digest(other))
    assert new.read_bytes() == other and bases.find(NAME) == new
    assert bases.pull(NAME) == new


def test_each_thing_that_is_not_there_has_its_own_sentence(standin: Hub, gguf: bytes) -> None:
    standin.add("some/tiny-GGUF", **{"a.Q8_0.gguf": gguf, "b.Q8_0.gguf": gguf})
    standin.add("some/plain", **{"README.md": b"#", "x-00001-of-00002.gguf": gguf})
    refused(
        run("pull", "some/nothing:x.gguf"),
        says="some/nothing does not exist on the hub, or it is private",
    )
    refused(run("pull", "some/tiny-GGUF:x.gguf"), says="has no file 'x.gguf' at revision main")
    refused(run("pull", "some/tiny-GGUF:a.Q8_0.gguf@v9"), says="has no revision 'v9'")
    refused(run("pull", "some/tiny-GGUF", "--revision", "v9"), says="has no revision 'v9'")
    refused(
        run("pull", "some/tiny-GGUF"),
        code=2,
        says="name one as some/tiny-GGUF:FILE: a.Q8_0.gguf, b.Q8_0.gguf",
    )
    refused(run("pull", "some/plain"), says="no GGUF file that is not split")
    refused(run("pull", "-x-/no//way"), says="", code=2)


def test_a_gated_or_private_repository_says_how_to_log_in(
    standin: Hub, gguf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = standin.add("some/tiny-GGUF", **{"tiny.Q4_K_M.gguf": gguf})
    repo.gated = True
    refused(
        run("pull", NAME),
        says="is gated: accept its terms on its page on the hub, then log in with 'hf auth login'",
    )
    repo.gated, repo.private = False, True
    refused(
        run("pull", NAME),
        says="this user has no access: check the name, or log in with 'hf auth login', or set HF_TOKEN",
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    refused(run("pull", "some/nothing:x.gguf"), says="there is no repository some/nothing on the hub")
    assert run("pull", NAME).exit_code == 0


def test_a_hub_that_fails_or_is_no_hub(standin: Hub, gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    standin.add("some/tiny-GGUF", **{"tiny.Q4_K_M.gguf": gguf})
    standin.failing = 418
    refused(run("pull", NAME), says="the hub failed to serve some/tiny-GGUF:tiny.Q4_K_M.gguf@main (HTTP 418)")
    standin.failing = 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(run("pull", NAME), says="HF_HUB_OFFLINE prevents its download")


def test_offline_takes_what_the_hubs_cache_has(
    standin: Hub, gguf: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin.add("some/tiny-GGUF", **{"tiny.Q4_K_M.gguf": gguf})
    path = bases.pull(NAME, revision=f"{1:040x}")
    (Path(os.environ["LORAMIX_DATA"]) / "pulled.json").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert bases.find(f"{NAME}@{1:040x}") is None
    assert bases.pull(NAME, revision=f"{1:040x}") == path == bases.find(f"{NAME}@{1:040x}")


def test_a_disk_too_small_is_told_before_anything_is_fetched(
    standin: Hub, gguf: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    standin.add("some/tiny-GGUF", **{"tiny.Q4_K_M.gguf": gguf})
    usage = shutil.disk_usage(tmp_path)._replace(free=hub.SPARE_BYTES + len(gguf) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    refused(run("pull", NAME), says="MB free: make room, or set HF_HOME")
    assert standin.downloads() == [] and left(tmp_path) == []


def test_a_disk_that_fills_on_the_way_keeps_nothing(
    standin: Hub, gguf: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    standin.add("some/tiny-GGUF", **{"tiny.Q4_K_M.gguf": gguf})

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > len(gguf) // 2:
                super().write(data[: len(gguf) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    opened = Path.open

    def filling(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if path.name.endswith(".incomplete") and "a" in mode:
            return Full(path, mode)
        return opened(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", filling)
    with pytest.raises(NoSpace, match="its partial file was deleted"):
        bases.pull(NAME)
    assert left(tmp_path) == [] and bases.find(NAME) is None
    monkeypatch.undo()


def test_what_is_no_base_is_not_kept(standin: Hub, gguf: bytes, tmp_path: Path) -> None:
    repo = standin.add("some/tiny-GGUF", **{"junk.gguf": b"GGUF" + bytes(8192)})
    with pytest.raises(InvalidArtifact, match="some/tiny-GGUF:junk"):
        bases.pull("some/tiny-GGUF:junk.gguf")
    assert left(tmp_path) == []
    repo.architecture = "mamba"  # known to the hub before a byte is fetched
    with pytest.raises(Unsupported, match="'mamba'"):
        bases.pull("some/tiny-GGUF")
    assert len(standin.downloads()) == 1


def test_two_pulls_of_one_file_do_not_meet(standin: Hub, gguf: bytes, tmp_path: Path) -> None:
    from filelock import FileLock

    standin.add("some/tiny-GGUF", **{"tiny.Q4_K_M.gguf": gguf})
    lock = tmp_path / f"hf/hub/.locks/models--some--tiny-GGUF/{digest(gguf)}.lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock), pytest.raises(Busy, match="another process is fetching"):
        bases.pull(NAME)


def test_named_bases_are_pinned(standin: Hub, gguf: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tinyllama-1.1b", "tinyllama-1.1b:Q4_0", "tinyllama-1.1b:Q8_0"):
        place = hub.parse(BASES[name].hub)
        assert place and len(place.revision) == 40 and len(BASES[name].sha256) == 64
    refused(run("pull", "tinyllama-1.1b", "--quant", "Q9"), code=2, says="use one of Q4_K_M, Q4_0, Q8_0")
    refused(run("pull", "tinyllama-1.1b", "--revision", "main"), code=2, says="is pinned to one file")
    refused(run("pull", "smollm2-135m", "--quant", "Q4_0"), code=2, says="leave the quantization out")
    standin.add("TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF", **{"tinyllama-1.1b-chat-v1.0.Q4_0.gguf": gguf})
    repo = standin.repos["TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF"]
    commit = hub.parse(BASES["tinyllama-1.1b"].hub).revision  # type: ignore[union-attr]
    monkeypatch.setattr(repo, "at", lambda revision: (commit, repo.files) if revision == commit else None)
    refused(
        run("pull", "tinyllama-1.1b", "--quant", "Q4_0"), says="needs da3087fb14ae; it was not downloaded"
    )
    pinned = Base(
        **{
            **{k: getattr(BASES["tinyllama-1.1b:Q4_0"], k) for k in Base.__slots__},
            "sha256": digest(gguf),
        }
    )
    monkeypatch.setitem(BASES, "tinyllama-1.1b:Q4_0", pinned)
    path = bases.pull("tinyllama-1.1b", quant="Q4_0")
    assert path.read_bytes() == gguf
    assert bases.find("tinyllama-1.1b:Q4_0") == path and bases.find("tinyllama-1.1b") is None


@pytest.mark.parametrize("text", ["smollm2-135m", "a/b/c", "a b/c", "../x/y", "/etc/passwd", "a/b:", "a/b@"])
def test_what_is_no_place_on_the_hub(text: str) -> None:
    assert hub.parse(text) is None


def test_places() -> None:
    assert hub.parse("a/b") == ("a/b", "", "main")
    assert hub.parse("a/b:c/d.gguf@v1") == ("a/b", "c/d.gguf", "v1")
    assert str(hub.parse("a/b:c.gguf")) == "a/b:c.gguf@main"
    with pytest.raises(UsageError):
        bases.pull("a/-b--..:x.gguf")


def test_the_environment_alone_decides_hub_and_cache(standin: Hub, gguf: bytes, tmp_path: Path) -> None:
    """In a process of its own, as a user runs it."""
    standin.add("some/tiny-GGUF", **{"tiny.Q4_K_M.gguf": gguf})
    environment = {**os.environ, "HF_ENDPOINT": standin.url, "HF_HOME": str(tmp_path / "home")}

    def pull(**extra: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "loramix", "pull", NAME]
        return subprocess.run(
            command, env={**environment, **extra}, capture_output=True, text=True, check=False, timeout=300
        )

    dead = pull(HF_ENDPOINT="http://127.0.0.1:9")
    assert dead.returncode == 1 and dead.stderr.count("\n") == 1
    assert dead.stderr.startswith(f"error: the hub cannot be reached for {NAME}@main")
    done = pull(HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "home" / "hub")
    assert Path(done.stdout.strip()).read_bytes() == gguf
