"""Fused mixes: one adapter that computes what several do."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny import write_peft

from loramix.convert.adapter import convert_adapter
from loramix.convert.selfcheck import llama_logits
from loramix.formats.gguf_reader import read_gguf, tensor_values
from loramix.formats.validate import check_adapter, read_base
from loramix.models.fuse import fuse, read_pairs, write_gguf
from loramix.runtime.llama.model import quantize_rows

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapters(directory: Path, base: Path, outtype: str = "f32") -> list[Path]:
    """Three of other ranks and matrices."""
    kinds = (
        {"seed": 1, "r": 4, "modules": ALL},
        {"seed": 2, "r": 6, "modules": ("q_proj", "down_proj"), "size": 0.2},
        {"seed": 3, "r": 20, "modules": ("v_proj", "up_proj"), "ranks": {"v_proj": 8}},
    )
    found = []
    for i, options in enumerate(kinds):
        peft = write_peft(directory / f"peft{i}", **options)  # type: ignore[arg-type]
        out = directory / f"{i}.gguf"
        convert_adapter(peft, base, out, outtype=outtype)
        found.append(out)
    return found


@pytest.mark.parametrize("scales", [(1.0, 0, 0), (0.5, 0, 0), (0, 0, 1.0), (0.7, 0.3, 0), (1.0, 2.0, 0.25)])
def test_a_fused_mix_computes_what_its_parts_do(
    scales: tuple[float, ...], tiny_base: Path, tmp_path: Path
) -> None:
    parts = [(p, s) for p, s in zip(adapters(tmp_path, tiny_base), scales, strict=True) if s]
    one = tmp_path / "fused.gguf"
    one.write_bytes(fuse([(path.read_bytes(), scale) for path, scale in parts]))
    separate, _ = llama_logits(tiny_base, parts)
    together, _ = llama_logits(tiny_base, [(one, 1.0)])
    bare, _ = llama_logits(tiny_base, [])
    apart = max(np.abs(a - b).max() for a, b in zip(separate, together, strict=True))
    moved = max(np.abs(a - b).max() for a, b in zip(separate, bare, strict=True))
    assert apart < 1e-3 < 0.05 < moved
    one.write_bytes(fuse([(path.read_bytes(), scale) for path, scale in parts], quantize=quantize_rows))
    assert {t.type_name for t in read_gguf(one.read_bytes(), "fused").tensors.values()} == {"Q8_0"}
    ranks = check_adapter(one.read_bytes(), read_base(tiny_base)[1], "fused").ranks
    assert set(ranks.values()) <= {32, 64}
    rounded, _ = llama_logits(tiny_base, [(one, 1.0)])
    off, on = (
        np.mean([np.abs(a - b).mean() for a, b in zip(separate, other, strict=True)])
        for other in (rounded, bare)
    )
    assert off < 0.1 * on, "these adapters turn a random base's logits upside down"


def test_a_single_skill_keeps_its_numbers(tiny_base: Path, tmp_path: Path) -> None:
    content = adapters(tmp_path, tiny_base, "f16")[0].read_bytes()
    before, after = read_gguf(content, "a"), read_gguf(alone := fuse([(content, 1.0)]), "b")
    assert after.metadata["adapter.lora.alpha"] == before.metadata["adapter.lora.alpha"]
    for name, tensor in before.tensors.items():
        assert after.tensors[name].type_name == tensor.type_name == "F16"
        assert np.array_equal(tensor_values(alone, after.tensors[name]), tensor_values(content, tensor))


def test_a_rounded_skill_is_padded_with_zeros(tiny_base: Path, tmp_path: Path) -> None:
    content = adapters(tmp_path, tiny_base)[0].read_bytes()
    before, after = read_pairs(content), read_pairs(fuse([(content, 1.0)], quantize=quantize_rows))
    for target, (a, b, scaling) in before.items():
        wide_a, wide_b, same = after[target]
        assert wide_a.shape == (32, a.shape[1]) and wide_b.shape == (b.shape[0], 32)
        assert same == pytest.approx(scaling, rel=1e-6)
        assert np.abs(wide_a[:4] - a).max() < np.abs(a).max() / 200 and not wide_a[4:].any()
        assert np.abs(wide_b[:, :4] - b).max() < np.abs(b).max() / 200 and not wide_b[:, 4:].any()


@pytest.mark.parametrize("kind", ["Q8_0", "BF16"])
def test_other_types_are_read(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    """Matrices as somebody else's converter wrote them."""
    wanted = gguf.GGMLQuantizationType[kind]
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((32, 64), (64, 32)))
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 16.0)
    for name, values in (("lora_a", a), ("lora_b", b)):
        packed = gguf.quants.quantize(values, wanted)
        writer.add_tensor(f"blk.0.attn_q.weight.{name}", packed, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = fuse([((tmp_path / "a.gguf").read_bytes(), 2.0)])
    (tmp_path / "b.gguf").write_bytes(found)
    tensors = {t.name.rpartition(".")[2]: t.data for t in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    alpha = read_gguf(found, "b").metadata["adapter.lora.alpha"]
    product = alpha / 32 * tensors["lora_b"] @ tensors["lora_a"]
    assert np.abs(product - 2.0 * 16 / 32 * b @ a).max() < 0.2, "within the types' rounding"
    rounded = [gguf.quants.dequantize(gguf.quants.quantize(v, wanted), wanted) for v in (b, a)]
    assert np.allclose(product, rounded[0] @ rounded[1], atol=1e-4)


def test_files_are_as_ggufs_own_reader_reads_them(tmp_path: Path) -> None:
    tensors = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "y": np.ones((3, 5), np.float16)}
    (tmp_path / "a.gguf").write_bytes(write_gguf({"general.architecture": "llama", "é": 0.5}, tensors))
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["é"].contents() == 0.5
    found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], values) for name, values in tensors.items())
