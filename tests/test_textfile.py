"""Text files that users hand over: marks, encodings, line ends and wrong files, in every place that reads one."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import write_peft

from loramix.commands.serve import read_key
from loramix.convert.hf.config import read_json
from loramix.convert.peft_reader import read_config
from loramix.errors import InvalidArtifact, InvalidData, InvalidRecipe, LoramixError, UsageError
from loramix.eval.routing import read_held_out
from loramix.formats import tables
from loramix.formats.textfile import decode_text, has_lone_surrogate, read_lines, read_text, utf8_lines
from loramix.pack.manifest import read_manifest
from loramix.train.data import Row, read_rows
from loramix.train.default_recipe import recipe_of_data
from loramix.train.gate_data import read_none
from loramix.train.recipe import RECIPES, load_recipe

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "gzip", "crlf", "gzip+mark")
TEXT = "first – ligne\nzweite Zeile 你好\n\nlast"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234567\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>"


def written(path: Path, text: str, how: str) -> Path:
    """A text file as some editor, shell or packer writes it."""
    content = {
        "utf-16-be": lambda: "\ufeff".encode("utf-16-be") + text.encode("utf-16-be"),
        "gzip": lambda: gzip.compress(text.encode()),
        "gzip+mark": lambda: gzip.compress(text.encode("utf-8-sig")),
        "crlf": lambda: text.replace("\n", "\r\n").encode(),
    }.get(how, lambda: text.encode(how))()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("how", ENCODINGS)
def test_all_ways_to_write_a_text_give_the_same(how: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", TEXT, how)
    assert read_text(path) == TEXT
    assert list(read_lines(path)) == list(enumerate(TEXT.split("\n"), 1))
    assert [line.decode().strip() for _, line in utf8_lines(path)] == TEXT.split("\n")


def test_lines_of_old_macs_and_separators_inside_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\rtwo\u2028still two\x85and\r\nthree".encode())
    assert [line for _, line in read_lines(path)] == ["one", "two\u2028still two\x85and", "three"]
    assert read_text(path).count("\n") == 2


ROWS = [{"split": "train", "input": f"naïve {i}", "target": "één"} for i in range(3)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
RECIPE = (RECIPES / "sentiment.toml").read_text(encoding="utf-8")


def manifest_of(path: Path) -> object:
    return read_manifest(path.parent)


def instructions_of(path: Path) -> object:
    rows = [Row("train", "x", "y")]
    return recipe_of_data("own", rows, path, "no-such-base").instructions["any"]


READERS: dict[str, tuple[str, str, Callable[[Path], object], type[LoramixError]]] = {
    "data": ("rows.jsonl", JSONL, read_rows, InvalidData),
    "none": ("none.jsonl", '{"text": "é?"}\n\n{"instruction": "what"}\n', read_none, InvalidData),
    "instructions": ("ask.txt", "Wie ist „{input}“?\nSag:\n", instructions_of, InvalidData),
    "recipe": ("sentiment.toml", RECIPE, lambda path: load_recipe(str(path)), InvalidRecipe),
    "held out": ("held.toml", '[none]\nplain = ["où?"]\n', read_held_out, InvalidRecipe),
    "adapter_config": ("adapter_config.json", '{"r": 4, "x": "é"}', read_config, InvalidArtifact),
    "config": ("config.json", '{"a": "é"}', lambda path: read_json(path, dict[str, str]), InvalidArtifact),
    "key": ("key.txt", "0123456789abcdef0123\n", read_key, UsageError),
}


@pytest.mark.parametrize("kind", READERS)
def test_every_reader_takes_all_of_them(kind: str, tmp_path: Path) -> None:
    name, text, read, _ = READERS[kind]
    wanted = read(written(tmp_path / name, text, "utf-8"))
    assert wanted
    for how in ENCODINGS:
        assert read(written(tmp_path / name, text, how)) == wanted, how


@pytest.mark.parametrize("kind", READERS)
def test_every_reader_names_what_is_no_text(kind: str, tmp_path: Path) -> None:
    name, text, read, error = READERS[kind]
    path = tmp_path / name
    cases = {
        "Git LFS pointer.*git lfs pull": LFS,
        "web page": PAGE,
        "0xE9 is not UTF-8": b"caf\xe9 \n" + text.encode(),
        "without a byte-order mark": text.encode("utf-16-le") * 30,
    }
    for says, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(error, match=f"{name}.*{says}"):
            read(path)


def test_a_manifest_with_a_mark(pack: Path) -> None:
    path = pack / "pack.toml"
    wanted = read_manifest(pack)
    path.write_bytes(path.read_text(encoding="utf-8").encode("utf-8-sig"))
    assert read_manifest(pack) == wanted
    path.write_bytes(LFS)
    with pytest.raises(InvalidArtifact, match="Git LFS pointer"):
        read_manifest(pack)


def test_a_bad_byte_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(JSONL.encode() + JSONL.encode("latin-1"))
    with pytest.raises(InvalidData, match=r"rows\.jsonl, line 4 cannot be used: 0xEF is not UTF-8"):
        read_rows(path)
    with pytest.raises(InvalidData, match="the note, line 2 cannot be used: 0xFF"):
        decode_text(b"fine\nno\xff", "the note")
    torn = "x\ny".encode("utf-16")[:-1]
    with pytest.raises(InvalidData, match="UTF-16"):
        decode_text(torn, "torn")
    path.write_bytes(torn)
    with pytest.raises(InvalidData, match="UTF-16"):
        list(read_lines(path))
    path.write_bytes(gzip.compress(JSONL.encode() * 50)[:-20])
    with pytest.raises(InvalidData, match="damaged gzip"):
        read_rows(path)


def test_half_a_character_in_a_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(JSONL + '{"split": "train", "input": "\\ud83d", "target": "x"}\n', encoding="utf-8")
    with pytest.raises(InvalidData, match=r"line 4: has half a character"):
        read_rows(path)
    assert has_lone_surrogate("a\udce9") and not has_lone_surrogate("é🙂")


def test_rows_know_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + JSONL.replace("\n", "\n\n"), encoding="utf-8")
    assert [row.line for row in read_rows(path)] == [2, 4, 6]


def test_an_adapter_config_with_a_mark_is_rewritten_for_peft(tmp_path: Path) -> None:
    from loramix.convert.peft import as_peft

    source = write_peft(tmp_path / "peft")
    config = source / "adapter_config.json"
    config.write_bytes(config.read_text().encode("utf-8-sig"))
    with as_peft(source) as plain:
        assert plain != source
        assert json.loads((plain / "adapter_config.json").read_text())["lora_alpha"] == 8


def test_files_with_marks_behind_each_other(tmp_path: Path) -> None:
    """As ``cat a.jsonl b.jsonl`` makes of two exports."""
    row = b'\xef\xbb\xbf{"prompt": "a"}\n'
    with io.BytesIO(row + row) as file:
        assert [found for _, found in tables.read_rows(file, "x.jsonl", "jsonl", "prompt")] == [
            {"prompt": "a"},
            {"prompt": "a"},
        ]
