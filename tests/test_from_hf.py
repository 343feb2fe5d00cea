"""Hugging Face → GGUF: the same values, the same logits as transformers, and refusals that say why."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import forked
import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from hf_tiny import (
    CONFIG,
    LLAMA3_ROPE,
    MISTRAL,
    QWEN2,
    QWEN3,
    TEMPLATE,
    random_weights,
    stored,
    write_bpe,
    write_checkpoint,
    write_settings,
    write_shard,
)

from loramix.cli import main
from loramix.convert import selfcheck
from loramix.convert.hf import config
from loramix.convert.hf.to_gguf import convert_base
from loramix.convert.imatrix import CHUNK, importance
from loramix.convert.peft import unpermute
from loramix.convert.reference import torch_logits
from loramix.convert.selfcheck import check_base
from loramix.errors import InvalidArtifact, LoramixError, NoSpace, NotFound, SelfCheckFailed, Unsupported
from loramix.formats.validate import read_base

SMOLLM = [
    {"type": "Digits", "individual_digits": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
]
SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries, own head": {},
    "as many key-value heads, tied": {"num_key_value_heads": None, "tie_word_embeddings": True},
    "one key-value head, llama3 RoPE": {
        "num_key_value_heads": 1,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3_ROPE,
    },
    "llama3 RoPE as transformers 5 writes it, tied": {
        "rope_theta": None,
        "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 10000.0, "factor": 8.0},
        "tie_word_embeddings": True,
    },
    "linear RoPE": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "wide heads": {"head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {**MISTRAL, "head_dim": 32},
    "Mistral, a window as wide as the context": {**MISTRAL, "sliding_window": 256, "dtype": "bfloat16"},
    "Qwen2": QWEN2,
    "Qwen2, tied, one key-value head, bfloat16 in shards": {
        **QWEN2,
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
        "dtype": "bfloat16",
        "shards": 3,
    },
    "Qwen2, windows of no layer, as transformers 5 writes it": {
        **QWEN2,
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 2,
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "layer_types": ["full_attention"] * 2,
    },
    "Qwen2, linear RoPE, float16": {
        **QWEN2,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "dtype": "float16",
    },
    "Qwen3": QWEN3,
    "Qwen3, tied, wide heads, float16 in shards": {
        **QWEN3,
        "tie_word_embeddings": True,
        "head_dim": 48,
        "num_key_value_heads": 1,
        "dtype": "float16",
        "shards": 2,
    },
    "Qwen3, head of the default width, bfloat16": {**QWEN3, "head_dim": None, "dtype": "bfloat16"},
}
LOGITS = """
import sys, numpy, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from loramix.convert.base_model import load_base
ids = torch.tensor([[int(i) for i in sys.argv[1].split(",")]])
for directory in map(Path, sys.argv[2:]):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    numpy.save(directory / "source.npy", model(ids).logits[0].detach().numpy())
    model = load_base(directory / "out.gguf")
    numpy.save(directory / "trained on.npy", model(ids).logits[0].numpy())
"""
IDS = [1, *np.random.default_rng(5).integers(3, 400, 99).tolist()]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tokenizer's files."""
    pytest.importorskip("tokenizers")
    directory = tmp_path_factory.mktemp("tokenizer")
    write_bpe(directory, SMOLLM, size=399)
    return directory


@pytest.fixture
def make(tokenizer: Path, tmp_path: Path) -> Any:
    """Makes a checkpoint with a tokenizer."""

    def checkpoint(name: str = "hf", **options: Any) -> Path:
        directory = write_checkpoint(tmp_path / name, **options)
        shutil.copytree(tokenizer, directory, dirs_exist_ok=True)
        return directory

    return checkpoint


def our_logits(base: Path) -> np.ndarray:
    from loramix.runtime.llama.context import Context
    from loramix.runtime.llama.model import Model

    with Model(base, use_extra_bufts=False) as model:
        context = Context(model, n_ctx=256, n_threads=1, exact=True)
        return np.stack([context.decode([token]) for token in IDS])


@pytest.mark.train
def test_logits_are_those_of_transformers_and_of_what_is_trained_on(make: Any) -> None:
    """The checkpoint in transformers, the GGUF in llama.cpp, and the GGUF as training loads it."""
    directories = {name: make(f"m{i}", seed=i, **shape) for i, (name, shape) in enumerate(SHAPES.items())}
    for directory in directories.values():
        convert_base(directory, directory / "out.gguf", "F32")
    command = [sys.executable, "-c", LOGITS, ",".join(map(str, IDS)), *map(str, directories.values())]
    child = forked.run(command)
    assert child.returncode == 0, child.stderr
    for name, directory in directories.items():
        theirs, ours = np.load(directory / "source.npy"), our_logits(directory / "out.gguf")
        assert np.abs(theirs).max() > 1, name
        assert np.abs(ours - theirs).max() <= 1e-3, name
        assert np.abs(np.load(directory / "trained on.npy") - theirs).max() <= 1e-3, name


def dequantized(path: Path) -> dict[str, np.ndarray]:
    """Values by transformers' names, Q's and K's rows in transformers' order."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG["num_hidden_layers"])
    back = {names.get_name(key, (".weight", ".bias")): key for key in random_weights(CONFIG)}
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        key = back[tensor.name]
        values = np.array(tensor.data)
        if "q_proj" in key or "k_proj" in key:
            values = unpermute(values, 4 if "q_proj" in key else 2)
        found[key] = values
    return found


@pytest.mark.parametrize(
    ("dtype", "quant", "shards"),
    [("float32", "F32", 1), ("float16", "F16", 3), ("bfloat16", "F32", 2), ("float16", "F32", 1)],
)
def test_the_way_back_gives_the_same_bits(
    dtype: str, quant: str, shards: int, make: Any, tmp_path: Path
) -> None:
    convert_base(make(dtype=dtype, shards=shards), tmp_path / "out.gguf", quant)
    found = dequantized(tmp_path / "out.gguf")
    wanted = random_weights(CONFIG)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        kept = stored(values, dtype)
        if dtype == "bfloat16":
            kept = (kept.astype(np.uint32) << 16).view(np.float32)
        assert found[name].dtype == (np.float32 if values.ndim == 1 else {"F32": "f4", "F16": "f2"}[quant])
        assert np.array_equal(found[name].astype(np.float32), kept.astype(np.float32)), name


def test_names_and_shapes_are_those_that_llama_cpp_loads(make: Any, tmp_path: Path) -> None:
    convert_base(
        make(attention_bias=True, mlp_bias=True, rope_scaling=LLAMA3_ROPE), tmp_path / "out.gguf", "F32"
    )
    layer = {
        "attn_q": (64, 64),
        "attn_k": (32, 64),
        "attn_v": (32, 64),
        "attn_output": (64, 64),
        "ffn_gate": (96, 64),
        "ffn_up": (96, 64),
        "ffn_down": (64, 96),
        "attn_norm": (64,),
        "ffn_norm": (64,),
    }
    wanted: dict[str, tuple[int, ...]] = {
        "rope_freqs.weight": (8,),
        "token_embd.weight": (400, 64),
        "output.weight": (400, 64),
        "output_norm.weight": (64,),
    }
    for i in range(2):
        for name, shape in layer.items():
            wanted[f"blk.{i}.{name}.weight"] = shape
            if "norm" not in name:
                wanted[f"blk.{i}.{name}.bias"] = shape[:1]
    assert {
        name: tensor.shape for name, tensor in read_base(tmp_path / "out.gguf")[0].tensors.items()
    } == wanted


def test_the_metadata_says_what_config_json_says(make: Any, tmp_path: Path) -> None:
    source = make("named", rope_scaling={"rope_type": "linear", "factor": 4.0}, tie_word_embeddings=True)
    convert_base(source, tmp_path / "out.gguf", "F16")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    values = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    tokens = values.pop("tokenizer.ggml.tokens")
    types = values.pop("tokenizer.ggml.token_type")
    assert len(values.pop("tokenizer.ggml.merges")) > 50
    assert tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] and types[:4] == [3, 3, 3, 1]
    assert (tokens[-1], types[-1]) == ("[KEEP]", 4)
    assert {key: value for key, value in values.items() if isinstance(value, float)} == pytest.approx(
        {
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.freq_base": 10000.0,
            "llama.rope.scaling.factor": 4.0,
        }
    )
    assert {key: value for key, value in values.items() if not isinstance(value, float)} == {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "named",
        "general.file_type": 1,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.vocab_size": 400,
        "llama.rope.dimension_count": 16,
        "llama.rope.scaling.type": "linear",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    assert read_base(tmp_path / "out.gguf")[1].tied


@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_the_metadata_of_qwen_is_that_of_llama_cpp(config: dict[str, Any], make: Any, tmp_path: Path) -> None:
    """The keys that llama.cpp's own converter writes for these architectures, and the tensors that it loads."""
    name = config["model_type"]
    convert_base(make(**config, tie_word_embeddings=True), tmp_path / "out.gguf", "F32")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    values = {key: field.contents() for key, field in reader.fields.items()}
    size = config.get("head_dim", 16)
    wanted = {
        "general.architecture": name,
        f"{name}.block_count": 2,
        f"{name}.context_length": 256,
        f"{name}.embedding_length": 64,
        f"{name}.feed_forward_length": 96,
        f"{name}.attention.head_count": 4,
        f"{name}.attention.head_count_kv": 2,
        f"{name}.attention.key_length": size,
        f"{name}.attention.value_length": size,
        f"{name}.rope.freq_base": 1000000.0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert {key: values.get(key) for key in wanted} == wanted
    assert not any("scaling" in key or key.startswith("llama.") for key in values)
    tensors = {tensor.name: tuple(tensor.shape) for tensor in reader.tensors if ".1." in tensor.name}
    for part, width in (("q", 4 * size), ("k", 2 * size), ("v", 2 * size)):
        assert tensors.get(f"blk.1.attn_{part}.bias") == ((width,) if name == "qwen2" else None)
        if part != "v":
            assert tensors.get(f"blk.1.attn_{part}_norm.weight") == ((size,) if name == "qwen3" else None)


def test_rows_of_qwen_keep_their_order(make: Any, tmp_path: Path) -> None:
    """Unlike Llama's, whose Q and K are interleaved."""
    convert_base(make(**QWEN2), tmp_path / "out.gguf", "F32")
    values = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    weights = random_weights({**CONFIG, **QWEN2})
    for ours, theirs in (("attn_q.weight", "q_proj.weight"), ("attn_k.bias", "k_proj.bias")):
        assert np.array_equal(values[f"blk.1.{ours}"], weights[f"model.layers.1.self_attn.{theirs}"])


def test_rope_factors_are_those_of_the_paper_in_float64() -> None:
    """Long waves are slowed by the factor, short ones not, those between in proportion."""
    settings = config.Config(
        ["LlamaForCausalLM"], 2048, 8192, 16, 32, 128256, head_dim=64, rope_theta=500000.0
    )
    settings.rope_scaling = config.Rope("llama3", "", None, 32.0, 1.0, 4.0, 8192)
    found = config.rope_factors(settings)
    assert found is not None and found.shape == (32,)
    for i, factor in enumerate(found):
        wave = 2 * math.pi * 500000.0 ** (2 * i / 64)
        share = (8192 / wave - 1) / 3
        wanted = 1 if wave < 2048 else 32 if wave > 8192 else 1 / ((1 - share) / 32 + share)
        assert factor == pytest.approx(wanted, rel=1e-4)
    assert found[0] == 1 and found[-1] == 32 and len(set(found)) > 2


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "Q4_K_M"])
def test_a_quantized_base_is_near_its_source(quant: str, make: Any, tmp_path: Path) -> None:
    source = make(hidden_size=256, intermediate_size=256, dtype="bfloat16")
    convert_base(source, tmp_path / "out.gguf", quant)
    types = read_base(tmp_path / "out.gguf")[1].tensor_types
    assert {"Q8_0": "Q8_0", "Q4_0": "Q4_0", "Q4_K_M": "Q4_K"}[quant] in types and "BF16" not in types
    convert_base(source, tmp_path / "full.gguf", "F32")
    full = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "full.gguf").tensors}
    for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
        values, wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type), full[tensor.name].data
        error = np.sqrt(((values - wanted) ** 2).mean() / (wanted**2).mean())
        assert error < (0.01 if quant == "Q8_0" else 0.12), tensor.name
    assert [
        path.name for path in tmp_path.iterdir() if path.suffix not in ("", ".gguf") or path.name[0] == "."
    ] == []


@pytest.mark.train
@pytest.mark.own_process
def test_the_command_checks_what_it_made(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[Any] = []

    def once(*arguments: Any) -> Any:
        computed.append(torch_logits(*arguments))
        return computed[-1]

    monkeypatch.setattr(selfcheck, "torch_logits", once)
    source, out = make(), tmp_path / "a.gguf"
    done = CliRunner().invoke(main, ["convert", "base", str(source), "-o", str(out), "--quant", "F32"])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(out)
    assert "cuts 7 texts as its tokenizer.json does" in done.stderr and "KL 0.00000" in done.stderr
    convert_base(make("other", seed=9), out, "F32")
    monkeypatch.setattr(selfcheck, "torch_logits", lambda *_: computed[0])
    with pytest.raises(SelfCheckFailed, match="differs"):
        check_base(source, out, "F32")


def change_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def lose_config(directory: Path, key: str) -> None:
    config = json.loads((directory / "config.json").read_text())
    del config[key]
    (directory / "config.json").write_text(json.dumps(config))


def change_index(directory: Path, name: str, shard: str) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = shard
    path.write_text(json.dumps(index))


def reshard(directory: Path, number: int, **options: Any) -> None:
    """Put a shard of another checkpoint in the place of one."""
    other = write_checkpoint(directory.parent / "others", shards=3, **options)
    name = f"model-{number:05d}-of-00003.safetensors"
    shutil.copy(other / name, directory / name)


def with_values(directory: Path, name: str, value: float) -> None:
    weights = random_weights(CONFIG)
    weights[name].flat[7] = value
    for path in directory.glob("model*"):
        path.unlink()
    write_shard(directory / "model.safetensors", weights)


def without(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).unlink()


def write_again(directory: Path, **options: Any) -> None:
    """Write other weights and settings in the place of all."""
    shutil.rmtree(directory)
    write_checkpoint(directory, **options)


SHARD = "model-00002-of-00003.safetensors"
REFUSED: dict[str, tuple[Any, type[LoramixError], str]] = {
    "no config": (lambda d: without(d, "config.json"), NotFound, "no config.json"),
    "config no JSON": (
        lambda d: (d / "config.json").write_text("{"),
        InvalidArtifact,
        "config.json cannot be used",
    ),
    "other architecture": (
        lambda d: change_config(d, architectures=["GemmaForCausalLM"]),
        Unsupported,
        "GemmaForCausalLM; supported: LlamaForCausalLM, LLaMAForCausalLM, MistralForCausalLM, "
        "Qwen2ForCausalLM, Qwen3ForCausalLM.",
    ),
    **{
        name: (lambda d, name=name: change_config(d, architectures=[name]), Unsupported, f"{name}, {what}")
        for name, what in {
            "Qwen2VLForConditionalGeneration": "which is not a text-only model",
            "Qwen2_5_VLForConditionalGeneration": "which is not a text-only model",
            "Qwen3VLMoeForConditionalGeneration": "a mixture of experts",
            "Qwen2MoeForCausalLM": "a mixture of experts",
            "Qwen3MoeForCausalLM": "a mixture of experts",
            "Qwen2ForSequenceClassification": "which does not generate text",
            "Gemma3ForCausalLM": "which cannot be converted: pull a GGUF of it with 'loramix pull",
            "Gemma3ForConditionalGeneration": "which cannot be converted: pull a GGUF",
        }.items()
    },
    "windows of Mistral": (
        lambda d: write_again(d, **{**MISTRAL, "sliding_window": 32}),
        Unsupported,
        "attend to 32 of 256 tokens (sliding_window)",
    ),
    "windows of Mistral where nothing is said": (
        lambda d: (write_again(d, **MISTRAL, max_position_embeddings=8192), lose_config(d, "sliding_window")),
        Unsupported,
        "attend to 4096 of 8192 tokens",
    ),
    "windows of Qwen2": (
        lambda d: write_again(d, **{**QWEN2, "use_sliding_window": True, "sliding_window": 64}),
        Unsupported,
        "attend to 64 of 256 tokens (use_sliding_window)",
    ),
    "windows of Qwen3 by layer": (
        lambda d: write_again(
            d,
            **{**QWEN3, "use_sliding_window": True, "sliding_window": 64},
            layer_types=["full_attention", "sliding_attention"],
        ),
        Unsupported,
        "attend to 64 of 256 tokens (use_sliding_window)",
    ),
    "heads of Qwen2 of their own width": (
        lambda d: write_again(d, **QWEN2, head_dim=24),
        Unsupported,
        "24 wide (head_dim), llama.cpp needs 16 for Qwen2",
    ),
    "a bias of Qwen3 that llama.cpp does not load": (
        lambda d: write_again(d, **{**QWEN3, "attention_bias": True}),
        Unsupported,
        "a bias on self_attn.o_proj, which llama.cpp does not load for Qwen3",
    ),
    "biases of Qwen2 that are missing": (
        lambda d: (write_again(d), change_config(d, **QWEN2)),
        InvalidArtifact,
        "lacks model.layers.0.self_attn.q_proj.bias",
    ),
    "norms of Qwen3 that are missing": (
        lambda d: (write_again(d, head_dim=24), change_config(d, **QWEN3)),
        InvalidArtifact,
        "lacks model.layers.0.self_attn.q_norm.weight",
    ),
    "yarn of Qwen2": (
        lambda d: write_again(
            d,
            **QWEN2,
            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        ),
        Unsupported,
        "'yarn'; supported: default, linear, llama3",
    ),
    "no architecture": (
        lambda d: change_config(d, architectures=None),
        Unsupported,
        "no architecture; supported",
    ),
    "text for a number": (lambda d: change_config(d, hidden_size="64"), InvalidArtifact, "hidden_size"),
    "no layers": (lambda d: change_config(d, num_hidden_layers=0), InvalidArtifact, "num_hidden_layers"),
    "heads that do not divide": (
        lambda d: change_config(d, num_key_value_heads=3),
        InvalidArtifact,
        "do not match",
    ),
    "quantized already": (
        lambda d: change_config(d, quantization_config={"quant_method": "gptq"}),
        Unsupported,
        "quantized already",
    ),
    "another activation": (lambda d: change_config(d, hidden_act="gelu"), Unsupported, "'gelu'"),
    "unknown RoPE": (
        lambda d: change_config(d, rope_scaling={"type": "yarn", "factor": 2.0}),
        Unsupported,
        "'yarn'; supported: default, linear, llama3",
    ),
    "llama3 RoPE without length": (
        lambda d: change_config(d, rope_scaling={"rope_type": "llama3", "factor": 2.0}),
        InvalidArtifact,
        "original_max_position",
    ),
    "shard missing": (lambda d: without(d, SHARD), NotFound, f"shard {SHARD} is missing"),
    "index missing": (
        lambda d: without(d, "model.safetensors.index.json"),
        NotFound,
        "no model.safetensors.index",
    ),
    "pickles": (
        lambda d: (write_again(d), (d / "model.safetensors").rename(d / "a.bin")),
        Unsupported,
        "pickles",
    ),
    "pickle as a shard": (
        lambda d: (d / SHARD).write_bytes(b"PK\x03\x04" + bytes(99)),
        InvalidArtifact,
        "pickle",
    ),
    "shard cut": (lambda d: os.truncate(d / SHARD, 9000), InvalidArtifact, SHARD),
    "shard of another shape": (
        lambda d: reshard(d, 2, intermediate_size=128),
        InvalidArtifact,
        "several checkpoints",
    ),
    "shard of another depth": (lambda d: reshard(d, 2, num_hidden_layers=3), InvalidArtifact, "are mixed"),
    "index leads elsewhere": (
        lambda d: change_index(d, "model.norm.weight", "../evil.safetensors"),
        InvalidArtifact,
        "not a file in the same directory",
    ),
    "index names the wrong shard": (
        lambda d: change_index(d, "model.embed_tokens.weight", SHARD),
        InvalidArtifact,
        "are mixed",
    ),
    "deeper settings": (
        lambda d: change_config(d, num_hidden_layers=3),
        InvalidArtifact,
        "lacks model.layers.2",
    ),
    "no head though untied": (
        lambda d: (write_again(d, tie_word_embeddings=True), change_config(d, tie_word_embeddings=False)),
        InvalidArtifact,
        "lacks lm_head.weight",
    ),
    "experts": (
        lambda d: (
            without(d, "model.safetensors.index.json"),
            write_shard(
                d / "model.safetensors",
                random_weights(CONFIG)
                | {"model.layers.0.mlp.experts.0.w1.weight": np.ones((2, 2), np.float32)},
            ),
        ),
        Unsupported,
        "experts.0.w1",
    ),
    "smaller vocabulary": (
        lambda d: write_again(d, vocab_size=300),
        InvalidArtifact,
        "the embedding has 300 rows",
    ),
    "NaN": (
        lambda d: with_values(d, "model.layers.1.mlp.up_proj.weight", math.nan),
        InvalidArtifact,
        "not finite",
    ),
    "beyond float16": (lambda d: with_values(d, "lm_head.weight", 1e6), Unsupported, "--quant F32"),
    "no tokenizer": (
        lambda d: (d / "tokenizer.json").unlink(),
        NotFound,
        "no tokenizer.json or tokenizer.model",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_and_nothing_is_left(
    name: str, make: Any, tokenizer: Path, tmp_path: Path
) -> None:
    spoil, error, sentence = REFUSED[name]
    source = make(shards=3)
    spoil(source)
    if not list(source.glob("tokenizer*")):
        shutil.copytree(tokenizer, source, dirs_exist_ok=True)
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.gguf").write_bytes(b"before")
    done = CliRunner().invoke(
        main, ["convert", "base", str(source), "-o", str(out / "a.gguf"), "--quant", "F16"]
    )
    assert done.exit_code == error.exit_code and "Traceback" not in done.output
    assert sentence in done.stderr, done.stderr
    with pytest.raises(error):
        convert_base(source, out / "a.gguf", "F16")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {"a.gguf": b"before"}


def test_lm_head_of_a_tied_checkpoint_is_left_out(make: Any, tmp_path: Path) -> None:
    source = make(tie_word_embeddings=True)
    weights = random_weights({**CONFIG, "tie_word_embeddings": False})
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    write_shard(source / "model.safetensors", weights)
    convert_base(source, tmp_path / "out.gguf", "F32")
    assert read_base(tmp_path / "out.gguf")[1].tied


def test_no_room_is_told_before_anything_is_written(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, 1_000_000))
    (tmp_path / "out").mkdir()
    source = make(hidden_size=256, intermediate_size=512, dtype="float16")
    for quant, needed in {"F32": 6, "F16": 3, "Q8_0": 4, "Q4_0": 4, "Q4_K_M": 4}.items():
        with pytest.raises(NoSpace, match=f"needs {needed} MB and .* has 1 MB free"):
            convert_base(source, tmp_path / "out" / "a.gguf", quant)
    assert not list((tmp_path / "out").iterdir())


def in_a_child_with_small_files(limit: int, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process whose files may not grow beyond the limit, as on a disk that is full."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )


COMMAND = "from loramix.cli import main; main()"
QUANTIZE = """
import sys
from pathlib import Path
from loramix.convert.quantize import quantize
from loramix.errors import NoSpace
try:
    quantize(Path(sys.argv[1]), Path(sys.argv[2]), "Q8_0")
except NoSpace as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("quant", ["F16", "Q8_0"])
def test_a_disk_that_fills_up_leaves_nothing(quant: str, make: Any, tmp_path: Path) -> None:
    source = make(dtype="bfloat16")
    (tmp_path / "out").mkdir()
    arguments = ["convert", "base", str(source), "--no-check", "-o", str(tmp_path / "out" / "a.gguf")]
    done = in_a_child_with_small_files(100_000, COMMAND, *arguments, "--quant", quant)
    assert done.returncode == 1 and "could not be written to the end" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_a_disk_that_fills_up_under_the_quantizer_leaves_nothing(make: Any, tmp_path: Path) -> None:
    convert_base(make(), tmp_path / "full.gguf", "F16")
    (tmp_path / "out").mkdir()
    arguments = [str(tmp_path / "full.gguf"), str(tmp_path / "out" / "a.gguf")]
    done = in_a_child_with_small_files(60_000, QUANTIZE, *arguments)
    assert done.returncode == 1 and "could not be written to the end" in done.stderr, done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_a_directory_as_the_file_is_refused(make: Any, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["convert", "base", str(make()), "-o", str(tmp_path)])
    assert done.exit_code == 2 and "is a directory" in done.stderr


def test_a_name_without_settings_still_ends_its_answers(make: Any, tmp_path: Path) -> None:
    """Special tokens by id in config.json alone; with none at all there is nothing to stop at."""
    source = make()
    write_settings(source, bos_token=None, eos_token=None)
    convert_base(source, tmp_path / "out.gguf", "F16")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    change_config(source, eos_token_id=None)
    with pytest.raises(InvalidArtifact, match="eos_token"):
        convert_base(source, tmp_path / "out.gguf", "F16")


TEXT = "The old mill by the river had not turned for years; 12 men could not move its wheel.\n" * 60


def test_an_importance_matrix_rounds_what_matters_more_finely(make: Any, tmp_path: Path) -> None:
    """Against NumPy where the input is known: the first layer's is the normalized embedding."""
    from loramix.runtime.llama.model import Model

    source = make(hidden_size=256, intermediate_size=256)
    convert_base(source, tmp_path / "full.gguf", "F32")
    (tmp_path / "text").write_text(TEXT)
    importance(tmp_path / "full.gguf", tmp_path / "text", tmp_path / "columns.npz")
    with np.load(tmp_path / "columns.npz") as archive:
        columns = dict(archive)
    assert {name: len(values) for name, values in columns.items()} == {
        name: width
        for name, (_, width) in read_base(tmp_path / "full.gguf")[1].tensors.items()
        if "blk" in name
    }
    with Model(tmp_path / "full.gguf", vocab_only=True) as model:
        ids = model.tokenize(TEXT)
    ids = ids[: len(ids) // (CHUNK - 1) * (CHUNK - 1)]
    weights = random_weights({**CONFIG, "hidden_size": 256, "intermediate_size": 256})
    rows = weights["model.embed_tokens.weight"][ids]
    rows = rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-5)
    wanted = ((rows * weights["model.layers.0.input_layernorm.weight"]) ** 2).mean(axis=0)
    assert columns["blk.0.attn_q.weight"] == pytest.approx(wanted, rel=1e-3)

    convert_base(source, tmp_path / "plain.gguf", "Q4_0")
    convert_base(source, tmp_path / "weighed.gguf", "Q4_0", tmp_path / "text")

    def loss(path: Path) -> float:
        return sum(
            float((columns[name] * (values - full[name]) ** 2).sum())
            for name, values in blocks(path).items()
            if name in columns and "ffn_down" not in name  # the first of these get a larger type then
        )

    full = blocks(tmp_path / "full.gguf")
    assert loss(tmp_path / "weighed.gguf") < 0.97 * loss(tmp_path / "plain.gguf")


def blocks(path: Path) -> dict[str, np.ndarray]:
    """All tensors, as float32."""
    tensors = gguf.GGUFReader(path).tensors
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}


@pytest.mark.parametrize(
    ("content", "quant", "sentence"),
    [
        (None, "Q4_0", "no text at"),
        (b"short", "Q4_0", "has 4 tokens; at least 256"),
        (b"\xff" * 999, "Q4_K_M", "not UTF-8 text (byte 0)"),
        (TEXT.encode(), "Q8_0", "Q8_0 does not use an importance matrix"),
    ],
)
def test_texts_that_tell_nothing_are_refused(
    content: bytes | None, quant: str, sentence: str, make: Any, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    (tmp_path / "out").mkdir()
    arguments = ["convert", "base", str(make()), "-o", str(tmp_path / "out" / "a.gguf"), "--quant", quant]
    done = CliRunner().invoke(main, [*arguments, "--imatrix-text", str(tmp_path / "text")])
    assert done.exit_code in (1, 2) and sentence in done.stderr, done.output
    assert not list((tmp_path / "out").iterdir())
