"""Every architecture: a tiny random base of it, adapters on it, and the same logits as PyTorch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import SHAPES, write_base, write_mlx, write_peft

from loramix.architectures import ARCHITECTURES
from loramix.convert.adapter import convert_adapter, read_adapter, read_peft
from loramix.convert.peft import as_peft, export_peft
from loramix.convert.selfcheck import check, llama_logits, parity
from loramix.errors import Unsupported, WrongBase
from loramix.formats.validate import read_base
from loramix.models.fuse import read_pairs

pytestmark = pytest.mark.usefixtures("light_native_code")
MLP = ("gate_proj", "up_proj", "down_proj")
BASES: dict[str, dict[str, Any]] = {
    "llama": {"tied": False},
    "llama with biases": {"biases": True},
    "qwen2": {"tied": False},
    "qwen3": {"head": 24, "tied": False},
    "gemma3": {"head": 32},
}


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"architecture": request.param.split()[0], **BASES[request.param]}
    return write_base(tmp_path_factory.mktemp("bases") / f"{request.param}.gguf", **options)


def adapter(directory: Path, base: Path, **options: Any) -> tuple[Path, Path]:
    """(GGUF LoRA, PEFT directory) for a base of `BASES`."""
    peft = write_peft(directory / "peft", head=BASES[base.stem].get("head", 16), **options)
    convert_adapter(peft, base, directory / "a.gguf", outtype="f32")
    return directory / "a.gguf", peft


def same(base: Path) -> float:
    """Share of positions with the same choice; Gemma's GELU in float16 can tip a tie in a hundred."""
    return 0.99 if base.stem == "gemma3" else 1.0


def test_every_architecture_is_tried() -> None:
    assert {name.split()[0] for name in BASES} == set(ARCHITECTURES)


@pytest.mark.train
def test_the_bare_base_is_the_same_in_pytorch(base: Path) -> None:
    found = parity(base, [])
    assert found.max_difference <= 1e-3 and found.same_argmax >= same(base)


@pytest.mark.train
@pytest.mark.parametrize(
    "options",
    [
        {"modules": tuple(SHAPES), "size": 0.15},
        {"modules": tuple(SHAPES), "ranks": {"k_proj": 2, "down_proj": 9}, "size": 0.15}
        | {"rank_pattern": {"k_proj": 2, "down_proj": 9}, "alpha_pattern": {"q_proj": 3, "up_proj": 20}},
    ],
    ids=["all matrices", "patterns"],
)
def test_an_adapter_does_what_it_does_in_peft(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    found = check(base, *adapter(tmp_path, base, **options), exact=True)
    assert found.max_difference <= 1e-3
    assert found.same_argmax >= same(base)
    assert found.effect > 0.1


def test_an_export_is_what_was_converted(base: Path, tmp_path: Path) -> None:
    file, peft = adapter(tmp_path, base, modules=tuple(SHAPES))
    export_peft(file.read_bytes(), read_base(base)[1], tmp_path / "back", "a")
    before, after = read_peft(peft), read_peft(tmp_path / "back")
    assert before.pairs.keys() == after.pairs.keys()
    for module, (a, b) in before.pairs.items():
        assert (a == after.pairs[module][0]).all() and (b == after.pairs[module][1]).all()


@pytest.mark.train
def test_an_adapter_of_mlx_does_what_it_does_in_pytorch(base: Path, tmp_path: Path) -> None:
    modules = tuple(f"{'mlp' if name in MLP else 'self_attn'}.{name}" for name in SHAPES)
    source = write_mlx(tmp_path / "mlx", modules=modules, head=BASES[base.stem].get("head", 16), scale=8.0)
    convert_adapter(source, base, tmp_path / "a.gguf", outtype="f32")
    with as_peft(source) as peft:
        found = check(base, tmp_path / "a.gguf", peft, exact=True)
    assert found.same_argmax >= same(base) and found.effect > 0.1


def test_a_gguf_adapter_of_llama_cpp_does_the_same(base: Path, tmp_path: Path) -> None:
    """With the keys of llama.cpp's converter of adapters alone, in another order and without ours."""
    ours, _ = adapter(tmp_path, base, modules=tuple(SHAPES), size=0.15)
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", read_base(base)[1].architecture.name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_string("general.base_model.0.name", "Tiny")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for weight, (a, b, _) in reversed(read_pairs(ours.read_bytes()).items()):
        writer.add_tensor(f"{weight}.lora_b", np.ascontiguousarray(b, np.float32))
        writer.add_tensor(f"{weight}.lora_a", np.ascontiguousarray(a, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    a, b = (llama_logits(base, [(tmp_path / name, 1.0)])[0] for name in ("a.gguf", "theirs.gguf"))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.train
def test_the_check_knows_how_finely_llama_cpp_computes(tmp_path: Path) -> None:
    """Large logits of Gemma differ by more than those of others, since its GELU is looked up in float16."""
    base = write_base(tmp_path / "gemma3.gguf", architecture="gemma3", spread=0.5, **BASES["gemma3"])
    found = check(base, *adapter(tmp_path, base, modules=tuple(SHAPES), size=0.15), exact=True)
    assert found.effect > 1 and found.max_difference < 0.02 and found.mean_kl < 1e-4
    tolerances = {name: kind.logit_tolerance for name, kind in ARCHITECTURES.items()}
    assert tolerances == {"llama": 1e-3, "qwen2": 1e-3, "qwen3": 1e-3, "gemma3": 0.05}


INNER = r"\bmodel\.(?=layers)"


@pytest.mark.train
@pytest.mark.parametrize("form", ["model.language_model.", "language_model.model."])
def test_an_adapter_of_a_gemma_that_reads_images_too(form: str, tmp_path: Path) -> None:
    """Its language model is a part there, in tensor names and in patterns."""
    base = write_base(tmp_path / "gemma3.gguf", architecture="gemma3", **BASES["gemma3"])
    patterns = {f"{form}layers.1.self_attn.q_proj": 40, "v_proj": 2}
    plain = {
        re.sub("language_model.model.|model.language_model.", "model.", key): n for key, n in patterns.items()
    }
    options: dict[str, Any] = {"modules": tuple(SHAPES), "size": 0.15, "head": 32}
    reference = write_peft(tmp_path / "reference", alpha_pattern=plain, **options)
    source = write_peft(tmp_path / "source", alpha_pattern=patterns, **options)
    rename_tensors(source / "adapter_model.safetensors", form)
    convert_adapter(source, base, tmp_path / "a.gguf", outtype="f32")
    assert read_peft(source).scaling == read_peft(reference).scaling
    assert set(read_peft(source).scaling.values()) == {0.5, 2.0, 10.0}
    found = check(base, tmp_path / "a.gguf", reference, exact=True)
    assert found.same_argmax >= 0.99 and found.effect > 0.1
    mlx = write_mlx(tmp_path / "mlx", head=32)
    wanted = read_adapter(mlx).pairs
    rename_tensors(mlx / "adapters.safetensors", form)
    assert read_adapter(mlx).pairs.keys() == wanted.keys()


def rename_tensors(path: Path, form: str) -> None:
    tensors = {re.sub(INNER, form, name): values for name, values in load_file(path).items()}
    save_file(tensors, path)


def test_an_adapter_of_an_image_encoder_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "gemma3.gguf", architecture="gemma3")
    source = write_peft(tmp_path / "peft")
    rename_tensors(source / "adapter_model.safetensors", "model.vision_tower.vision_model.encoder.")
    with pytest.raises(Unsupported, match="image encoder"):
        convert_adapter(source, base, tmp_path / "a.gguf")


OTHERS = {
    "PEFT says its model's class": (
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}},
        r"'llama'.*'qwen2'",
    ),
    "PEFT, Mistral's class": (
        {"auto_mapping": {"base_model_class": "MistralForCausalLM"}},
        r"'llama'.*'qwen2'",
    ),
    "PEFT, Gemma's class": (
        {"auto_mapping": {"base_model_class": "Gemma3ForConditionalGeneration"}},
        r"'gemma3'.*'qwen2'",
    ),
    "PEFT names its base": (
        {"head": 24, "base_model_name_or_path": "Qwen/Qwen3-0.6B"},
        r"'Qwen/Qwen3-0.6B'.*'qwen2'",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_directory_of_another_architecture_names_both(name: str, tmp_path: Path) -> None:
    options, sentence = OTHERS[name]
    base = write_base(tmp_path / "q.gguf", architecture="qwen2")
    with pytest.raises(WrongBase, match=sentence):
        convert_adapter(write_peft(tmp_path / "peft", **options), base, tmp_path / "a.gguf")
    own = {"auto_mapping": {"base_model_class": "Qwen2ForCausalLM"}}
    convert_adapter(write_peft(tmp_path / "own", **own), base, tmp_path / "a.gguf")


def test_an_mlx_adapter_of_another_architecture_names_both(tmp_path: Path) -> None:
    base = write_base(tmp_path / "q.gguf", architecture="qwen2")
    source = write_mlx(tmp_path / "mlx", head=24, model="mlx-community/Qwen3-0.6B-4bit")
    with pytest.raises(WrongBase, match=r"'mlx-community/Qwen3-0.6B-4bit'.*'qwen2'"):
        convert_adapter(source, base, tmp_path / "a.gguf")


def test_an_adapter_of_another_architecture_names_both(tmp_path: Path) -> None:
    llama, qwen = write_base(tmp_path / "l.gguf"), write_base(tmp_path / "q.gguf", architecture="qwen2")
    convert_adapter(write_peft(tmp_path / "peft"), llama, tmp_path / "a.gguf")
    with pytest.raises(WrongBase, match=r"'llama'.*'qwen2'"):
        llama_logits(qwen, [(tmp_path / "a.gguf", 1.0)])


def test_an_unknown_architecture_says_which_are_known(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(Unsupported, match=r"'mamba'.*llama.*qwen2.*qwen3.*gemma3"):
        read_base(path)
