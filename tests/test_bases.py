"""`loramix bases`, GGUF files of every architecture from the hub, and how a base is described to Ollama's clients."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from hub_server import Hub
from test_architectures import BASES as SHAPES
from test_cli import refused, run
from tiny import write_base

from loramix import DEFAULT
from loramix.architectures import ARCHITECTURES
from loramix.models import bases
from loramix.models.known_bases import BASES
from loramix.server.base_details import BaseDetails, human_number

KNOWN = "supported: llama (Llama, Mistral, SmolLM2, TinyLlama), qwen2 (Qwen2, Qwen2.5), qwen3 (Qwen3), gemma3 (Gemma 3)"


def with_keys(source: Path, out: Path, *, architecture: str = "", **values: Any) -> Path:
    """A copy of a GGUF with more metadata, or under another architecture's name."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, architecture or str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", *values):
            rest = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], rest)
    for key, value in values.items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LORAMIX_DATA", str(tmp_path / "data"))


def listed() -> dict[str, dict[str, Any]]:
    shown = run("bases", "--json")
    assert shown.exit_code == 0 and shown.stderr == ""
    return {row.pop("name"): row for row in json.loads(shown.stdout)}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_file_of_each_architecture_is_pulled(shape: str, standin: Hub, tmp_path: Path) -> None:
    name = shape.split()[0]
    content = write_base(tmp_path / "x.gguf", **{"architecture": name, **SHAPES[shape]}).read_bytes()
    repo = standin.add(
        "some/tiny-GGUF",
        **{
            "tiny-q4_k_m.gguf": content,
            "tiny-q8_0.gguf": content,
            "mmproj-tiny-q4_k_m.gguf": content,
            "tiny-imatrix-q4_k_m.gguf": content,
        },
    )
    repo.architecture = name
    shown = run("pull", "some/tiny-GGUF")
    assert shown.exit_code == 0, shown.output
    assert Path(shown.stdout.strip()).name == "tiny-q4_k_m.gguf"
    assert bases.resolve("some/tiny-GGUF").read_bytes() == content
    row = listed()["some/tiny-GGUF:tiny-q4_k_m.gguf"]
    assert (row["architecture"], row["size_bytes"], row["ready"]) == (name, len(content), True)


def test_every_architecture_is_among_them() -> None:
    assert {shape.split()[0] for shape in SHAPES} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ["phi3", "gemma2", "qwen2moe", "qwen2vl", "LLAMA"])
def test_another_architecture_is_refused_with_those_that_run(
    name: str, standin: Hub, tiny_base: Path, tmp_path: Path
) -> None:
    """By what the hub says, by the file that came, and where a file is named."""
    path = with_keys(tiny_base, tmp_path / "other.gguf", architecture=name)
    repo = standin.add("some/other-GGUF", **{"other.gguf": path.read_bytes()})
    refused(
        run("pull", "some/other-GGUF"),
        says=f"has architecture {name!r}, which Loramix does not support; {KNOWN}",
    )
    assert len(standin.downloads()) == 1 and bases.find("some/other-GGUF:other.gguf") is None
    assert not list((tmp_path / "hf").rglob("blobs/*"))
    repo.architecture = name
    refused(
        run("pull", "some/other-GGUF"),
        says=f"has architecture {name!r}, which Loramix does not support; {KNOWN}",
    )
    assert len(standin.downloads()) == 1  # not even fetched
    refused(
        run("plan", "--base", path),
        says=f"has architecture {name!r}, which Loramix does not support; {KNOWN}",
    )


def test_what_is_known_is_listed_in_order_with_the_default_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramix.models.wheel.installed", lambda _: None)
    rows = listed()
    assert list(rows) == list(BASES)
    assert [name for name, row in rows.items() if row["default"]] == [DEFAULT]
    for name, base in BASES.items():
        assert rows[name] == {
            "architecture": base.architecture,
            "size_bytes": base.size_bytes,
            "license": base.license,
            "path": None,
            "ready": False,
            "default": name == DEFAULT,
        }
        assert base.architecture in ARCHITECTURES
    monkeypatch.setattr("loramix.models.wheel.installed", lambda _: Path("/somewhere"))
    assert all(
        row["ready"] == bool(BASES[name].wheels) and row["path"] is None for name, row in listed().items()
    )
    assert run("bases").stdout.count("in installed wheels") == 2
    monkeypatch.setattr("loramix.models.wheel.installed", lambda _: None)
    shown = run("bases")
    assert shown.exit_code == 0 and "loramix pull NAME" in shown.stderr
    head, *lines = shown.stdout.splitlines()
    assert head.split() == ["base", "architecture", "size", "licence", "on", "this", "machine"]
    assert lines[1].split() == ["qwen2.5-coder-0.5b", "qwen2", "491", "MB", "Apache-2.0", "no"]
    assert lines[0].split()[:2] == [DEFAULT, "(default)"] and len(lines) == len(BASES)


def test_the_table_of_the_documentation_is_that_of_the_code() -> None:
    text = (Path(__file__).parent.parent / "docs" / "bases.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.-]+)`.*\| `(\w+)` \| (\d+) MB \| (\S+) \|", text, re.MULTILINE)
    wanted = [
        (name, base.architecture, f"{base.size_bytes / 1e6:.0f}", base.license)
        for name, base in BASES.items()
        if ":" not in name
    ]
    assert rows == wanted


def test_what_was_pulled_is_listed_too(standin: Hub, tiny_base: Path, tmp_path: Path) -> None:
    licensed = with_keys(tiny_base, tmp_path / "l.gguf", **{"general.license": "gemma"})
    repo = standin.add("b/two", **{"l.gguf": licensed.read_bytes()})
    repo.commit()
    standin.add("a/one", **{"o.gguf": tiny_base.read_bytes()})
    two = bases.pull("b/two:l.gguf", revision=f"{1:040x}")
    one = bases.pull("a/one:o.gguf")
    rows = listed()
    assert list(rows)[len(BASES) :] == ["a/one:o.gguf", f"b/two:l.gguf@{1:040x}"]
    assert rows["a/one:o.gguf"] == {
        "architecture": "llama",
        "size_bytes": tiny_base.stat().st_size,
        "license": None,
        "path": str(one),
        "ready": True,
        "default": False,
    }
    assert rows[f"b/two:l.gguf@{1:040x}"]["license"] == "gemma"
    (line,) = [line for line in run("bases").stdout.splitlines() if line.startswith("b/two:l.gguf@")]
    assert line.split()[1] == "llama" and line.split()[-2:] == ["gemma", str(two)]
    for name in ("a/one:o.gguf", f"b/two:l.gguf@{1:040x}"):  # names as they can be used
        assert bases.resolve(name).is_file()


def test_a_pulled_file_that_is_gone_or_spoilt_is_said_to_be(
    standin: Hub, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin.add("a/one", **{"o.gguf": tiny_base.read_bytes(), "p.gguf": tiny_base.read_bytes() + b"\0"})
    gone, spoilt = bases.pull("a/one:o.gguf").resolve(), bases.pull("a/one:p.gguf").resolve()
    gone.unlink()
    spoilt.write_bytes(b"GGUF" + bytes(100))
    rows = listed()
    assert (rows["a/one:o.gguf"]["path"], rows["a/one:o.gguf"]["ready"]) == (None, False)
    assert (rows["a/one:p.gguf"]["architecture"], rows["a/one:p.gguf"]["ready"]) == (None, False)
    shown = run("bases").stdout
    assert "o.gguf" in shown and f"{spoilt}: unusable; delete it, then pull it again" in shown
    spoilt.unlink()
    assert bases.pull("a/one:p.gguf").resolve() == spoilt and listed()["a/one:p.gguf"]["ready"]


def test_a_damaged_record_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pulled.json").write_text("{")
    refused(run("bases"), says="pulled.json is damaged; delete it, and pull bases from the hub again.")


def test_a_named_base_in_the_cache_is_listed_once(tmp_path: Path, tiny_base: Path) -> None:
    from loramix.models import wheel

    path = wheel.cached_path(BASES["qwen2.5-coder-0.5b"])
    path.parent.mkdir(parents=True)
    shutil.copy(tiny_base, path)
    row = listed()["qwen2.5-coder-0.5b"]
    assert (row["path"], row["size_bytes"], row["ready"]) == (str(path), path.stat().st_size, True)
    assert str(path) in run("bases").stdout


@pytest.mark.parametrize(
    "count, said",
    [
        (494_032_768, "494.03M"),
        (630_167_424, "630.17M"),
        (135_000_000, "135M"),
        (1_235_814_432, "1.2B"),
        (2_000_000_000, "2B"),
        (59_712, "60K"),
        (999, "999"),
    ],
)
def test_sizes_as_ollama_writes_them(count: int, said: str) -> None:
    assert human_number(count) == said


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "file_type, said",
    [(15, "Q4_K_M"), (7, "Q8_0"), (0, "F32"), (17, "Q5_K_M"), (1024, "F16"), (999, "F16"), (None, "F16")],
)
def test_details_of_each_architecture(name: str, file_type: int | None, said: str, tmp_path: Path) -> None:
    """The file's own name of its types; that of most matrices where it has none that is known."""
    path = write_base(tmp_path / "x.gguf", architecture=name, kind="F16", **SHAPES[name])
    if file_type is not None:
        path = with_keys(path, tmp_path / "y.gguf", **{"general.file_type": file_type})
    found = BaseDetails.of(str(path))
    assert found.details["family"] == name and found.details["families"] == [name]
    assert found.details["quantization_level"] == said
    assert found.info[f"{name}.context_length"] == 512 and found.info["general.architecture"] == name
    assert found.details["parameter_size"] == human_number(found.info["general.parameter_count"])
