"""Mixes for other programs: one adapter, or a merged base, that computes what the running mix does."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file
from tiny import N_HEAD, N_HEAD_KV, write_base, write_peft

from loramix import Engine
from loramix.cli import main
from loramix.convert.adapter import convert_adapter, permute
from loramix.convert.export import Chosen, choose, export_adapter, export_gguf
from loramix.convert.merge import merge, wanted_type
from loramix.errors import InvalidArtifact, NoSpace, SelfCheckFailed, Unsupported, UsageError, WrongBase
from loramix.formats.gguf_reader import read_gguf
from loramix.formats.validate import read_base
from loramix.models import bases
from loramix.models.fuse import write_lora
from loramix.models.mixing import Mix
from loramix.pack.edit import add_skill, new_pack
from loramix.runtime.decoder import DecodeRequest
from loramix.runtime.llama.context import Context
from loramix.runtime.llama.model import Model, quantize_rows

MIXES = ["sentiment", "sentiment=0.5", "sentiment=0.75,summarize=0.25"]
PROMPT = "What a day!"


pytestmark = pytest.mark.usefixtures("light_native_code")


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """Numbers of all tensors of a GGUF."""
    return {
        tensor.name: gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


def running(pack: Path, mix: str) -> tuple[list[int], np.ndarray]:
    """The engine's tokens of a prompt, and its logits after them."""
    with Engine.open(pack, n_ctx=128, n_threads=1) as engine:
        tokens = engine.model.chat([{"role": "user", "content": PROMPT}])
        return tokens, engine.decode(DecodeRequest(Mix.parse(mix), tokens, len(tokens))).logits


def alone(base: Path, tokens: list[int], adapter: Path | None = None) -> np.ndarray:
    """Logits after tokens of a base, under an adapter at scale 1."""
    with Model(base, use_extra_bufts=False) as model:
        mix = [(model.load_adapter(adapter.read_bytes(), "a"), 1.0)] if adapter else []
        return Context(model, mix, n_ctx=128, n_threads=1).decode(tokens)


def pack_of(directory: Path, base: Path, **peft: Any) -> Path:
    """A pack of one skill, without a gate."""
    new_pack(directory / "mypack", str(base), bases.digest(base))
    convert_adapter(write_peft(directory / "peft", **peft), base, directory / "a.gguf", outtype="f32")
    add_skill(directory / "mypack", "mood", directory / "a.gguf", description="x", max_tokens=9)
    return directory / "mypack"


@pytest.mark.parametrize("mix", MIXES)
def test_one_adapter_at_scale_1_is_the_running_mix(
    mix: str, tiny_pack: Path, tiny_base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "mix.gguf"
    result = CliRunner().invoke(main, ["export", "adapter", "-m", mix, "-p", str(tiny_pack), "-o", str(out)])
    assert (result.exit_code, result.output.strip()) == (0, str(out)), result.output
    tokens, wanted = running(tiny_pack, mix)
    found = alone(tiny_base, tokens, out)
    assert np.abs(found - wanted).max() < 1e-4 < np.abs(alone(tiny_base, tokens) - wanted).max()
    metadata = read_gguf(out.read_bytes(), "out").metadata
    assert metadata["loramix.mix"] == str(Mix.parse(mix))
    assert metadata["loramix.base.sha256"] == bases.digest(tiny_base)


@pytest.mark.parametrize("mix", MIXES)
def test_a_merged_base_is_the_running_mix(mix: str, tiny_pack: Path, tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged.gguf"
    found = export_gguf(choose(str(tiny_pack), mix), out)
    tokens, wanted = running(tiny_pack, mix)
    # llama.cpp multiplies float16 adapters with inputs rounded to float16, and the engine keeps such KV
    assert np.abs(alone(out, tokens) - wanted).max() < 0.02
    assert np.abs(alone(tiny_base, tokens) - wanted).max() > 0.5
    assert found.mean_kl < 1e-4 * found.bare_kl
    assert found.same_argmax > 0.98
    before, after = (
        {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
        for path in (tiny_base, out)
    )
    added = {key: after.pop(key) for key in list(after) if key.startswith("loramix.")}
    assert added["loramix.mix"] == str(Mix.parse(mix))
    assert after == {**before, "general.quantization_version": 2}


def test_weights_move_by_alpha_over_rank_times_b_a(tiny_base: Path, tmp_path: Path) -> None:
    """By PEFT's own numbers; what no adapter touches stays as it is, byte for byte."""
    peft = write_peft(tmp_path / "peft", modules=("q_proj", "k_proj", "down_proj"), r=6, lora_alpha=9)
    convert_adapter(peft, tiny_base, tmp_path / "a.gguf", outtype="f32")
    merge(tiny_base, [((tmp_path / "a.gguf").read_bytes(), 0.5)], tmp_path / "merged.gguf", metadata={})
    source, before, after = (
        load_file(peft / "adapter_model.safetensors"),
        tensors_of(tiny_base),
        tensors_of(tmp_path / "merged.gguf"),
    )
    moved = 0
    for name, values in after.items():
        _, layer, part, _ = name.split(".") if name.startswith("blk.") else ("", "", "", "")
        module = {
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "ffn_down": "mlp.down_proj",
        }.get(part)
        if module is None:
            assert values.tobytes() == before[name].tobytes(), name
            continue
        stem = f"base_model.model.model.layers.{layer}.{module}"
        delta = 0.5 * 9 / 6 * source[f"{stem}.lora_B.weight"] @ source[f"{stem}.lora_A.weight"]
        if part != "ffn_down":
            delta = permute(delta, N_HEAD if part == "attn_q" else N_HEAD_KV)
        assert np.allclose(values - before[name], delta, atol=1e-5), name
        moved += 1
    assert moved == 3 * 3


@pytest.mark.parametrize(
    "quant, bound", [("Q8_0", 0.01), ("Q4_0", 0.13), ("Q4_1", 0.13), ("F16", 1e-3), ("F32", 0)]
)
def test_types_that_can_be_asked_for(
    quant: str, bound: float, tiny_pack: Path, tiny_base: Path, tmp_path: Path
) -> None:
    chosen = choose(str(tiny_pack), "summarize")
    merge(tiny_base, chosen.parts, tmp_path / "exact.gguf", metadata={})
    out = tmp_path / "out.gguf"
    command = [
        "export",
        "gguf",
        "--mix",
        "summarize",
        "--pack",
        str(tiny_pack),
        "--quant",
        quant,
        "-o",
        str(out),
    ]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "KL to the running mix" in result.stderr
    exact, found = tensors_of(tmp_path / "exact.gguf"), tensors_of(out)
    for name, values in found.items():
        assert np.abs(values - exact[name]).max() <= bound * np.abs(exact[name]).max(), name
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert types["blk.0.attn_q.weight"] == types["blk.2.ffn_down.weight"] == quant
    assert types["token_embd.weight"] == ("Q8_0" if quant.startswith("Q4") else quant)
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "F32"


def test_a_quantized_base_keeps_its_types(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf", kind="Q8_0")
    found = export_gguf(choose(str(pack_of(tmp_path, base)), "mood"), tmp_path / "out.gguf")
    assert found.mean_kl < 0.02 * found.bare_kl
    before, after = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for path in (base, tmp_path / "out.gguf")
    )
    assert {n: t.tensor_type for n, t in before.items()} == {n: t.tensor_type for n, t in after.items()}
    touched = {f"attn_{x}.weight" for x in ("q", "k", "v", "output")}
    for name, tensor in after.items():
        assert (tensor.data.tobytes() == before[name].data.tobytes()) == (
            name.split(".", 2)[-1] not in touched
        )


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q8_0"])
def test_types_that_llama_cpp_alone_can_make(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    rows = np.random.default_rng(0).normal(size=(5, 512)).astype(np.float32)
    packed = quantize_rows(rows, int(kind))
    back = gguf.quants.dequantize(packed, kind)
    error = ((back - rows) ** 2).mean() ** 0.5
    assert 0 < error < {"Q3_K": 0.2, "Q4_K": 0.1, "Q5_K": 0.05}.get(name, 0.03)
    with pytest.raises(Unsupported, match="importance matrix"):
        quantize_rows(rows, int(gguf.GGMLQuantizationType.IQ1_S))


def test_k_quants_are_merged_in_their_own_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than are held at once, so that the parts of a tensor must join."""
    monkeypatch.setattr("loramix.convert.merge._CHUNK", 7 * 512)
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(90, 512)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_K
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", quantize_rows(weight, int(kind)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    a, b = rng.normal(size=(4, 512)).astype(np.float32), rng.normal(size=(90, 4)).astype(np.float32)
    pairs = {"blk.0.ffn_up.weight.lora_a": a, "blk.0.ffn_up.weight.lora_b": b}
    parts = [(write_lora("llama", 8.0, pairs), 0.5)]
    merge(tmp_path / "base.gguf", parts, tmp_path / "out.gguf", metadata={})
    (tensor,) = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    assert tensor.tensor_type == kind
    error = tensors_of(tmp_path / "out.gguf")[tensor.name] - (weight + b @ a)
    assert (error**2).mean() ** 0.5 < 0.3 < (b @ a).std()


def test_which_type_a_tensor_gets() -> None:
    matrix = (64, 256)
    assert wanted_type("blk.0.attn_q.weight", matrix, "Q4_K", None) == "Q4_K"
    assert wanted_type("blk.0.attn_q.weight", matrix, "Q4_K", "Q4_0") == "Q4_0"
    assert wanted_type("output.weight", matrix, "Q6_K", "Q4_0") == "Q6_K"
    assert wanted_type("token_embd.weight", matrix, "F16", "Q4_1") == "Q8_0"
    assert wanted_type("token_embd.weight", matrix, "Q6_K", "Q8_0") == "Q8_0"
    assert wanted_type("blk.0.ffn_down.weight", (64, 72), "F32", "Q8_0") == "F16"
    assert wanted_type("blk.0.attn_norm.weight", (64,), "F32", "F16") == "F32"


def test_late_adapters(tiny_base: Path, tmp_path: Path) -> None:
    """They cannot be merged; as one adapter they stay late."""
    pack = pack_of(tmp_path, tiny_base, alora_invocation_tokens=[3, 5])
    result = CliRunner().invoke(
        main, ["export", "gguf", "-m", "mood", "-p", str(pack), "-o", str(tmp_path / "x.gguf")]
    )
    assert result.exit_code == 1
    assert "mood is active on answers only" in result.stderr
    assert not (tmp_path / "x.gguf").exists()
    export_adapter(choose(str(pack), "mood=0.5"), tmp_path / "late.gguf")
    field = gguf.GGUFReader(tmp_path / "late.gguf").fields["adapter.alora.invocation_tokens"]
    assert field.contents() == [3, 5]
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]
    convert_adapter(write_peft(tmp_path / "always"), tiny_base, tmp_path / "always.gguf")
    add_skill(pack, "always", tmp_path / "always.gguf", description="x", max_tokens=9)
    export_adapter(choose(str(pack), "mood,always"), tmp_path / "both.gguf")
    assert "adapter.alora.invocation_tokens" not in gguf.GGUFReader(tmp_path / "both.gguf").fields


def test_rounding_that_undoes_the_mix(tiny_pack: Path, tmp_path: Path) -> None:
    with pytest.raises(SelfCheckFailed, match="rounding cancels the mix"):
        export_gguf(choose(str(tiny_pack), "sentiment=0.015625"), tmp_path / "out.gguf", "Q4_0")
    assert list(tmp_path.iterdir()) == []


def test_mixes_that_are_refused(tiny_pack: Path, tiny_base: Path, pack: Path, tmp_path: Path) -> None:
    for mix, says in (("base", "names no skill"), ("haiku", "'haiku'"), ("sentiment=x", "not a number")):
        words = ["export", "gguf", "-m", mix, "-p", str(tiny_pack), "-o", str(tmp_path / "x.gguf")]
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 2
        assert says in result.stderr
    before = tiny_base.read_bytes()
    with pytest.raises(UsageError, match="the base itself"):
        export_gguf(choose(str(tiny_pack), "sentiment"), tiny_base)
    assert tiny_base.read_bytes() == before
    other = write_base(tmp_path / "other.gguf", seed=9)
    manifest = (pack / "pack.toml").read_text().replace(str(tiny_base), str(other))
    (pack / "pack.toml").write_text(manifest)
    with pytest.raises(WrongBase, match=r"other\.gguf is"):
        choose(str(pack), "sentiment")


def test_a_disk_that_is_too_small(tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = choose(str(tiny_pack), "sentiment")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=16 * 2**20 + 1000))
    for work in (export_gguf, export_adapter):
        with pytest.raises(NoSpace, match="needs"):
            work(chosen, tmp_path / "deep" / "out.gguf")  # type: ignore[operator]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_disk_that_fills_up(tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.gguf").write_bytes(b"what was there")

    def full(self: Any, tensor: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    words = ["export", "gguf", "-m", "sentiment", "-p", str(tiny_pack), "-o", str(tmp_path / "out.gguf")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert "No space left" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert (tmp_path / "out.gguf").read_bytes() == b"what was there"


def test_a_merged_base_can_be_a_base(tiny_pack: Path, tmp_path: Path) -> None:
    export_gguf(choose(str(tiny_pack), "sentiment"), tmp_path / "first.gguf")
    pack = pack_of(tmp_path, tmp_path / "first.gguf")
    export_gguf(choose(str(pack), "mood=0.5"), tmp_path / "second.gguf")
    fields = gguf.GGUFReader(tmp_path / "second.gguf").fields
    assert fields["loramix.mix"].contents() == "mood=0.5"
    assert fields["loramix.base.sha256"].contents() == bases.digest(tmp_path / "first.gguf")


def test_a_base_without_a_chat_template(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf", template="")
    with pytest.raises(InvalidArtifact, match=r"no chat template.*--chat-template FILE"):
        choose(str(pack_of(tmp_path, base)), "mood")


@pytest.mark.base
def test_the_default_pack_merged(default_base: Path, tmp_path: Path) -> None:
    chosen: Chosen = choose("smollm2-135m", "emotion")
    found = export_gguf(chosen, tmp_path / "out.gguf")
    assert found.mean_kl < 0.02 < 1 < found.bare_kl
    assert read_base(tmp_path / "out.gguf")[1].tensor_types == {"Q8_0", "F32"}
