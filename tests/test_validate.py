"""Files from strangers: whatever they hold, the answer is a clean load or one sentence, never a signal."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_base

from loramix.errors import InvalidArtifact, LoramixError, NotFound, Unsupported, WrongBase
from loramix.formats.gguf_reader import read_gguf
from loramix.formats.safetensors_reader import SafetensorsFile, parse_safetensors
from loramix.formats.validate import check_adapter, read_adapter_bytes, read_base, read_safetensors


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return read_base(write_base(tmp_path_factory.mktemp("base") / "tiny.gguf"))[1]


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def tensor(name: str, extents: list[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = b"".join(struct.pack("<Q", extent) for extent in extents)
    return string(name) + struct.pack("<I", len(extents)) + sizes + struct.pack("<IQ", kind, offset)


def crafted(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    keys, tensors = keys or [], tensors or []
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


FOUR = struct.pack("<4f", 1, 2, 3, 4)
MUST_FAIL = {
    "empty": b"",
    "magic": crafted(magic=b"GGML"),
    "version 1": crafted(version=1),
    "version 4": crafted(version=4),
    "big endian version": crafted(version=0x03000000),
    "no counts": b"GGUF" + struct.pack("<I", 3),
    "tensor count huge": crafted(counts=(2**63, 0)),
    "key count huge": crafted(counts=(0, 2**63)),
    "key count beyond file": crafted(counts=(0, 5)),
    "tensor count beyond file": crafted(counts=(5, 0)),
    "key length 2^60": crafted([struct.pack("<Q", 2**60)], counts=(0, 1)),
    "key empty": crafted([key("", 4, b"\1\0\0\0")]),
    "key not UTF-8": crafted([key("\xff", 4, b"\1\0\0\0").replace("\xff".encode(), b"\xff\xff")]),
    "key twice": crafted([key("a", 4, b"\1\0\0\0")] * 2),
    "value type unknown": crafted([key("a", 13, b"\1\0\0\0")]),
    "value cut": crafted([key("a", 10, b"")])[:40],
    "string length 2^60": crafted([key("a", 8, struct.pack("<Q", 2**60))]),
    "string over the cap": crafted([key("a", 8, string("x" * (1 << 20) + "y"))]),
    "string not UTF-8": crafted([key("a", 8, string(b"\xc3\x28"))]),
    "array of 1e6 in 50 bytes": crafted([key("a", 9, struct.pack("<IQ", 4, 10**6))]),
    "array of 2^62 bytes": crafted([key("a", 9, struct.pack("<IQ", 0, 2**62))]),
    "array of 2^61 strings": crafted([key("a", 9, struct.pack("<IQ", 8, 2**61))]),
    "array string too long": crafted([key("a", 9, struct.pack("<IQQ", 8, 1, 2**40))]),
    "array of arrays": crafted([key("a", 9, struct.pack("<IQ", 9, 1))]),
    "array of unknown": crafted([key("a", 9, struct.pack("<IQ", 77, 1))]),
    "alignment zero": crafted([key("general.alignment", 4, struct.pack("<I", 0))]),
    "alignment 3": crafted([key("general.alignment", 4, struct.pack("<I", 3))]),
    "alignment huge": crafted([key("general.alignment", 4, struct.pack("<I", 2**31))]),
    "alignment as text": crafted([key("general.alignment", 8, string("32"))]),
    "alignment as u64": crafted([key("general.alignment", 10, struct.pack("<Q", 32))]),
    "tensor without name": crafted(tensors=[tensor("", [4])], data=FOUR),
    "tensor name 64": crafted(tensors=[tensor("x" * 64, [4])], data=FOUR),
    "no dimensions": crafted(tensors=[tensor("t", [])], data=FOUR),
    "five dimensions": crafted(tensors=[tensor("t", [1] * 5)], data=FOUR),
    "a million dimensions": crafted(tensors=[string("t") + struct.pack("<I", 10**6)], data=FOUR),
    "extent zero": crafted(tensors=[tensor("t", [0])], data=FOUR),
    "extent negative": crafted(tensors=[tensor("t", [2**64 - 1])], data=FOUR),
    "product wraps": crafted(tensors=[tensor("t", [2**32, 2**32])], data=FOUR),
    "type unknown": crafted(tensors=[tensor("t", [4], kind=99)], data=FOUR),
    "type removed (Q4_2)": crafted(tensors=[tensor("t", [4], kind=4)], data=FOUR),
    "row not in blocks": crafted(tensors=[tensor("t", [4], kind=8)], data=FOUR * 10),
    "offset not aligned": crafted(tensors=[tensor("t", [4], offset=4)], data=FOUR * 4),
    "offset beyond file": crafted(tensors=[tensor("t", [4], offset=2**20)], data=FOUR),
    "offset wraps": crafted(tensors=[tensor("t", [4], offset=2**64 - 32)], data=FOUR),
    "ends beyond file": crafted(tensors=[tensor("t", [8])], data=FOUR),
    "twice": crafted(tensors=[tensor("t", [4]), tensor("t", [4], offset=32)], data=FOUR * 4),
    "overlap": crafted(tensors=[tensor("t", [12]), tensor("u", [4], offset=32)], data=FOUR * 4),
}
MUST_LOAD = {
    "nothing": crafted(),
    "version 2": crafted(version=2),
    "one tensor": crafted(tensors=[tensor("t", [4])], data=FOUR),
    "name of 63": crafted(tensors=[tensor("x" * 63, [4])], data=FOUR),
    "array of strings": crafted([key("a", 9, struct.pack("<IQ", 8, 2) + string("x") + string("y"))]),
    "empty array": crafted([key("a", 9, struct.pack("<IQ", 4, 0))]),
    "every scalar": crafted(
        [
            key(f"k{kind}", kind, b"\1" * size)
            for kind, size in ((0, 1), (1, 1), (2, 2), (3, 2), (4, 4), (7, 1), (12, 8))
        ]
    ),
}


@pytest.mark.parametrize("name", MUST_FAIL)
def test_malformed_gguf_is_refused(name: str) -> None:
    with pytest.raises(InvalidArtifact) as caught:
        read_gguf(MUST_FAIL[name], "f.gguf")
    assert "f.gguf" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", MUST_LOAD)
def test_odd_but_valid_gguf_loads(name: str) -> None:
    read_gguf(MUST_LOAD[name], "f.gguf")


def adapter(path: Path, **changes: Any) -> bytes:
    """A good LoRA for the tiny base, with parts replaced: keys by name, or ``tensors``."""
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    tensors = changes.pop(
        "tensors",
        {
            "blk.0.attn_q.weight.lora_a": np.ones((4, 64), np.float16),
            "blk.0.attn_q.weight.lora_b": np.ones((64, 4), np.float16),
        },
    )
    values = {
        "general.type": ("string", "adapter"),
        "adapter.type": ("string", "lora"),
        "adapter.lora.alpha": ("float32", 8.0),
        **changes,
    }
    for name, pair in values.items():
        if pair is not None:
            getattr(writer, f"add_{pair[0]}")(name, pair[1])
    for name, values_ in tensors.items():
        if isinstance(values_, tuple):
            writer.add_tensor(name, values_[0], raw_dtype=values_[1])
        else:
            writer.add_tensor(name, values_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def pair(a: np.ndarray, b: np.ndarray, target: str = "blk.0.attn_q.weight") -> dict[str, np.ndarray]:
    return {f"{target}.lora_a": a, f"{target}.lora_b": b}


A, B = np.ones((4, 64), np.float32), np.ones((64, 4), np.float32)
BAD_ADAPTERS: dict[str, tuple[dict[str, Any], type[LoramixError]]] = {
    "type of a model": ({"general.type": ("string", "model")}, InvalidArtifact),
    "type as a number": ({"general.type": ("uint32", 1)}, InvalidArtifact),
    "no type": ({"general.type": None}, InvalidArtifact),
    "architecture": ({"architecture": "qwen2"}, WrongBase),
    "not a LoRA": ({"adapter.type": ("string", "ia3")}, InvalidArtifact),
    "adapter type as a number": ({"adapter.type": ("uint32", 1)}, InvalidArtifact),
    "alpha f64": ({"adapter.lora.alpha": ("float64", 8.0)}, InvalidArtifact),
    "alpha u32": ({"adapter.lora.alpha": ("uint32", 8)}, InvalidArtifact),
    "alpha NaN": ({"adapter.lora.alpha": ("float32", float("nan"))}, InvalidArtifact),
    "alpha infinite": ({"adapter.lora.alpha": ("float32", float("inf"))}, InvalidArtifact),
    "alpha zero": ({"adapter.lora.alpha": ("float32", 0.0)}, InvalidArtifact),
    "alpha negative": ({"adapter.lora.alpha": ("float32", -1.0)}, InvalidArtifact),
    "no matrices": ({"tensors": {}}, InvalidArtifact),
    "B missing": ({"tensors": {"blk.0.attn_q.weight.lora_a": A}}, InvalidArtifact),
    "A missing": ({"tensors": {"blk.0.attn_q.weight.lora_b": B}}, InvalidArtifact),
    "another suffix": ({"tensors": {**pair(A, B), "blk.0.attn_q.weight": A}}, InvalidArtifact),
    "unknown target": ({"tensors": pair(A, B, "blk.9.attn_q.weight")}, WrongBase),
    "norm": ({"tensors": pair(A, B, "blk.0.attn_norm.weight")}, WrongBase),
    "embedding": ({"tensors": pair(A, np.ones((259, 4), np.float32), "token_embd.weight")}, InvalidArtifact),
    "output": ({"tensors": pair(A, np.ones((259, 4), np.float32), "output.weight")}, InvalidArtifact),
    "vocabulary": ({"tensors": pair(A, np.ones((300, 4), np.float32), "output.weight")}, WrongBase),
    "width of another base": ({"tensors": pair(np.ones((4, 96), np.float32), B)}, WrongBase),
    "height of another base": ({"tensors": pair(A, np.ones((32, 4), np.float32))}, WrongBase),
    "ranks differ": ({"tensors": pair(A, np.ones((64, 8), np.float32))}, InvalidArtifact),
    "rank 257": (
        {"tensors": pair(np.ones((257, 64), np.float32), np.ones((64, 257), np.float32))},
        InvalidArtifact,
    ),
    "3-D A": ({"tensors": pair(np.ones((2, 4, 64), np.float32), B)}, InvalidArtifact),
    "3-D B": ({"tensors": pair(A, np.ones((2, 64, 4), np.float32))}, InvalidArtifact),
    "1-D": ({"tensors": pair(np.ones(64, np.float32), B)}, InvalidArtifact),
    "I32": ({"tensors": pair(A.astype(np.int32), B)}, InvalidArtifact),
    "F64": ({"tensors": pair(A.astype(np.float64), B)}, InvalidArtifact),
    "NaN": ({"tensors": pair(A * np.float32("nan"), B)}, InvalidArtifact),
    "infinite B": ({"tensors": pair(A, B * np.float32("inf"))}, InvalidArtifact),
    "NaN in float16": (
        {"tensors": pair(A.astype(np.float16), (B * np.nan).astype(np.float16))},
        InvalidArtifact,
    ),
}


@pytest.mark.parametrize("name", BAD_ADAPTERS)
def test_adapters_that_would_crash_or_spoil_are_refused(name: str, tmp_path: Path, base: Any) -> None:
    changes, error = BAD_ADAPTERS[name]
    data = adapter(tmp_path / "a.gguf", **dict(changes))
    with pytest.raises(error) as caught:
        check_adapter(data, base, "a.gguf")
    assert "\n" not in str(caught.value)


def test_a_good_adapter_passes_in_every_type(tmp_path: Path, base: Any) -> None:
    wide_a, wide_b = np.ones((32, 64), np.float32), np.ones((64, 32), np.float32)
    for name in ("F32", "F16", "BF16", "Q8_0"):
        kind = gguf.GGMLQuantizationType[name]
        packed = [(gguf.quants.quantize(x, kind), kind) for x in (wide_a, wide_b)]
        info = check_adapter(adapter(tmp_path / f"{name}.gguf", tensors=pair(*packed)), base, name)
        assert info.ranks == {"blk.0.attn_q.weight": 32}
        assert info.alpha == 8.0
        assert info.n_params == 2 * 32 * 64


def test_an_adapter_of_another_base_is_named(tmp_path: Path, base: Any) -> None:
    made_for = {"loramix.base.sha256": ("string", "a" * 64), "loramix.base.name": ("string", "other-base")}
    data = adapter(tmp_path / "a.gguf", **made_for)
    check_adapter(data, base, "a.gguf", base_sha256="a" * 64)
    with pytest.raises(WrongBase, match="other-base"):
        check_adapter(data, base, "a.gguf", base_sha256="b" * 64)


def test_cut_and_flipped_adapters(tmp_path: Path, base: Any) -> None:
    good = adapter(tmp_path / "a.gguf")
    for i in range(64):
        with pytest.raises(LoramixError):
            check_adapter(good[: len(good) * i // 64], base, "a.gguf")
    for i in range(64):  # a flipped byte may do no harm; it must not do any that is not a sentence
        spoiled = bytearray(good)
        spoiled[i * 7 % 400] ^= 0xFF
        try:
            check_adapter(bytes(spoiled), base, "a.gguf")
        except LoramixError:
            pass


@settings(max_examples=1500, derandomize=True)
@given(st.data())
def test_mutated_headers_raise_only_our_errors(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted({**MUST_FAIL, **MUST_LOAD})))
    content = bytearray({**MUST_FAIL, **MUST_LOAD}[name][:4096])
    for _ in range(data.draw(st.integers(0, 6))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content += data.draw(st.binary(max_size=40))
    began = time.thread_time()
    try:
        read_gguf(bytes(content), "f.gguf")
    except InvalidArtifact:
        pass
    assert time.thread_time() - began < 1


def test_bases_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="loramix pull"):
        read_base(tmp_path / "absent.gguf")
    with pytest.raises(InvalidArtifact, match="regular file"):
        read_base(tmp_path)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(InvalidArtifact, match="regular file"):
        read_base(pipe)
    (tmp_path / "empty").touch()
    with pytest.raises(InvalidArtifact, match="empty"):
        read_base(tmp_path / "empty")
    adapter(tmp_path / "a.gguf")
    with pytest.raises(InvalidArtifact, match="adapter"):
        read_base(tmp_path / "a.gguf")
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(Unsupported, match="mamba"):
        read_base(tmp_path / "q.gguf")


def header(entries: dict[str, Any] | str, body: bytes = b"", length: int | None = None) -> bytes:
    raw = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "data_offsets": list(offsets),
    }


TWO = struct.pack("<2f", 1, 2)
BAD_SAFETENSORS = {
    "empty": b"",
    "short": b"\1\0\0",
    "header length huge": header({}, length=2**60),
    "header beyond file": header({}, length=50),
    "not JSON": header("{"),
    "a list": header("[]"),
    "deep": header("[" * 100_000),
    "name twice": header('{"a": %s, "a": %s}' % ((json.dumps(entry()),) * 2), TWO),
    "hole": header({"a": entry(offsets=(4, 12))}, b"\0" * 12),
    "overlap": header({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12),
    "beyond file": header({"a": entry()}, b"\0" * 4),
    "bytes left": header({"a": entry()}, TWO + b"\0"),
    "size": header({"a": entry(shape=(3,))}, TWO),
    "negative": header({"a": entry(shape=(-2,))}, TWO),
    "float extent": header({"a": entry(shape=[2.0])}, TWO),
    "true extent": header({"a": entry(shape=[True, 2])}, TWO),
    "shape text": header({"a": entry(shape="2")}, TWO),
    "dtype": header({"a": entry(dtype="I64", shape=(1,))}, TWO),
    "dtype number": header({"a": {**entry(), "dtype": 5}}, TWO),
    "offsets missing": header({"a": {"dtype": "F32", "shape": [2]}}, TWO),
    "offsets reversed": header({"a": entry(offsets=(8, 0))}, TWO),
    "NaN": header({"a": entry()}, struct.pack("<2f", 1, float("nan"))),
    "infinite": header({"a": entry()}, struct.pack("<2f", 1, float("inf"))),
    "beyond float32": header({"a": entry("F64", (1,))}, struct.pack("<d", 1e300)),
    "100 001 tensors": header({str(i): entry(shape=(0,), offsets=(0, 0)) for i in range(100_001)}),
}


@pytest.mark.parametrize("dtype", ["I32", "U8", "I8", "F8_E4M3", "F8_E5M2", "F4"])
def test_weights_that_are_quantized_already_are_named_as_such(dtype: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(header({"a": entry(dtype=dtype, shape=(8,))}, TWO))
    with pytest.raises(
        InvalidArtifact, match=f"is {dtype}, as in weights that are quantized already .* full"
    ):
        read_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", BAD_SAFETENSORS)
def test_malformed_safetensors_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArtifact) as whole:
        parse_safetensors(BAD_SAFETENSORS[name], str(tmp_path / "f.safetensors"))
    if name == "beyond float32":
        return  # float64 is read as it is where only a part is read at once
    (tmp_path / "f.safetensors").write_bytes(BAD_SAFETENSORS[name])
    with pytest.raises(InvalidArtifact) as piecewise, SafetensorsFile(tmp_path / "f.safetensors") as file:
        for entry in file.entries:
            list(file.chunks(entry, 1))
    assert str(piecewise.value) == str(whole.value)


def test_a_tensor_in_pieces_is_the_whole(tmp_path: Path) -> None:
    values = np.arange(10, dtype="<f4")
    (tmp_path / "f.safetensors").write_bytes(
        header({"a": entry(shape=(2, 5), offsets=(0, 40))}, values.tobytes())
    )
    with SafetensorsFile(tmp_path / "f.safetensors") as file:
        assert [len(part) for part in file.chunks("a", 4)] == [4, 4, 2]
        assert np.concatenate(list(file.chunks("a", 4))).tolist() == values.tolist()
        (tmp_path / "f.safetensors").write_bytes(b"")
        with pytest.raises(InvalidArtifact, match="ends inside tensor 'a'"):
            list(file.chunks("a"))


def test_safetensors_of_every_float_type() -> None:
    body = struct.pack("<2f", 1, -2) + np.asarray([3], "<f2").tobytes() + b"\x80\x40" + struct.pack("<d", 5)
    found = parse_safetensors(
        header(
            {
                "__metadata__": {"format": "pt"},
                "f32": entry(),
                "f16": entry("F16", (1,), (8, 10)),
                "bf16": entry("BF16", (1, 1), (10, 12)),
                "f64": entry("F64", (1,), (12, 20)),
            },
            body,
        ),
        "f.safetensors",
    )
    assert {name: array.ravel().tolist() for name, array in found.items()} == {
        "f32": [1, -2],
        "f16": [3],
        "bf16": [4],
        "f64": [5],
    }
    assert all(array.dtype == np.float32 for array in found.values())


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.pkl", "a.ckpt", "a.npy", "a.gguf", "a.safetensors"])
def test_pickles_are_refused_by_name_and_by_content(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "it ran"
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(InvalidArtifact, match="pickle"):
        read_safetensors(path) if path.suffix == ".safetensors" else read_adapter_bytes(path)
    assert not canary.exists()
