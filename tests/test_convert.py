"""PEFT → GGUF: what llama.cpp computes with the converted file is what PyTorch computes with the source."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file
from tiny import SHAPES, write_base, write_peft

from loramix.cli import main
from loramix.convert.adapter import convert_adapter, permute, read_peft, to_gguf
from loramix.convert.peft import export_peft, unpermute
from loramix.convert.selfcheck import applied, check, llama_logits, parity
from loramix.errors import LoramixError, SelfCheckFailed, Unsupported, WrongBase
from loramix.formats.requantize import quantize_q4_0, requantize
from loramix.formats.validate import read_base

ALL = tuple(SHAPES)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True, "r": 9, "size": 0.15},
    "patterns": {
        "ranks": {"k_proj": 2, "o_proj": 20},
        "rank_pattern": {"k_proj": 2, "o_proj": 20},
        "alpha_pattern": {"q_proj": 3, "model.layers.1.self_attn.v_proj": 40},
    },
    "q only": {"modules": ("q_proj",)},
    "all seven, rank 20": {"modules": ALL, "r": 20, "size": 0.1},
}


def convert(source: Path, base: Path, out: Path, **options: Any) -> Path:
    convert_adapter(source, base, out, outtype="f32", **options)
    return out


@pytest.mark.train
@pytest.mark.parametrize("name", KINDS)
def test_parity_with_peft_on_a_float32_base(name: str, tiny_base: Path, tmp_path: Path) -> None:
    peft = write_peft(tmp_path / "peft", **KINDS[name])
    found = check(tiny_base, convert(peft, tiny_base, tmp_path / "a.gguf"), peft, exact=True)
    assert found.max_difference <= 1e-3
    assert found.same_argmax == 1.0
    assert found.effect > 0.1


@pytest.mark.train
def test_the_check_fails_for_a_wrong_conversion(tiny_base: Path, tmp_path: Path) -> None:
    peft = write_peft(tmp_path / "peft")
    twice = tmp_path / "twice"
    write_peft(twice, lora_alpha=16)  # alpha applied twice over
    with pytest.raises(SelfCheckFailed, match="differs"):
        check(tiny_base, convert(twice, tiny_base, tmp_path / "twice.gguf"), peft, exact=True)
    unpermuted = tmp_path / "unpermuted"
    write_peft(unpermuted)
    tensors = load_file(unpermuted / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if "q_proj.lora_B" in name:
            tensors[name] = unpermute(tensor, 4)
    save_file(tensors, unpermuted / "adapter_model.safetensors")
    with pytest.raises(SelfCheckFailed, match="differs"):
        check(tiny_base, convert(unpermuted, tiny_base, tmp_path / "u.gguf"), peft, exact=True)


@pytest.mark.train
@pytest.mark.parametrize("scales", [(0.7, 0.3), (1.0, 0.5)])
def test_a_mix_is_the_sum_of_the_deltas(scales: tuple[float, float], tiny_base: Path, tmp_path: Path) -> None:
    """Two adapters of other ranks and targets, against PyTorch with both deltas merged into the weights."""
    first = write_peft(tmp_path / "first", seed=1)
    second = write_peft(
        tmp_path / "second", seed=2, r=6, modules=("q_proj", "up_proj", "down_proj"), size=0.2
    )
    mix = [
        (convert(peft, tiny_base, tmp_path / f"{peft.name}.gguf"), peft, scale)
        for peft, scale in zip((first, second), scales, strict=True)
    ]
    found = parity(tiny_base, mix)
    assert found.max_difference <= 1e-3
    assert found.same_argmax == 1.0


def test_converted_bytes_are_as_recorded(tiny_base: Path, tmp_path: Path) -> None:
    peft = write_peft(tmp_path / "peft", modules=ALL)
    convert_adapter(peft, tiny_base, tmp_path / "a.gguf", name="mood", base_name="tiny", base_sha256="a" * 64)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert values == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "mood",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
        "adapter.lora.task_name": "mood",
        "loramix.base.name": "tiny",
        "loramix.base.sha256": "a" * 64,
    }
    assert reader.fields["adapter.lora.alpha"].types == [gguf.GGUFValueType.FLOAT32]
    tensors = {t.name: hashlib.sha256(t.data.tobytes()).hexdigest()[:16] for t in reader.tensors}
    assert len(tensors) == 3 * 7 * 2
    golden = json.loads((Path(__file__).parent / "golden_tensors.json").read_text())
    assert tensors == golden


@pytest.mark.parametrize("name", KINDS)
def test_an_export_is_what_was_converted(name: str, tiny_base: Path, tmp_path: Path) -> None:
    """Scale times B times A of each module, from PEFT to GGUF and back; converted again, the bytes are the same."""
    peft = write_peft(tmp_path / "peft", **KINDS[name])
    shape = read_base(tiny_base)[1]
    gguf_file = convert(peft, tiny_base, tmp_path / "a.gguf")
    export_peft(gguf_file.read_bytes(), shape, tmp_path / "back", "a")
    before, after = read_peft(peft), read_peft(tmp_path / "back")
    assert before.pairs.keys() == after.pairs.keys()
    for module, (a, b) in before.pairs.items():
        x, y = after.pairs[module]
        np.testing.assert_allclose(
            after.scaling[module] * y @ x, before.scaling[module] * b @ a, rtol=1e-5, atol=1e-6
        )
    again = convert(tmp_path / "back", tiny_base, tmp_path / "b.gguf", name="peft")
    assert again.read_bytes() == gguf_file.read_bytes()


def test_a_late_adapter_is_exported_late(tiny_base: Path, tmp_path: Path) -> None:
    peft = write_peft(tmp_path / "peft", alora_invocation_tokens=[3, 5])
    out = convert(peft, tiny_base, tmp_path / "a.gguf").read_bytes()
    export_peft(out, read_base(tiny_base)[1], tmp_path / "back", "a")
    assert read_peft(tmp_path / "back").invocation == (3, 5)
    with pytest.raises(LoramixError, match="exists already"):
        export_peft(out, read_base(tiny_base)[1], tmp_path / "back", "a")


def test_permute_by_index() -> None:
    for heads, size in ((4, 16), (2, 8), (9, 64)):
        b = np.random.default_rng(0).normal(size=(heads * size, 3)).astype(np.float32)
        wanted = np.empty_like(b)
        for head in range(heads):
            for i in range(size // 2):
                for half in range(2):
                    wanted[head * size + 2 * i + half] = b[head * size + half * (size // 2) + i]
        assert np.array_equal(permute(b, heads), wanted)
        assert np.array_equal(unpermute(permute(b, heads), heads), b)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "DoRA"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "full modules"),
    "bias": ({"bias": "all"}, "biases"),
    "lora_bias": ({"lora_bias": True}, "biases"),
    "token embeddings": ({"trainable_token_indices": [1]}, "embeddings"),
    "parameters": ({"target_parameters": ["x"]}, "parameters"),
    "IA3": ({"peft_type": "IA3"}, "only LoRA"),
    "no type": ({"peft_type": None}, "has no peft_type"),
    "alpha": ({"lora_alpha": -1}, "positive"),
}


def refused(source: Path, base: Path, out: Path, says: str) -> None:
    """By the API with one sentence, by the command with exit code 1; nothing is written."""
    with pytest.raises(LoramixError, match=says):
        convert_adapter(source, base, out)
    words = ["convert", "adapter", str(source), "-o", str(out), "--base", str(base)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1 and result.stderr.startswith("error: "), result.output
    assert not list(out.parent.glob("*.gguf")) and not list(out.parent.glob(".*.tmp"))


@pytest.mark.parametrize("name", REFUSED)
def test_kinds_that_llama_cpp_cannot_run(name: str, tiny_base: Path, tmp_path: Path) -> None:
    config, says = REFUSED[name]
    refused(write_peft(tmp_path / "peft", **config), tiny_base, tmp_path / "out" / "a.gguf", says)


def test_damaged_sources(tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "a.gguf"

    def spoiled(name: str) -> Path:
        return write_peft(tmp_path / name)

    broken = spoiled("json")
    (broken / "adapter_config.json").write_text("{")
    refused(broken, tiny_base, out, "JSON")
    cut = spoiled("cut")
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    refused(cut, tiny_base, out, "safetensors")
    pickled = spoiled("bin")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused(pickled, tiny_base, out, "pickle")
    refused(tmp_path / "absent", tiny_base, out, "no adapter_config.json")
    for change, says in (
        ("drop", "lacks one of its two matrices"),
        ("nan", "not finite"),
        ("embedding", "not a LoRA matrix"),
    ):
        source = spoiled(change)
        tensors = load_file(source / "adapter_model.safetensors")
        name = next(name for name in tensors if "lora_B" in name)
        if change == "drop":
            del tensors[name]
        elif change == "nan":
            tensors[name][0, 0] = np.nan
        else:
            tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = np.ones((4, 259), np.float32)
        save_file(tensors, source / "adapter_model.safetensors")
        refused(source, tiny_base, out, says)


def test_adapters_of_another_base(tiny_base: Path, tmp_path: Path) -> None:
    source = write_peft(tmp_path / "peft")
    tensors = load_file(source / "adapter_model.safetensors")
    wide = {name: np.ones((4, 80), np.float32) if "lora_A" in name else t for name, t in tensors.items()}
    save_file(wide, source / "adapter_model.safetensors")
    with pytest.raises(WrongBase, match="another base"):
        convert_adapter(source, tiny_base, tmp_path / "a.gguf")
    moved = {name.replace("layers.2", "layers.7"): t for name, t in tensors.items()}
    save_file(moved, source / "adapter_model.safetensors")
    with pytest.raises(WrongBase, match="another base"):
        convert_adapter(source, tiny_base, tmp_path / "a.gguf")


def test_values_beyond_float16(tiny_base: Path, tmp_path: Path) -> None:
    source = write_peft(tmp_path / "peft", size=1e5)
    with np.errstate(over="ignore"), pytest.raises(Unsupported, match="--outtype f32"):
        convert_adapter(source, tiny_base, tmp_path / "a.gguf")
    assert list(tmp_path.glob("*.gguf")) == []


def test_an_adapter_that_does_nothing_is_noticed(tiny_base: Path, tmp_path: Path) -> None:
    source = write_peft(tmp_path / "peft", size=0.0)
    with pytest.raises(SelfCheckFailed, match="changes nothing"):
        applied(tiny_base, convert(source, tiny_base, tmp_path / "a.gguf"))


def test_alpha_and_rank_are_folded_once(tiny_base: Path, tmp_path: Path) -> None:
    """What llama.cpp will compute, alpha / rank x B A, is PEFT's scaling x B A for every matrix."""
    peft = read_peft(write_peft(tmp_path / "peft", **KINDS["patterns"]))
    _, shape = read_base(tiny_base)
    tensors, alpha = to_gguf(peft, shape)
    for module, (a, b) in peft.pairs.items():
        layer, kind = module.split(".")[2], module.split(".")[-1]
        if kind not in ("v_proj", "o_proj"):
            continue
        stem = f"blk.{layer}.{'attn_v' if kind == 'v_proj' else 'attn_output'}.weight"
        ours = (
            alpha / tensors[f"{stem}.lora_b"].shape[1] * tensors[f"{stem}.lora_b"] @ tensors[f"{stem}.lora_a"]
        )
        assert np.allclose(ours, peft.scaling[module] * b @ a, atol=1e-5)


def test_requantized_bases(tiny_base: Path, tmp_path: Path) -> None:
    source = {t.name: np.array(t.data) for t in gguf.GGUFReader(tiny_base).tensors}
    for kind, bound in (("Q8_0", 0.01), ("Q4_0", 0.12), ("F32", 0.0)):
        out = tmp_path / f"{kind}.gguf"
        requantize(tiny_base, out, {"blk.": kind})
        reader = gguf.GGUFReader(out)
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            error = np.abs(values - source[tensor.name]).max() / np.abs(source[tensor.name]).max()
            assert error <= bound, (kind, tensor.name)
        before = {k: f.contents() for k, f in gguf.GGUFReader(tiny_base).fields.items() if k[:4] != "GGUF"}
        after = {k: f.contents() for k, f in reader.fields.items() if k[:4] != "GGUF"}
        assert {**after, "general.file_type": 0} == {**before, "general.file_type": 0}
        again = tmp_path / "again.gguf"
        requantize(tiny_base, again, {"blk.": kind})
        assert again.read_bytes() == out.read_bytes()
        assert len(llama_logits(out, [])[0]) == 3


def test_q4_0_scales_are_searched() -> None:
    rows = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    packed = quantize_q4_0(rows)
    ours = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_0)
    plain = gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q4_0)
    theirs = gguf.quants.dequantize(plain, gguf.GGMLQuantizationType.Q4_0)
    assert ((ours - rows) ** 2).mean() < 0.95 * ((theirs - rows) ** 2).mean()
    assert (np.abs(quantize_q4_0(np.zeros((1, 32), np.float32))[0, :2].view(np.float16)) == 0).all()


def test_a_base_of_another_size_is_refused(tmp_path: Path) -> None:
    data = write_base(tmp_path / "b.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    with pytest.raises(LoramixError, match="after the end of the file"):
        read_base(tmp_path / "cut.gguf")


def test_export_by_command(tiny_pack: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    command = ["export", "peft", "sentiment", "--pack", str(tiny_pack), "-o", str(out)]
    found = CliRunner().invoke(main, command)
    assert (found.exit_code, found.output.strip()) == (0, str(out)), found.output
    assert read_peft(out).pairs
    for skill, complaint in (("sentiment", "exists already"), ("haiku", "'haiku'")):
        command[2] = skill
        refused = CliRunner().invoke(main, command)
        assert refused.exit_code == 2
        assert complaint in refused.output
