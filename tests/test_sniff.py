"""Files that are not what their names say: each is named, and what helps is never the command that failed."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hf_tiny import write_bpe, write_checkpoint, write_sentencepiece
from safetensors.numpy import save
from test_textfile import LFS, PAGE
from tiny import write_peft

from loramix.cli import main
from loramix.convert.hf.spm_reader import read_sentencepiece
from loramix.convert.hf.to_gguf import convert_base
from loramix.errors import InvalidArtifact, LoramixError
from loramix.formats.adapter_file import read_adapter_bytes
from loramix.formats.safetensors_reader import read_safetensors
from loramix.formats.sniff import sniff
from loramix.formats.validate import read_base
from loramix.models import bases
from loramix.models.old_gate import NumpyGate
from loramix.pack.pack import Pack
from loramix.train.skill import check_import


def torch_zip() -> bytes:
    """What ``torch.save`` writes, by its names."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps({"a": 1}))
    return content.getvalue()


def tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.gguf"))
    return content.getvalue()


def plain_zip() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("readme.txt", "x" * 100)
    return content.getvalue()


WRONG = {
    "Git LFS pointer": LFS,
    "git-annex pointer": b"/annex/objects/SHA256E-s10--ab.gguf\n",
    "web page": PAGE,
    "error message": b'{"error": "Repository not found"}',
    "pickle": pickle.dumps({"a": np.ones(3)}),
    "pickle (a .bin": torch_zip(),
    "gzip": gzip.compress(b"GGUF"),
    "zip archive": plain_zip(),
    "tar archive": tar(),
    "empty": b"",
    "only zeros": bytes(4096),
    "predecessor of GGUF": b"lmgg" + bytes(64),
}


@pytest.mark.parametrize("what", WRONG)
def test_each_reader_of_weights_names_it(what: str, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(WRONG[what])
    readers = {
        "safetensors": read_safetensors,
        "base": read_base,
        "resolve": lambda path: bases.resolve(str(path)),
        "adapter": read_adapter_bytes,
        "import": check_import,
        "tokenizer": lambda path: read_sentencepiece(path.read_bytes(), str(path)),
    }
    if "zip" not in what and "pickle (" not in what:  # a gate is a zip archive
        readers["gate"] = NumpyGate.load
    for name, read in readers.items():
        with pytest.raises(LoramixError) as caught:
            read(path)
        assert what in str(caught.value) and str(path) in str(caught.value), name
        assert "loramix convert" not in str(caught.value) and "loramix pull" not in str(caught.value), name


def test_formats_of_each_other_are_named(tmp_path: Path, tiny_base: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(save({"a": np.ones((4, 4), np.float32)}))
    with pytest.raises(InvalidArtifact, match="a safetensors file"):
        read_base(weights)
    with pytest.raises(InvalidArtifact, match="a GGUF file"):
        read_safetensors(tiny_base)
    assert sniff(weights.read_bytes()) and sniff(b"Once upon a time") is None


def test_a_cut_off_file_is_called_that(tmp_path: Path, tiny_base: Path) -> None:
    path = tmp_path / "cut"
    whole = save({"a": np.ones((64, 64), np.float32), "b": np.ones((64, 64), np.float32)})
    for size in (4, 60, len(whole) // 3, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InvalidArtifact, match=r"truncated|too short"):
            read_safetensors(path)
    path.write_bytes(tiny_base.read_bytes()[:-100])
    with pytest.raises(InvalidArtifact, match="truncated"):
        read_base(path)


def test_pointers_in_a_cloned_pack_are_named(pack: Path) -> None:
    for name in ("sentiment.gguf", "gate.npz"):
        next(pack.rglob(name)).write_bytes(LFS)
    found = Pack.load(pack)
    for read in (lambda: found.adapter_bytes("sentiment"), found.gate):
        with pytest.raises(InvalidArtifact, match=r"Git LFS pointer.*git lfs pull"):
            read()


def test_pointers_in_a_cloned_checkpoint_are_named(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer.model"):
        directory = write_checkpoint(tmp_path / name)
        if name == "tokenizer.model":
            write_sentencepiece(directory, size=400)
        else:
            write_bpe(
                directory,
                [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}],
            )
        (directory / name).write_bytes(LFS)
        with pytest.raises(InvalidArtifact, match=rf"{name}.*Git LFS pointer"):
            convert_base(directory, out, "F32")
    assert not out.exists()
    adapter = write_peft(tmp_path / "peft")
    (adapter / "adapter_model.safetensors").write_bytes(LFS)
    result = CliRunner().invoke(
        main, ["convert", "adapter", str(adapter), "-o", str(out), "--base", "x.gguf"]
    )
    assert result.exit_code == 1


def test_a_pack_is_not_made_on_what_is_no_base(tmp_path: Path, tiny_pack: Path, tiny_base: Path) -> None:
    adapter = next(tiny_pack.rglob("sentiment.gguf"))
    note = tmp_path / "notes.gguf"
    note.write_text("not a model")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_base.read_bytes()[:2000])
    pointer = tmp_path / "pointer.gguf"
    pointer.write_bytes(LFS)
    cases = {
        note: "not a GGUF",
        cut: "not a usable GGUF",
        pointer: "Git LFS",
        adapter: "adapter",
        tmp_path: "directory",
    }
    for base, says in cases.items():
        result = CliRunner().invoke(main, ["pack", "new", str(tmp_path / "mine"), "--base", str(base)])
        assert result.exit_code == 1 and says in result.stderr, (base, result.output)
        assert result.stderr.startswith("error: ") and not (tmp_path / "mine").exists()
    for command in (
        ["plan"],
        ["train", "pack", str(tmp_path / "p"), "--data-dir", str(tmp_path), "--skill", "sentiment"],
    ):
        (tmp_path / "sentiment.jsonl").write_text("{}")
        result = CliRunner().invoke(main, [*command, "--base", str(note)])
        assert result.exit_code == 1 and "not a GGUF base" in result.stderr, result.output


def test_a_directory_that_is_no_checkpoint_is_named(tmp_path: Path, tiny_base: Path) -> None:
    for name, words in (
        ("model.gguf", "model.gguf in it is a GGUF, which needs no conversion"),
        ("adapter_config.json", "convert it with 'loramix convert adapter'"),
        ("consolidated.safetensors", "consolidated.safetensors has other names"),
        ("other", "download the whole checkpoint"),
    ):
        directory = write_checkpoint(tmp_path / name)
        (directory / "model.safetensors").unlink()
        (directory / name).write_text("{}")
        with pytest.raises(LoramixError, match=words):
            convert_base(directory, tmp_path / "out.gguf", "F32")
