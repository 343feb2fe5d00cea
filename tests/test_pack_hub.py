"""Packs and skills on a stand-in hub: pushed in one commit with their card, pulled and checked before they count."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hub_server import TOKEN, Hub, Repo, sha256
from msgspec.structs import replace
from test_cli import refused, run

from loramix.formats.gguf_reader import read_gguf, tensor_values
from loramix.models import bases
from loramix.pack import edit
from loramix.pack.manifest import read_manifest, write_manifest
from loramix.pack.pack import Pack
from loramix.paths import data_dir

BASE = "some/tiny-GGUF:tiny.gguf"
REPO = "me/skills"


@pytest.fixture
def shared(
    standin: Hub, pack: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Path:
    """A pack on a base of the hub, which is here; logged in."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # its store has no stand-in
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    standin.add("some/tiny-GGUF", **{"tiny.gguf": tiny_base.read_bytes()})
    bases.pull(BASE)
    found = read_manifest(pack)
    (pack / "skills" / "sentiment.md").write_text("# Skill: sentiment\n\nRandom.\n")
    first = replace(found.skills[0], card="skills/sentiment.md")
    write_manifest(
        pack, replace(found, base=replace(found.base, name=BASE), skills=(first, *found.skills[1:]))
    )
    return pack


def pushed(standin: Hub, shared: Path, *words: str) -> Repo:
    done = run("pack", "push", shared, REPO, *words)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(standin.url)
    return standin.repos[REPO]


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def front(repo: Repo) -> dict[str, object]:
    import yaml

    return dict(yaml.safe_load(repo.files["README.md"].decode().split("---\n")[1]))


def test_there_and_back_again(standin: Hub, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = pushed(standin, shared)
    assert set(repo.files) == {*tree(shared), "README.md"} and len(repo.commits) == 1 + 1
    card = front(repo)
    assert card["library_name"] == "peft" and card["base_model"] == "some/tiny-GGUF"
    assert card["license"] == "apache-2.0" and {"lora", "gguf", "loramix"} <= set(card["tags"])  # type: ignore[call-overload]
    assert f"loramix pack pull {REPO}" in repo.files["README.md"].decode()
    monkeypatch.delenv("HF_TOKEN")  # anybody may read it
    done = run("pack", "pull", REPO)
    assert done.exit_code == 0 and "pack tiny with 2 skills" in done.stdout, done.output
    here = data_dir() / "packs" / "tiny"
    assert tree(here) == tree(shared)
    assert Pack.load("tiny").directory == here
    assert "2 skills, all files as they should be\n" in run("pack", "check", "tiny").stdout
    assert run("run", "--pack", "tiny", "--ctx", 256, "-n", 3, "hello").exit_code == 0
    assert run("pack", "pull", REPO).exit_code == 0 and tree(here) == tree(shared)  # the same again
    assert not list(here.parent.glob(".pull-*"))


def test_a_pushed_change_is_one_commit_and_takes_away_what_has_gone(standin: Hub, shared: Path) -> None:
    repo = pushed(standin, shared)
    repo.files["notes.txt"] = b"somebody's own"
    before = len(repo.commits)
    edit.remove_skill(shared, "summarize")
    pushed(standin, shared)
    gate = Pack.load(shared).gate_path
    assert gate is not None
    assert set(repo.files) == {
        "pack.toml",
        gate.name,
        "skills/sentiment.gguf",
        "skills/sentiment.md",
        "README.md",
        "notes.txt",
    }
    assert len(repo.commits) == before + 2  # the notes, and this
    assert run("pack", "pull", REPO).exit_code == 0
    assert [skill.name for skill in Pack.load("tiny").skills] == ["sentiment"]


def test_one_skill_is_pushed_for_peft_too(standin: Hub, shared: Path) -> None:
    from safetensors.numpy import load

    repo = pushed(standin, shared, "--skill", "sentiment", "--private")
    assert repo.private
    config = json.loads(repo.files["adapter_config.json"])
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "some/tiny-GGUF"
    tensors = load(repo.files["adapter_model.safetensors"])
    content = (shared / "skills/sentiment.gguf").read_bytes()
    v = read_gguf(content, "v").tensors["blk.1.attn_v.weight.lora_b"]
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    assert np.array_equal(tensors[name], tensor_values(content, v).astype(np.float32))
    assert "Random." in repo.files["README.md"].decode()
    done = run("pack", "pull", REPO)
    assert "pack sentiment with 1 skill is in" in done.stdout, done.output
    assert not (data_dir() / "packs/sentiment/adapter_config.json").exists()
    assert Pack.load("sentiment").adapter_bytes("sentiment") == content
    refused(run("pack", "push", shared, REPO, "--skill", "summarize"), code=2, says="name another repository")


def test_what_must_not_be_pushed_sends_nothing(
    standin: Hub, shared: Path, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = len(standin.requests)
    refused(
        run("pack", "push", tiny_pack, REPO), code=2, says="a file of this machine that others cannot get"
    )
    refused(run("pack", "push", shared, "skills"), code=2, says="give OWNER/REPO")
    monkeypatch.delenv("HF_TOKEN")
    refused(
        run("pack", "push", shared, REPO),
        says="pushing to the hub needs a token: log in with 'hf auth login'",
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    adapter = shared / "skills" / "sentiment.gguf"
    whole = adapter.read_bytes()
    adapter.write_bytes(whole[:-1] + b"x")
    refused(run("pack", "push", shared, REPO), says="SHA-256")
    adapter.write_bytes(whole)
    assert len(standin.requests) == asked and REPO not in standin.repos
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(
        run("pack", "push", shared, REPO),
        says="rejects the token in the environment variable HF_TOKEN (401)",
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    standin.add(REPO)
    refused(run("pack", "push", shared, REPO, "--private"), code=2, says="already exists and is public")


def test_a_spoilt_update_leaves_the_old_pack(standin: Hub, shared: Path) -> None:
    repo = pushed(standin, shared)
    assert run("pack", "pull", REPO).exit_code == 0
    here = data_dir() / "packs" / "tiny"
    old = tree(here)
    good = dict(repo.files)

    def trial(says: str, **files: bytes) -> None:
        repo.files = {**good, **{name.replace("__", "/"): content for name, content in files.items()}}
        refused(run("pack", "pull", REPO), says=says)
        assert tree(here) == old and not list(here.parent.glob(".pull-*"))

    adapter = good["skills/sentiment.gguf"]
    manifest = good["pack.toml"].decode()
    spoilt = adapter[:-1] + b"x"
    trial("it was not downloaded", **{"skills__sentiment.gguf": spoilt})
    trial("path", **{"pack.toml": manifest.replace("skills/sentiment.gguf", "../../evil.gguf").encode()})
    trial(
        "lacks skills/other.gguf",
        **{"pack.toml": manifest.replace("skills/sentiment.gguf", "skills/other.gguf").encode()},
    )
    trial("bytes, the limit is", **{"skills__sentiment.md": bytes(2**20 + 1)})
    junk = b"GGUF" + bytes(8192)
    honest = manifest.replace(sha256(adapter), sha256(junk)).encode()
    trial(
        "sentiment.gguf", **{"skills__sentiment.gguf": junk, "pack.toml": honest}
    )  # right digest, no adapter
    gate = manifest.replace(sha256(good["gate.npz"]), sha256(junk)).encode()
    trial("gate.npz", **{"gate.npz": junk, "pack.toml": gate})
    standin.spoil = True
    other = adapter + bytes(32)  # new, so that it is fetched; it comes with a bit turned
    trial(
        "it was discarded",
        **{
            "skills__sentiment.gguf": other,
            "pack.toml": manifest.replace(sha256(adapter), sha256(other)).encode(),
        },
    )


def test_no_pack_loses_its_name_to_a_strangers(standin: Hub, shared: Path) -> None:
    repo = pushed(standin, shared)
    assert run("pack", "pull", REPO).exit_code == 0
    standin.add("stranger/skills", **repo.files)
    refused(run("pack", "pull", "stranger/skills"), code=2, says=f"a pack tiny from {REPO}")
    done = run("pack", "pull", "stranger/skills", "--name", "other")
    assert done.exit_code == 0 and Pack.load("other").name == "other"
    repo.files["pack.toml"] = repo.files["pack.toml"].replace(b'name = "tiny"', b'name = "smollm2-135m"')
    refused(run("pack", "pull", REPO), code=2, says="a pack that ships with Loramix")
    standin.add("me/empty", **{"README.md": b"#"})
    refused(run("pack", "pull", "me/empty"), says="it is not a pack")
    refused(run("pack", "pull", "me/nothing"), says="no repository me/nothing")
    refused(run("pack", "pull", REPO, "--revision", "v9"), says="no revision 'v9'")


def test_one_skill_of_a_pack_alone_or_into_another(
    standin: Hub, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed(standin, shared)
    standin.requests.clear()
    done = run("pack", "pull", REPO, "--skill", "sentiment")
    assert "pack tiny-sentiment with 1 skill is in" in done.stdout, done.output
    assert not any("summarize" in request.path or "gate" in request.path for request in standin.requests)
    mine = data_dir() / "packs" / "mine"
    edit.new_pack(mine, BASE, bases.digest(bases.resolve(BASE)))
    done = run("pack", "pull", REPO, "--skill", "summarize", "--into", "mine")
    assert "skill summarize added" in done.stdout, done.output
    assert [skill.name for skill in Pack.load("mine").skills] == ["summarize"]
    refused(run("pack", "pull", REPO, "--skill", "summarize", "--into", "mine"), code=2, says="already")
    refused(run("pack", "pull", REPO, "--skill", "nosuch"), code=2, says="no skill 'nosuch'")
    refused(run("pack", "pull", REPO, "--into", "mine"), code=2, says="name it with --skill")
    refused(
        run("pack", "pull", REPO, "--skill", "sentiment", "--into", "smollm2-135m"),
        says="pack smollm2-135m for smollm2-135m",
    )
    assert not (data_dir() / "packs" / "my-smollm2-135m").exists()
    edit.new_pack(tmp_path / "ship" / "ours", BASE, bases.digest(bases.resolve(BASE)))
    monkeypatch.setattr("loramix.pack.pack.SHIPPED", tmp_path / "ship")
    done = run("pack", "pull", REPO, "--skill", "sentiment", "--into", "ours")
    assert "stays as it is; this changes a copy of it, my-ours" in done.stdout, done.output
    assert not Pack.load("ours").skills and Pack.load("my-ours").skills[0].name == "sentiment"
    other = data_dir() / "packs" / "else"
    edit.new_pack(other, "smollm2-135m", "0" * 64)
    refused(
        run("pack", "pull", REPO, "--skill", "sentiment", "--into", "else"), says="pack else for smollm2-135m"
    )


def test_a_full_disk_keeps_the_old_pack_and_nothing_new(
    standin: Hub, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = pushed(standin, shared)
    here = data_dir() / "packs" / "tiny"
    written: list[Path] = []
    write = edit.write_bytes

    def filling(path: Path, content: bytes) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path)
        write(path, content)

    monkeypatch.setattr(edit, "write_bytes", filling)
    refused(run("pack", "pull", REPO), says="No space left")
    assert len(written) == 2 and not here.exists()
    monkeypatch.setattr(edit, "write_bytes", write)
    assert run("pack", "pull", REPO).exit_code == 0
    old = tree(here)
    manifest = replace(read_manifest(shared), description="new")
    skills = tuple(replace(s, file=s.file.replace(".gguf", "-2.gguf")) for s in manifest.skills)
    for skill, renamed in zip(manifest.skills, skills, strict=True):
        (shared / skill.file).rename(shared / renamed.file)
    write_manifest(shared, replace(manifest, skills=skills))
    pushed(standin, shared)
    assert "skills/sentiment-2.gguf" in repo.files and "skills/sentiment.gguf" not in repo.files
    written.clear()
    monkeypatch.setattr(edit, "write_bytes", filling)
    refused(run("pack", "pull", REPO), says="No space left")
    assert len(written) == 2 and tree(here) == old
    monkeypatch.setattr(edit, "write_bytes", write)
    assert run("pack", "pull", REPO).exit_code == 0 and Pack.load("tiny").manifest.description == "new"
    assert not (here / "skills/sentiment.gguf").exists()
