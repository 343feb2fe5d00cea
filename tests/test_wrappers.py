"""Tensor names as training frameworks save them, and what is found beside an adapter's matrices."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hf_tiny import CONFIG, random_weights, write_bpe, write_checkpoint, write_shard
from safetensors.numpy import load_file, save_file
from tiny import write_base, write_mlx, write_peft

from loramix.convert.adapter import convert_adapter
from loramix.convert.hf.to_gguf import convert_base
from loramix.convert.hf.view import key_mapping, plain_directory
from loramix.convert.peft import as_peft
from loramix.convert.peft_reader import read_peft
from loramix.convert.selfcheck import check, check_base
from loramix.convert.wrappers import unwrapped
from loramix.errors import InvalidArtifact, LoramixError, Unsupported, WrongBase
from loramix.formats.gguf_reader import read_gguf, tensor_values
from loramix.formats.requantize import requantize

Rename = Callable[[str], str]
INNER = r"\bmodel\.(?=layers|embed_tokens|norm)"
# how frameworks name the tensors of a checkpoint
WRAPPED: dict[str, Rename] = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "compiled layers": lambda name: re.sub(r"(layers\.\d+)", r"\1._orig_mod", name),
    "DDP": lambda name: f"module.{name}",
    "DeepSpeed, compiled": lambda name: f"module._orig_mod.{name}",
    "FSDP": lambda name: "_fsdp_wrapped_module." + re.sub(r"(layers\.\d+)", r"\1._fsdp_wrapped_module", name),
    "activation checkpoints": lambda name: name.replace(".mlp.", ".mlp._checkpoint_wrapped_module."),
    "Lightning": lambda name: f"model.{name}",
    "Lightning, DeepSpeed": lambda name: f"_forward_module.model.{name}",
    "TRL": lambda name: f"pretrained_model.{name}",
    "merged PEFT": lambda name: f"base_model.model.{name}",
    "Gemma 3 with images": lambda name: re.sub(INNER, "model.language_model.", name),
    "Gemma 3 with images, older": lambda name: (
        "language_model.lm_head.weight"
        if name == "lm_head.weight"
        else re.sub(INNER, "language_model.model.", name)
    ),
    "Gemma 3 with images, Lightning": lambda name: "model." + re.sub(INNER, "model.language_model.", name),
}
PLAIN = ["model.layers.0.self_attn.q_proj.weight", "model.layers.11.mlp.up_proj.weight", "lm_head.weight",
         "model.embed_tokens.weight", "model.norm.weight"]  # fmt: skip


def renamed(directory: Path, rename: Rename) -> Path:
    """Tensors of a directory under other names."""
    file = next(directory.glob("*.safetensors"))
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return directory


@pytest.mark.parametrize("framework", WRAPPED)
def test_names_come_back(framework: str) -> None:
    for name in PLAIN:
        wrapped = WRAPPED[framework](name)
        assert unwrapped(wrapped) == unwrapped(name) == name


@pytest.mark.parametrize("framework", WRAPPED)
def test_wrapped_adapters_convert_to_the_same_bytes(framework: str, tiny_base: Path, tmp_path: Path) -> None:
    source = write_peft(tmp_path / "a")
    convert_adapter(source, tiny_base, tmp_path / "plain.gguf")
    outside = renamed(source, WRAPPED[framework])
    convert_adapter(outside, tiny_base, tmp_path / "wrapped.gguf")
    assert (tmp_path / "wrapped.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_adapters_with_other_names_inside(tiny_base: Path, tmp_path: Path) -> None:
    source = write_peft(tmp_path / "a")
    convert_adapter(source, tiny_base, tmp_path / "plain.gguf")
    for rename in (
        lambda name: name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        lambda name: name.replace("lora_A.", "lora_A.haiku.").replace("lora_B.", "lora_B.haiku."),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: f"base_model.model.{name}",
    ):
        copy = renamed(write_peft(tmp_path / "b"), rename)
        assert not read_peft(copy).as_saved
        convert_adapter(copy, tiny_base, tmp_path / "other.gguf", name="a")
        assert (tmp_path / "other.gguf").read_bytes()[-4096:] == (tmp_path / "plain.gguf").read_bytes()[
            -4096:
        ]
    two = write_peft(tmp_path / "two")
    file = two / "adapter_model.safetensors"
    tensors = {name.replace(".weight", ".x.weight"): value for name, value in load_file(file).items()}
    save_file({**load_file(file), **tensors}, file)
    with pytest.raises(Unsupported, match="several adapters"):
        read_peft(two)
    mlx = write_mlx(tmp_path / "mlx")
    convert_adapter(mlx, tiny_base, tmp_path / "mlx.gguf")
    convert_adapter(renamed(mlx, lambda name: f"module.{name}"), tiny_base, tmp_path / "wrapped.gguf")
    assert (tmp_path / "mlx.gguf").read_bytes() == (tmp_path / "wrapped.gguf").read_bytes()


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    source = write_peft(tmp_path / "a")
    file = source / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, **{f"module.{name}": tensor for name, tensor in tensors.items()}}, file)
    with pytest.raises(InvalidArtifact, match="the same tensor without wrappers"):
        read_peft(source)


def checkpoint(directory: Path, **changes: object) -> Path:
    write_checkpoint(directory, **{"vocab_size": 420, **changes})
    parts = [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]
    write_bpe(directory, parts)
    return directory


def test_wrapped_checkpoints_convert_to_the_same_bytes(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "hf")
    convert_base(source, tmp_path / "plain.gguf", "F32")
    for framework, rename in WRAPPED.items():
        copy = renamed(checkpoint(tmp_path / framework / "hf"), rename)
        convert_base(copy, tmp_path / "wrapped.gguf", "F32")
        assert (tmp_path / "wrapped.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes(), framework
    shards = checkpoint(tmp_path / "shards" / "hf", shards=3)
    for file in shards.glob("*.safetensors"):
        save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(file).items()}, file)
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    index["weight_map"] = {f"_orig_mod.{name}": shard for name, shard in index["weight_map"].items()}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8-sig")
    convert_base(shards, tmp_path / "wrapped.gguf", "F32")
    assert (tmp_path / "wrapped.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_an_unmerged_checkpoint_is_named(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "hf")
    weights = random_weights({**CONFIG, "vocab_size": 420})
    weights = {
        f"base_model.model.{name}".replace("q_proj.", "q_proj.base_layer."): w for name, w in weights.items()
    }
    write_shard(source / "model.safetensors", weights)
    with pytest.raises(Unsupported, match="merge_and_unload"):
        convert_base(source, tmp_path / "out.gguf", "F32")


def marked(directory: Path) -> Path:
    for path in directory.glob("*.json"):
        path.write_bytes(path.read_bytes().decode().encode("utf-8-sig"))
    return directory


def test_marks_in_a_checkpoint_change_nothing(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "hf")
    convert_base(source, tmp_path / "plain.gguf", "F32")
    convert_base(marked(source), tmp_path / "marked.gguf", "F32")
    assert (tmp_path / "marked.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    with plain_directory(source) as plain:
        assert plain != source and json.loads((plain / "config.json").read_text())["vocab_size"] == 420
        assert (plain / "model.safetensors").is_symlink() and key_mapping(plain) == {}


@pytest.mark.train
def test_pytorch_reads_wrapped_names_and_marks_too(tmp_path: Path, tiny_base: Path) -> None:
    source = marked(renamed(checkpoint(tmp_path / "hf"), WRAPPED["FSDP"]))
    convert_base(source, tmp_path / "base.gguf", "F32")
    assert check_base(source, tmp_path / "base.gguf", "F32").max_difference < 1e-3
    adapter = renamed(write_peft(tmp_path / "a"), WRAPPED["torch.compile"])
    convert_adapter(adapter, tiny_base, tmp_path / "a.gguf", outtype="f32")
    with as_peft(adapter) as peft:
        assert check(tiny_base, tmp_path / "a.gguf", peft, exact=True).effect > 0


@pytest.mark.train
def test_a_base_that_transformers_would_fill_with_random_numbers_is_refused(tmp_path: Path) -> None:
    from loramix.convert.base_model import load_base

    source = renamed(checkpoint(tmp_path / "hf"), lambda name: f"somewhere.else.{name}")
    with pytest.raises(Unsupported, match=r"lacks .* other weights"):
        load_base(source)


def with_tensor(directory: Path, name: str, values: np.ndarray) -> Path:
    file = directory / "adapter_model.safetensors"
    save_file({**load_file(file), name: np.ascontiguousarray(values, np.float32)}, file)
    return directory


def embedding_of(base: Path) -> np.ndarray:
    data = base.read_bytes()
    return np.asarray(tensor_values(data, read_gguf(data, "base").tensors["token_embd.weight"]), np.float32)


def test_the_bases_own_embedding_beside_an_adapter_changes_nothing(tiny_base: Path, tmp_path: Path) -> None:
    own = embedding_of(tiny_base)
    convert_adapter(write_peft(tmp_path / "a"), tiny_base, tmp_path / "plain.gguf")
    for name in ("model.embed_tokens", "lm_head", "model.embed_tokens.base_layer"):
        source = with_tensor(write_peft(tmp_path / "a"), f"base_model.model.{name}.weight", own)
        convert_adapter(source, tiny_base, tmp_path / "with.gguf")
        assert (tmp_path / "with.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
        with as_peft(source) as peft:
            assert not any(
                "embed" in key or "lm_head" in key for key in load_file(peft / "adapter_model.safetensors")
            )
    requantize(tiny_base, tmp_path / "q4.gguf", {"token_embd": "Q4_0"})
    convert_adapter(source, tmp_path / "q4.gguf", tmp_path / "with.gguf")


def test_other_embeddings_are_named_for_what_they_are(tiny_base: Path, tmp_path: Path) -> None:
    own, key = embedding_of(tiny_base), "base_model.model.model.embed_tokens.weight"
    rng = np.random.default_rng(0)
    cases: dict[str, tuple[np.ndarray, type[LoramixError]]] = {
        r"262 tokens, the base has 259: tokens were added": (np.vstack([own, own[:3]]), Unsupported),
        r"differs from the base's by \d+%: it was trained": (
            own + rng.normal(0, 0.5, own.shape),
            Unsupported,
        ),
        r"32 wide; the base's is 64": (own[:, :32], WrongBase),
    }
    for says, (values, error) in cases.items():
        source = with_tensor(write_peft(tmp_path / "a"), key, values)
        with pytest.raises(error, match=says):
            convert_adapter(source, tiny_base, tmp_path / "out.gguf")


def test_lora_on_the_embedding_or_the_head_is_named(tiny_base: Path, tmp_path: Path) -> None:
    untied = write_base(tmp_path / "untied.gguf", tied=False)
    for base, also in ((tiny_base, "this base's token embedding"), (untied, ": llama.cpp")):
        source = write_peft(tmp_path / "head")
        for half, shape in (("A", (4, 64)), ("B", (259, 4))):
            with_tensor(source, f"base_model.model.lm_head.lora_{half}.weight", np.ones(shape))
        with pytest.raises(
            Unsupported, match=rf"lm_head, the output head.*{also}.*without lm_head"
        ) as caught:
            convert_adapter(source, base, tmp_path / "out.gguf")
        assert "loramix convert" not in str(caught.value) and "another base" not in str(caught.value)
    source = with_tensor(
        write_peft(tmp_path / "e"), "base_model.model.model.embed_tokens.lora_embedding_A", np.ones((4, 259))
    )
    with pytest.raises(Unsupported, match=r"token embeddings.*without embed_tokens"):
        convert_adapter(source, tiny_base, tmp_path / "out.gguf")


BESIDE = {
    "model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight": "DoRA",
    "model.layers.0.mlp.up_proj.modules_to_save.weight": "modules_to_save",
    "v_head.summary.weight": "value head",
    "score.weight": "classifier",
    "model.layers.0.input_layernorm.weight": "full norm",
    "model.layers.0.self_attn.q_proj.base_layer.weight": "full model",
    "model.layers.0.self_attn.q_proj.hada_w1_a": "LoHa",
    "model.layers.0.self_attn.q_proj.lora_down.weight": "image models",
    "model.vision_tower.x.weight": "image encoder",
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_else_is_in_an_adapter_is_named(name: str, tmp_path: Path) -> None:
    source = with_tensor(write_peft(tmp_path / "a"), f"base_model.model.{name}", np.ones(4))
    with pytest.raises(Unsupported, match=BESIDE[name]):
        read_peft(source)


def test_a_rank_beyond_the_limit_is_not_answered_with_the_same_command(
    tiny_base: Path, tmp_path: Path
) -> None:
    source = write_peft(tmp_path / "wide", r=300)
    with pytest.raises(LoramixError, match=r"rank 300, the limit is 256.*lower r") as caught:
        convert_adapter(source, tiny_base, tmp_path / "out.gguf")
    assert "loramix convert adapter" not in str(caught.value)


def test_a_wrapper_that_nobody_knows_is_named(tiny_base: Path, tmp_path: Path) -> None:
    peft = write_peft(tmp_path / "peft")
    tensors = load_file(peft / "adapter_model.safetensors")
    odd = {name.replace(".model.layers", ".engine.model.layers"): value for name, value in tensors.items()}
    save_file(odd, peft / "adapter_model.safetensors")
    with pytest.raises(InvalidArtifact, match=r"engine.*no known wrapper adds"):
        convert_adapter(peft, tiny_base, tmp_path / "a.gguf")
