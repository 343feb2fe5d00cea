"""The command line: answers on stdout, one sentence on stderr for whatever is wrong, exit codes 1 and 2."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny import write_base, write_peft

from loramix.cli import main
from loramix.errors import InvalidArtifact
from loramix.formats.adapter_file import with_scale


def run(*words: Any, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words], input=stdin)


def refused(result: Result, *, code: int = 1, says: str = "") -> None:
    """One sentence on stderr, no traceback, nothing on stdout."""
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("error: ") or code == 2, result.stderr
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert result.stderr.startswith("Usage") or len(result.stderr.strip().splitlines()) == 1


def test_run_prints_the_answer_and_nothing_else(pack: Path) -> None:
    result = run("run", "--pack", pack, "--ctx", 256, "--mix", "sentiment", "--show-route", "hello")
    assert result.exit_code == 0, result.output
    assert "[sentiment=1]" in result.stderr and "[sentiment=1]" not in result.stdout
    whole = json.loads(
        run("run", "--pack", pack, "--ctx", 256, "--mix", "sentiment", "--json", "hello").stdout
    )
    assert whole["text"] + "\n" == result.stdout
    assert whole["route"]["mix"] == {"sentiment": 1.0}
    piped = run("run", "--pack", pack, "--ctx", 256, "--mix", "sentiment", stdin="hello")
    assert piped.stdout == result.stdout


def test_route_shows_bars_and_json(pack: Path) -> None:
    shown = run("route", "--pack", pack, "--ctx", 256, "hello there")
    assert shown.exit_code == 0
    assert "sentiment" in shown.stdout and "why: " in shown.stdout
    found = json.loads(run("route", "--pack", pack, "--ctx", 256, "--json", "hello there").stdout)
    assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    assert {row["word"] for row in found["words"]} == {"hello", "there"}
    assert all(f"{row['word']} (" in shown.stdout.partition("looked at: ")[2] for row in found["words"])
    ran = run("run", "--pack", pack, "--ctx", 256, "--show-route", "-n", 1, "hello there")
    assert "looked at: " in ran.stderr and "looked at" not in ran.stdout
    assert f"mix: {','.join(f'{k}={v:g}' for k, v in found['mix'].items()) or 'base'}" in shown.stdout


def test_pack_commands(pack: Path, tiny_base: Path, tmp_path: Path) -> None:
    assert "2 skills" in run("pack", "check", pack).stdout
    assert "sentiment" in run("pack", "show", pack).stdout
    assert json.loads(run("pack", "show", pack, "--json").stdout)["name"] == "tiny"
    assert isinstance(json.loads(run("pack", "list", "--json").stdout), list)
    new = tmp_path / "mine"
    assert run("pack", "new", new, "--base", tiny_base).exit_code == 0
    refused(run("pack", "new", new, "--base", tiny_base), code=2, says="already")
    adapter = pack / "skills" / "sentiment.gguf"
    added = run("pack", "add", new, "mood", adapter, "--description", "x", "--max-tokens", 5)
    assert added.exit_code == 0 and "train gate" in added.stdout
    refused(run("pack", "add", new, "mood", adapter), code=2, says="--recipe")
    refused(run("run", "--pack", new, "--ctx", 256, "hi"), says="no gate")
    assert run("run", "--pack", new, "--ctx", 256, "--mix", "mood", "hi").exit_code == 0
    assert run("pack", "remove", new, "mood").exit_code == 0
    refused(run("pack", "remove", new, "mood"), code=2, says="no skill")


def test_names_that_cannot_be(pack: Path, tmp_path: Path) -> None:
    refused(run("pack", "new", tmp_path / "new", "--base", ""), code=2, says="empty name")
    for what in ("adapter", "gguf"):
        to = ["--pack", pack, "--mix", "sentiment", "-o", tmp_path]
        refused(run("export", what, *to), code=2, says="is a directory; give the name of a file")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    source = tmp_path / "in.jsonl"
    source.write_text('{"question": "hi"}\n{"question": "ho"}\n')
    out = tmp_path / "out.jsonl"
    done = run("batch", source, out, "--pack", pack, "--ctx", 256)
    assert (
        done.exit_code == 1 and "0 answers, 2 errors" in done.stderr and "no row was answered" in done.stderr
    )
    assert len(out.read_text().splitlines()) == 2
    assert (
        run(
            "batch", source, tmp_path / "b.jsonl", "--pack", pack, "--ctx", 256, "--column", "question"
        ).exit_code
        == 0
    )


def test_an_adapter_of_another_strength(pack: Path) -> None:
    adapter = pack / "skills" / "sentiment.gguf"
    add = ["pack", "add", pack, "mood", adapter, "--description", "x", "--max-tokens", 5]
    assert run(*add, "--scale", 0.5).exit_code == 0
    ask = ["run", "--pack", pack, "--ctx", 256, "-n", 12, "hi there"]
    half = run(*ask, "--mix", "sentiment=0.5").stdout
    assert run(*ask, "--mix", "mood").stdout == half != run(*ask, "--mix", "sentiment").stdout
    refused(run(*add, "--replace", "--scale", 0), code=2, says="0")
    bad = pack / "none.gguf"
    bad.write_bytes(adapter.read_bytes().replace(b"adapter.lora.alpha", b"adapter.lora.other"))
    refused(run(*add[:4], bad, *add[5:], "--replace", "--scale", 0.5), says="no alpha")
    content = adapter.read_bytes()
    cut = content.index(b"adapter.lora.alpha") + len(b"adapter.lora.alpha") + 6  # within the value
    with pytest.raises(InvalidArtifact, match="no alpha"):
        with_scale(content[:cut], 0.5)


@pytest.mark.parametrize(
    "words, code, says",
    [
        (["hello", "--mix", "nosuch"], 2, "it has: sentiment, summarize"),
        (["hello", "--mix", "sentiment=-0.5"], 2, "from 0 to 4"),
        (["hello", "--mix", "sentiment=nan"], 2, "from 0 to 4"),
        (["hello", "--mix", "sentiment=1e30"], 2, "from 0 to 4"),
        (["hello", "--mix", "sentiment=much"], 2, "not a number"),
        (["hello", "--temperature", "-1"], 2, "temperature"),
        (["hello", "--temperature", "nan"], 2, "temperature"),
        (["hello", "--top-p", "7"], 2, "top_p"),
        ([""], 1, "empty"),
        (["word " * 400], 1, "shorten"),
        (["hello", "--policy", "best"], 2, "best"),
        (["hello", "--ctx", "5"], 2, "64"),
        (["hello", "--max-tokens", "0"], 2, "max-tokens"),
    ],
)
def test_bad_arguments_of_run(pack: Path, words: list[str], code: int, says: str) -> None:
    options = [] if "--ctx" in words else ["--ctx", "256"]
    result = run("run", "--pack", pack, *options, *words)
    if result.stderr.startswith("Usage"):
        assert (result.exit_code, says in result.stderr) == (code, True)
    else:
        refused(result, code=code, says=says)


def test_stdin_that_is_no_text(pack: Path) -> None:
    refused(run("run", "--pack", pack, "--ctx", 256, stdin=b"\xff\xfe\x00"), code=2, says="UTF-8")
    refused(run("run", "--pack", pack, "--ctx", 256, stdin=""), says="empty")


def test_packs_and_bases_that_are_not_there(tmp_path: Path) -> None:
    refused(run("run", "--pack", "nosuch", "hi"), says="no pack 'nosuch'")
    refused(run("run", "--pack", tmp_path / "nosuch", "hi"), says="no pack")
    refused(run("run", "--pack", "../../etc", "hi"), says="no pack")
    refused(run("pull", "nosuch"), says="knows smollm2-135m, qwen2.5-coder-0.5b, tinyllama-1.1b")
    refused(run("train", "skill", "nosuch"), says="no recipe")
    refused(run("train", "skill", "sentiment"), says="--data")
    refused(
        run("convert", "adapter", tmp_path, "-o", tmp_path / "x.gguf", "--base", "nosuch"), says="no base"
    )
    refused(run("convert", "gate", tmp_path, "-o", tmp_path / "x.npz"), says="no trained gate")
    (tmp_path / "file.gguf").write_bytes(b"GGUF")
    refused(run("convert", "adapter", tmp_path / "file.gguf", "-o", tmp_path / "x.gguf"), says="is a file")


def spoil(pack: Path, skill: str, content: bytes) -> None:
    """Replace an adapter and its digest: what a stranger's pack may hold."""
    path = pack / "skills" / f"{skill}.gguf"
    old = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(content)
    manifest = pack / "pack.toml"
    manifest.write_text(manifest.read_text().replace(old, hashlib.sha256(content).hexdigest()))


def with_nan(path: Path) -> bytes:
    reader = gguf.GGUFReader(path)
    content = bytearray(path.read_bytes())
    tensor = reader.tensors[3]
    content[tensor.data_offset : tensor.data_offset + 2] = np.asarray([np.nan], np.float16).tobytes()
    return bytes(content)


BAD_ADAPTERS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "truncated": (lambda path: path.read_bytes()[:5000], "after the end of the file"),
    "cut in the header": (lambda path: path.read_bytes()[:100], "ends inside"),
    "empty": (lambda path: b"", "begins with"),
    "garbage": (lambda path: os.urandom(5000), "begins with"),
    "wrong architecture": (lambda path: path.read_bytes().replace(b"llama", b"qwen2", 1), "architecture"),
    "NaN": (with_nan, "not finite"),
    "alpha as another type": (
        lambda path: path.read_bytes().replace(b"adapter.lora.alpha\6\0\0\0", b"adapter.lora.alpha\4\0\0\0"),
        "adapter.lora.alpha",
    ),
}


@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_adapters_that_must_not_be_loaded(pack: Path, name: str) -> None:
    make, says = BAD_ADAPTERS[name]
    spoil(pack, "summarize", make(pack / "skills" / "summarize.gguf"))
    # in a process of its own: a signal would show as a negative code
    words = ["run", "--pack", str(pack), "--ctx", "256", "--mix", "summarize", "hi"]
    done = subprocess.run(
        [sys.executable, "-m", "loramix", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr and not done.stdout
    refused(run("pack", "check", pack), says=says)


def test_an_adapter_for_another_base(pack: Path, tmp_path: Path) -> None:
    from loramix.convert.adapter import convert_adapter

    other = write_base(tmp_path / "other.gguf", seed=9)
    out = tmp_path / "o.gguf"
    convert_adapter(write_peft(tmp_path / "peft"), other, out, base_name="other-base", base_sha256="f" * 64)
    spoil(pack, "summarize", out.read_bytes())
    refused(run("run", "--pack", pack, "--ctx", 256, "--mix", "summarize", "hi"), says="other-base")


def test_files_that_changed_since_the_manifest(pack: Path) -> None:
    path = pack / "skills" / "sentiment.gguf"
    path.write_bytes(path.read_bytes() + b"\0")
    refused(run("run", "--pack", pack, "--ctx", 256, "--mix", "sentiment", "hi"), says="SHA-256")
    path.unlink()
    refused(run("run", "--pack", pack, "--ctx", 256, "hi"), says="is not there")


def test_a_pack_whose_path_climbs_out(pack: Path) -> None:
    manifest = pack / "pack.toml"
    manifest.write_text(manifest.read_text().replace("skills/sentiment.gguf", "../sentiment.gguf"))
    refused(run("run", "--pack", pack, "--ctx", 256, "hi"), says="refused")


def test_a_pack_on_another_base(pack: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other.gguf", seed=9)
    manifest = pack / "pack.toml"
    lines = [
        f'name = "{other}"' if "tiny.gguf" in line else line for line in manifest.read_text().splitlines()
    ]
    manifest.write_text("\n".join(lines))
    refused(run("run", "--pack", pack, "--ctx", 256, "hi"), says="is for base")


def test_a_full_disk_is_a_sentence(pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out.gguf"
    out.write_bytes(b"what was there")
    monkeypatch.setattr("loramix.paths.os.fsync", full)
    base = json.loads(run("pack", "show", pack, "--json").stdout)["base"]["name"]
    peft = write_peft(tmp_path / "peft")
    refused(run("convert", "adapter", peft, "-o", out, "--base", base, "--no-check"), says="No space left")
    assert out.read_bytes() == b"what was there"
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_chat(pack: Path) -> None:
    lines = [
        "/why",
        "/skill sentiment",
        "hello",
        "/why",
        "/skill nosuch",
        "/mix sentiment=0.5,summarize=0.5",
        "again",
        "/mix sentiment=-1",
        "word " * 300,
        "/policy blend",
        "more",
        "/policy nonsense",
        "/history",
        "/reset",
        "/history",
        "/quit",
    ]
    result = run("chat", "--pack", pack, "--ctx", 256, "-n", 3, stdin="\n".join(lines) + "\n")
    assert result.exit_code == 0, result.output
    assert "[sentiment=1]" in result.stderr and "[sentiment=0.5,summarize=0.5]" in result.stderr
    assert result.stderr.count("error: ") == 3
    assert "/policy NAME" in result.stderr
    assert result.stdout.count("user: ") == 3 and "user: hello" in result.stdout
    assert "was asked for" in result.stdout


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_stops_the_answer_and_not_the_chat(pack: Path) -> None:
    slowly = (
        "import sys, time; from loramix.runtime.sampling import Sampler; pick = Sampler.pick\n"
        "Sampler.pick = lambda self, *words: (time.sleep(0.02), pick(self, *words))[1]\n"
        f"sys.argv = ['loramix', 'chat', '--pack', {str(pack)!r}, '--ctx', '512', '--mix', 'base', '-n', '400']\n"
        "from loramix.cli import main; main()"
    )
    child = subprocess.Popen(
        [sys.executable, "-u", "-c", slowly],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdin and child.stdout
    child.stdin.write(b"talk\n")
    child.stdin.flush()
    child.stdout.read(6)  # the answer has begun, and takes eight seconds
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(b"/history\n/quit\n", timeout=300)
    assert child.returncode == 0, err
    assert b"user: talk" in out and b"Traceback" not in err


def test_help_is_light() -> None:
    code = (
        "import sys; sys.argv = ['loramix', '--help']\n"
        "from loramix.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('numpy', 'llama_cpp', 'torch', 'rich', 'msgspec') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    assert done.stderr.strip() == "[]"


def test_the_runtime_never_imports_torch(pack: Path) -> None:
    code = (
        "import sys, pkgutil, importlib, loramix\n"
        "for found in pkgutil.walk_packages(loramix.__path__, 'loramix.'):\n"
        "    training = found.name.startswith('loramix.train') or found.name in ('loramix.models.old_gate_torch', "
        "'loramix.convert.base_model', 'loramix.convert.gguf_model', 'loramix.cluster.training', "
        "'loramix.cluster.search', 'loramix.__main__')\n"
        "    if not training: importlib.import_module(found.name)\n"
        "from loramix import Engine\n"
        f"with Engine.open({str(pack)!r}, n_ctx=256, n_threads=1) as engine: engine.generate('hi', max_tokens=2)\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'pickle5') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
