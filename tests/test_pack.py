"""Packs: manifests read or refused, files that are what they claim, changes that leave a whole pack."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from filelock import FileLock
from tiny import random_head

import loramix.pack.pack as packs
from loramix.cli import main
from loramix.errors import Busy, InvalidArtifact, LoramixError, NotFound, UnknownSkill, UsageError, WrongBase
from loramix.models.gate_bank import Bank
from loramix.pack.edit import NewGate, add_skill, remove_skill, set_gate
from loramix.pack.manifest import BaseReference, Manifest, SkillEntry, read_manifest, write_manifest
from loramix.pack.pack import Pack, list_packs
from loramix.paths import write_bytes

BASE = b"GGUF base"
BASE_SHA = hashlib.sha256(BASE).hexdigest()
NAMES = ["sentiment", "title"]


def adapter(name: str) -> bytes:
    return b"GGUF" + name.encode() * 10


def gate_for(skills: list[str], base_sha256: str = BASE_SHA) -> bytes:
    return random_head(skills, base_sha256)


@pytest.fixture(autouse=True)
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """User's and shipped packs in a temporary directory, with files outside that nothing may touch."""
    monkeypatch.setenv("LORAMIX_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(packs, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.gguf").write_bytes(adapter("sentiment"))
    return SimpleNamespace(user=tmp_path / "data" / "packs", shipped=tmp_path / "shipped")


def make(directory: Path, skills: tuple[str, ...] = ("sentiment", "title"), gate: bool = True) -> Pack:
    manifest = Manifest(
        format=1,
        name="small",
        description="A pack for tests.",
        license="Apache-2.0",
        base=BaseReference(name="tiny", sha256=BASE_SHA),
    )
    write_manifest(directory, manifest)
    for name in skills:
        add_skill(
            directory, name, adapter(name), description=f"Does {name}.", max_tokens=8, card=f"# {name}\n"
        )
    if gate:
        set_gate(directory, gate_for(list(skills)))
    return Pack.load(directory)


def snapshot(root: Path) -> dict[str, bytes | None]:
    """Every file and directory below ``root``, locks left out."""
    paths = (path for path in root.rglob("*") if path.name != ".lock")
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in paths}


def edit(directory: Path, old: str, new: str) -> None:
    path = directory / "pack.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# --- reading ---------------------------------------------------------------------------------------------


def test_a_good_pack(tmp_path: Path) -> None:
    pack = make(tmp_path / "p")
    assert pack.name == "small" and [skill.name for skill in pack.skills] == ["sentiment", "title"]
    assert pack.skill("title").max_tokens == 8
    assert pack.adapter_path("title") == tmp_path / "p" / "skills" / "title.gguf"
    assert pack.adapter_bytes("title") == adapter("title")
    assert pack.gate_path == tmp_path / "p" / "gate.npz"
    gate = pack.gate()
    assert gate is not None and gate.info.skills == ["sentiment", "title"]
    assert pack.check() == []


def test_notes_of_an_unfinished_pack(tmp_path: Path) -> None:
    pack = make(tmp_path / "p", (), gate=False)
    assert pack.gate_path is None and pack.gate() is None
    skill, gate = pack.check()
    assert "loramix skill add" in skill and "loramix train gate" in gate


def test_manifest_by_hand(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "pack.toml").write_text(
        f"""
        format = 1
        name = "small"
        description = "Über-pack → 日本"
        license = "MIT"
        [base]
        name = "tiny"
        sha256 = "{BASE_SHA}"
        [[skills]]
        name = "title"
        description = ""
        file = "skills/title.gguf"
        sha256 = "{"0" * 64}"
        max_tokens = 8
        example = "two\\nlines\\tand a tab"
        """
    )
    manifest = Pack.load("./p").manifest
    assert manifest.gate is None and manifest.skills[0].card is None
    assert write_manifest(tmp_path / "copy", manifest) == manifest == read_manifest(tmp_path / "copy")


def test_found_by_name_by_path_and_in_order(homes: SimpleNamespace, tmp_path: Path) -> None:
    make(homes.shipped / "alpha")
    make(homes.shipped / "beta")
    make(homes.user / "alpha", ("title",))
    (homes.user / "broken").mkdir()
    (homes.user / "broken" / "pack.toml").write_text("format = ")
    make(homes.user / "Not-a-name")
    assert len(Pack.load("alpha").skills) == 1  # the user's hides ours
    assert len(Pack.load("beta").skills) == 2
    make(tmp_path / "beta", ("title",))
    assert len(Pack.load("beta").skills) == 1  # a directory with a pack.toml is meant
    assert Pack.load(homes.shipped / "beta").directory == homes.shipped / "beta"
    listings = list_packs()
    assert [listing.name for listing in listings] == ["alpha", "beta", "broken"]
    assert listings[0].directory == homes.user / "alpha" and listings[0].pack is not None
    assert listings[2].pack is None and isinstance(listings[2].error, InvalidArtifact)
    with pytest.raises(NotFound, match="alpha, beta, broken"):
        Pack.load("gamma")


@pytest.mark.parametrize("name", ["nothere", "./nothere", "/nothere", "a/b", "x\0/y", "../shipped"])
def test_no_such_pack(name: str) -> None:
    with pytest.raises(NotFound, match="none yet"):
        Pack.load(name)


@pytest.mark.parametrize("name", ["", "..", "-x", "A", "a" * 65, "con", "x\0"])
def test_names_no_pack_can_have(name: str) -> None:
    with pytest.raises(UsageError):
        Pack.load(name)


def test_unknown_skill_lists_those_there_are(tmp_path: Path) -> None:
    pack = make(tmp_path / "p")
    for call in (pack.skill, pack.adapter_path, pack.adapter_bytes):
        with pytest.raises(UnknownSkill, match="it has: sentiment, title"):
            call("sentimnet")


# --- manifests that are refused --------------------------------------------------------------------------

BAD: dict[str, tuple[str, str, str]] = {
    "not TOML": ("format = 1", "format = = 1", "line 1"),
    "cut": ('name = "small"', 'name = "small', "line"),
    "a key twice": ("format = 1", "format = 1\nformat = 1", "line"),
    "format 2": ("format = 1", "format = 2", "format"),
    "format missing": ("format = 1", "", "format"),
    "unknown key": ("format = 1", "format = 1\ncode = 'x'", "code"),
    "unknown skill key": ("max_tokens = 8", "max_tokens = 8\njinja = '{{x}}'", "jinja"),
    "max_tokens of 0": ("max_tokens = 8", "max_tokens = 0", "max_tokens"),
    "max_tokens huge": ("max_tokens = 8", "max_tokens = 10000000", "max_tokens"),
    "max_tokens of 5000 digits": ("max_tokens = 8", "max_tokens = " + "9" * 5000, ""),
    "max_tokens a text": ("max_tokens = 8", "max_tokens = '8'", "max_tokens"),
    "short digest": (BASE_SHA, "abc", "sha256"),
    "digest with a newline": (BASE_SHA + '"', BASE_SHA + '\\n"', "sha256"),
    "terminal escape": ("A pack for tests.", "\\u001b[2J", "description"),
    "pack name": ('name = "small"', 'name = "../small"', "names"),
    "skill name climbs": ('name = "sentiment"', 'name = "../x"', "names"),
    "skill name reserved": ('name = "sentiment"', 'name = "base"', "names"),
    "skill twice": ('name = "sentiment"', 'name = "title"', "repeated"),
    "file twice": ("skills/sentiment.gguf", "skills/title.gguf", "twice"),
    "file twice but for case": ("skills/sentiment.gguf", "skills/Title.gguf", "twice"),
    "a pickle": ("skills/sentiment.gguf", "skills/sentiment.pt", ".gguf"),
    "gate a pickle": ("gate.npz", "gate.pkl", ".npz"),
    "card a program": ("skills/sentiment.md", "skills/sentiment.sh", ".md"),
    "climbs": ("skills/sentiment.gguf", "../secret.gguf", "refused"),
    "climbs inside": ("skills/sentiment.gguf", "skills/../../secret.gguf", "refused"),
    "absolute": ("skills/sentiment.gguf", "/etc/x.gguf", "refused"),
    "drive": ("skills/sentiment.gguf", "C:/x.gguf", "refused"),
    "backslash": ("skills/sentiment.gguf", "..\\\\secret.gguf", "refused"),
    "NUL": ("skills/sentiment.gguf", "skills/\\u0000.gguf", "refused"),
    "empty path": ("skills/sentiment.gguf", "", "refused"),
    "gate climbs": ("gate.npz", "../gate.npz", "refused"),
    "card climbs": ("skills/sentiment.md", "../x.md", "refused"),
    "too long": ("format = 1", "format = 1\n#" + "x" * 2**20, "larger"),
    "nested deep": ("format = 1", "format = " + "[" * 100_000, ""),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_manifests_are_refused(case: str, tmp_path: Path) -> None:
    make(tmp_path / "p")
    old, new, found = BAD[case]
    edit(tmp_path / "p", old, new)
    with pytest.raises(InvalidArtifact) as caught:
        Pack.load(tmp_path / "p")
    assert found in str(caught.value) and len(str(caught.value)) < 600


def test_manifest_that_is_not_text(tmp_path: Path) -> None:
    make(tmp_path / "p")
    (tmp_path / "p" / "pack.toml").write_bytes(b"\xff\xfe\0\0")
    with pytest.raises(InvalidArtifact):
        Pack.load(tmp_path / "p")


# --- files that are not what they claim ------------------------------------------------------------------


def test_link_that_leads_outside(tmp_path: Path) -> None:
    pack = make(tmp_path / "p")
    path = tmp_path / "p" / "skills" / "sentiment.gguf"
    path.unlink()
    path.symlink_to(tmp_path / "secret.gguf")  # of the right digest even
    for call in (lambda: Pack.load(tmp_path / "p"), lambda: pack.adapter_bytes("sentiment"), pack.check):
        with pytest.raises(InvalidArtifact, match="outside"):
            call()
    assert (tmp_path / "secret.gguf").exists()


def test_directory_link_that_leads_outside(tmp_path: Path) -> None:
    make(tmp_path / "p", ("title",))
    (tmp_path / "p" / "skills").rename(tmp_path / "elsewhere")
    (tmp_path / "p" / "skills").symlink_to(tmp_path / "elsewhere")
    before = snapshot(tmp_path)
    for call in (
        lambda: Pack.load(tmp_path / "p"),
        lambda: remove_skill(tmp_path / "p", "title"),
        lambda: add_skill(tmp_path / "p", "new", adapter("new"), description="", max_tokens=1),
    ):
        with pytest.raises(InvalidArtifact, match="outside"):
            call()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("file", ["skills/sentiment.gguf", "gate.npz"])
def test_another_digest(file: str, tmp_path: Path) -> None:
    pack = make(tmp_path / "p")
    data = bytearray((tmp_path / "p" / file).read_bytes())
    data[7] ^= 1
    (tmp_path / "p" / file).write_bytes(data)
    with pytest.raises(InvalidArtifact) as caught:
        pack.check()
    digests = [hashlib.sha256(data).hexdigest()[:12], pack.skill("sentiment").sha256[:12]]
    assert file in str(caught.value) and digests[0] in str(caught.value)
    assert file == "gate.npz" or digests[1] in str(caught.value)
    assert "remove skill" in str(caught.value) or "loramix train gate" in str(caught.value)


@pytest.mark.parametrize("file", ["skills/sentiment.gguf", "skills/sentiment.md", "gate.npz"])
def test_missing_files(file: str, tmp_path: Path) -> None:
    pack = make(tmp_path / "p")
    (tmp_path / "p" / file).unlink()
    with pytest.raises(NotFound, match=file):
        pack.check()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    pack = make(tmp_path / "p")
    pack.adapter_path("title").unlink()
    os.mkfifo(tmp_path / "p" / "skills" / "title.gguf")
    with pytest.raises(NotFound):
        pack.adapter_bytes("title")


@pytest.mark.parametrize(
    ("gate", "error"),
    [
        (gate_for(["title", "sentiment"]), InvalidArtifact),  # the order is the classes'
        (gate_for(["sentiment"]), InvalidArtifact),
        (gate_for(["sentiment", "title"], "0" * 64), WrongBase),
        (b"PK", InvalidArtifact),
    ],
)
def test_gates_of_other_packs(gate: bytes, error: type[LoramixError], tmp_path: Path) -> None:
    pack = make(tmp_path / "p")
    before = snapshot(tmp_path)
    with pytest.raises(error, match="loramix train gate"):
        set_gate(tmp_path / "p", gate)
    assert snapshot(tmp_path) == before
    reference = pack.manifest.gate
    assert reference is not None
    edit(tmp_path / "p", reference.sha256, hashlib.sha256(gate).hexdigest())
    (tmp_path / "p" / "gate.npz").write_bytes(gate)
    with pytest.raises(error):
        Pack.load(tmp_path / "p").check()


def test_base_and_adapters_are_checked_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack, base, calls = make(tmp_path / "p"), tmp_path / "base.gguf", []

    def check_adapter(data: bytes, shape: object, name: str, base_sha256: str | None = None) -> None:
        calls.append((data, shape, Path(name).name, base_sha256))

    validate: Any = ModuleType("loramix.formats.validate")
    validate.read_base, validate.check_adapter = lambda path: (None, "shape"), check_adapter
    monkeypatch.setitem(sys.modules, "loramix.formats.validate", validate)
    templates: Any = ModuleType("loramix.templates.base_template")
    asked: list[Path] = []
    templates.check_template = asked.append
    monkeypatch.setitem(sys.modules, "loramix.templates.base_template", templates)
    with pytest.raises(NotFound):
        pack.check(base)
    base.write_bytes(b"GGUF other")
    with pytest.raises(WrongBase, match=BASE_SHA[:12]):
        pack.check(base)
    assert not calls
    base.write_bytes(BASE)
    assert pack.check(base) == []
    assert asked == [base]
    assert calls == [(adapter(n), "shape", f"{n}.gguf", BASE_SHA) for n in ("sentiment", "title")]


# --- changes ---------------------------------------------------------------------------------------------


def test_add_and_remove_give_back_the_pack(tmp_path: Path) -> None:
    pack = make(tmp_path / "p", gate=False)
    before = snapshot(tmp_path)
    source = tmp_path / "secret.gguf"
    change = add_skill(
        tmp_path / "p", "new", source, description="New.", max_tokens=3, example="Try\nme", card="# card"
    )
    assert change.pack == Pack.load(tmp_path / "p") and "loramix train gate" in change.message
    assert change.pack.adapter_bytes("new") == source.read_bytes()
    assert change.pack.skill("new").example == "Try\nme" and len(change.pack.check()) == 1
    change = remove_skill(tmp_path / "p", "new")
    assert change.pack.manifest == pack.manifest and snapshot(tmp_path) == before


def test_a_new_skill_drops_a_gate_that_does_not_know_it(tmp_path: Path) -> None:
    make(tmp_path / "p")
    change = add_skill(tmp_path / "p", "new", adapter("new"), description="", max_tokens=1)
    assert "gate is removed" in change.message and "loramix train gate" in change.message
    assert change.pack.gate() is None and not (tmp_path / "p" / "gate.npz").exists()


def test_the_gate_and_its_bank_outlive_a_skill_but_not_the_last(tmp_path: Path) -> None:
    make(tmp_path / "p")
    rng = np.random.default_rng(0)
    targets = np.float32([[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0], [0, 0, 1]])
    bank = Bank.of(rng.random((4, 6), np.float32), targets, np.arange(4, dtype=np.int32), [*NAMES, "base"])
    set_gate(tmp_path / "p", gate_for(NAMES), bank.to_bytes())
    change = remove_skill(tmp_path / "p", "title")
    gate, left = change.pack.gate(), change.pack.gate_bank()
    assert gate is not None and gate.info.skills == ["sentiment"] and "gate knows it" in change.message
    assert left is not None and left.classes == ("sentiment", "base")
    assert left.targets.tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    change = remove_skill(tmp_path / "p", "sentiment")
    assert change.pack.gate() is None and change.message == "skill sentiment removed."


@pytest.mark.parametrize("what", ["gate", "bank"])
def test_a_gate_that_cannot_be_used_does_not_hinder_a_removal(what: str, tmp_path: Path) -> None:
    pack = make(tmp_path / "p")
    if what == "gate":
        assert pack.gate_path is not None
        pack.gate_path.write_bytes(b"PK")
    else:
        set_gate(tmp_path / "p", gate_for(NAMES), b"no bank")
    change = remove_skill(tmp_path / "p", "title")
    assert change.pack.gate() is None and "gate is removed" in change.message
    assert change.pack.check()


def test_replacing_must_be_asked_for(tmp_path: Path) -> None:
    make(tmp_path / "p")
    before = snapshot(tmp_path)
    values: dict[str, Any] = {"description": "Better.", "max_tokens": 9}
    with pytest.raises(UsageError, match="already"):
        add_skill(tmp_path / "p", "title", adapter("better"), **values)
    assert snapshot(tmp_path) == before
    pack = add_skill(tmp_path / "p", "title", adapter("better"), replace_existing=True, **values).pack
    assert pack.adapter_bytes("title") == adapter("better")
    assert not (tmp_path / "p" / "skills" / "title.md").exists()  # the old skill's card


def test_a_skill_trained_anew_keeps_its_place_and_the_gate(tmp_path: Path) -> None:
    old = make(tmp_path / "p")
    (tmp_path / "better.gguf").write_bytes(adapter("better"))
    words = ["pack", "add", str(tmp_path / "p"), "sentiment", str(tmp_path / "better.gguf"), "--keep-gate"]
    words += ["--description", "Better.", "--max-tokens", "9"]
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 2 and "already" in refused.stderr
    done = CliRunner().invoke(main, [*words, "--replace"])
    assert done.exit_code == 0 and done.output == "skill sentiment replaced, and its gate stays.\n"
    new = Pack.load(tmp_path / "p")
    assert [skill.name for skill in new.skills] == [skill.name for skill in old.skills]
    assert new.manifest.gate == old.manifest.gate is not None and new.check() == []
    assert new.adapter_bytes("sentiment") == adapter("better")
    added = CliRunner().invoke(main, [*words[:3], "more", *words[4:]])
    assert added.exit_code == 0 and "gate is removed" in added.output


WRITES = ("skills/title", "skills/title", "gate", "gate-features", "pack.toml")


@pytest.mark.parametrize("done", range(len(WRITES) + 1))
def test_a_change_killed_anywhere_leaves_a_whole_pack(
    done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = make(tmp_path / "p")
    written: list[str] = []

    def killed(path: Path, content: bytes) -> None:
        if len(written) == done:
            raise KeyboardInterrupt
        written.append(str(path.relative_to(tmp_path / "p")))
        write_bytes(path, content)

    monkeypatch.setattr("loramix.pack.edit.write_bytes", killed)
    monkeypatch.setattr("loramix.pack.manifest.write_bytes", killed)

    def change() -> Pack:
        gate = NewGate(gate_for(["sentiment", "title"]), b"features")
        values: dict[str, Any] = {"description": "New.", "max_tokens": 1, "card": "# new"}
        return add_skill(
            tmp_path / "p", "title", adapter("x"), replace_existing=True, gate=gate, **values
        ).pack

    if done < len(WRITES):
        with pytest.raises(KeyboardInterrupt):
            change()
        assert Pack.load(tmp_path / "p").manifest == old.manifest
    else:
        assert change().skill("title").description == "New."
        assert [name.startswith(stem) for name, stem in zip(written, WRITES, strict=True)] == [True] * 5
    pack = Pack.load(tmp_path / "p")
    assert pack.check() == []
    assert pack.adapter_bytes("title") == adapter("x" if done == len(WRITES) else "title")
    monkeypatch.undo()
    change()
    assert Pack.load(tmp_path / "p").gate_features() == b"features"


def test_a_gate_comes_with_the_skill(tmp_path: Path) -> None:
    make(tmp_path / "p")
    values: dict[str, Any] = {"description": "", "max_tokens": 1}
    before = snapshot(tmp_path)
    with pytest.raises(InvalidArtifact, match="chooses between"):
        add_skill(tmp_path / "p", "new", adapter("n"), gate=NewGate(gate_for(["new"])), **values)
    assert snapshot(tmp_path) == before
    names = ["sentiment", "title", "new"]
    change = add_skill(tmp_path / "p", "new", adapter("n"), gate=NewGate(gate_for(names), b"f"), **values)
    gate = change.pack.gate()
    assert gate is not None and gate.info.skills == names and "gate knows it" in change.message
    change = add_skill(
        tmp_path / "p", "new", adapter("m"), gate=NewGate(gate_for(names)), replace_existing=True, **values
    )
    assert change.pack.gate() is not None and change.pack.gate_features() is None
    files = {path.name for path in (tmp_path / "p").iterdir()} - {".lock"}
    assert len(files) == 3  # skills, pack.toml and one gate: what is replaced goes


def test_one_change_at_a_time(tmp_path: Path) -> None:
    make(tmp_path / "p", ("title",))
    with FileLock(tmp_path / "p" / ".lock"):
        failed: list[Exception] = []

        def change() -> None:
            try:
                remove_skill(tmp_path / "p", "title")
            except Busy as error:
                failed.append(error)

        thread = threading.Thread(target=change)
        thread.start()
        thread.join()
    assert failed and len(Pack.load(tmp_path / "p").skills) == 1


EVIL = [
    "", ".", "..", "../x", "..%2fx", "%2e%2e/x", "/etc/x", "//", "a/b", "a//b", "C:\\x", "C:x", "a\\b",
    "\\\\host\\x", "a\0b", "\0", "-x", "--help", "_x", ".hidden", "x.", "x..y", "a" * 65, "a" * 300, "A",
    "Title", "con", "nul", "com1", "aux.gguf", "x y", "x\n", "x\t", "~", "~root", "$HOME", "`id`", "a;b", "é",
    "\uff41", "\u0430dmin", "\u212a", "x\u202e", "\ud800", "base", "top1", "blend", "token", "none",
]  # fmt: skip


@pytest.mark.parametrize("name", EVIL, ids=ascii)
def test_evil_names_write_nothing(name: str, tmp_path: Path) -> None:
    make(tmp_path / "p")
    before = snapshot(tmp_path)
    with pytest.raises(UsageError):
        add_skill(tmp_path / "p", name, adapter("x"), description="", max_tokens=1)
    with pytest.raises(UnknownSkill):
        remove_skill(tmp_path / "p", name)
    with pytest.raises(UnknownSkill):
        Pack.load(tmp_path / "p").adapter_bytes(name)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [{"max_tokens": 0}, {"description": "\x1b[2J"}, {"description": "\udcff"}, {"example": "x" * 10_001}],
)
def test_entries_that_could_not_be_read_are_not_written(change: dict[str, Any], tmp_path: Path) -> None:
    make(tmp_path / "p")
    before = snapshot(tmp_path)
    with pytest.raises(InvalidArtifact):
        add_skill(tmp_path / "p", "new", adapter("x"), **({"description": "", "max_tokens": 1} | change))
    assert snapshot(tmp_path) == before


CALLS: list[Callable[[Path], object]] = [
    lambda p: add_skill(p, "new", b"not gguf", description="", max_tokens=1),
    lambda p: add_skill(p, "new", p / "nothere", description="", max_tokens=1),
    lambda p: add_skill(p.parent / "nopack", "new", adapter("x"), description="", max_tokens=1),
    lambda p: remove_skill(p.parent / "nopack", "new"),
    lambda p: write_manifest(p, msgspec.structs.replace(read_manifest(p), name="../x")),
    lambda p: write_manifest(
        p,
        msgspec.structs.replace(
            read_manifest(p),
            skills=(SkillEntry(name="a", description="", file="../a.gguf", sha256="0" * 64, max_tokens=1),),
        ),
    ),
]


@pytest.mark.parametrize("call", CALLS)
def test_refused_changes_write_nothing(call: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "p")
    before = snapshot(tmp_path)
    with pytest.raises(LoramixError):
        call(tmp_path / "p")
    assert snapshot(tmp_path) == before


def test_a_link_inside_the_pack_is_removed_alone(tmp_path: Path) -> None:
    pack = make(tmp_path / "p")
    link = tmp_path / "p" / "skills" / "title.gguf"
    link.unlink()
    link.symlink_to("sentiment.gguf")
    pack = remove_skill(tmp_path / "p", "title").pack
    assert not link.is_symlink() and pack.adapter_bytes("sentiment") == adapter("sentiment")
