"""A tiny random Llama base, PEFT adapters for it, and a pack of both: no download, a second to make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from loramix.architectures import ARCHITECTURES

N_LAYER, N_EMBD, N_HEAD, N_HEAD_KV, N_FF, N_CTX = 3, 64, 4, 2, 96, 512
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPES = {
    "q_proj": (N_EMBD, N_EMBD),
    "k_proj": (N_EMBD * N_HEAD_KV // N_HEAD, N_EMBD),
    "v_proj": (N_EMBD * N_HEAD_KV // N_HEAD, N_EMBD),
    "o_proj": (N_EMBD, N_EMBD),
    "gate_proj": (N_FF, N_EMBD),
    "up_proj": (N_FF, N_EMBD),
    "down_proj": (N_EMBD, N_FF),
}
_GGUF = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}


def byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def shapes(n_head_kv: int = N_HEAD_KV, head: int = N_EMBD // N_HEAD) -> dict[str, tuple[int, int]]:
    """`SHAPES` with another number of key-value heads, or heads of another width."""
    wide, narrow = head * N_HEAD, head * n_head_kv
    return {
        **SHAPES,
        "q_proj": (wide, N_EMBD),
        "k_proj": (narrow, N_EMBD),
        "v_proj": (narrow, N_EMBD),
        "o_proj": (N_EMBD, wide),
    }


def write_base(
    path: Path,
    *,
    seed: int = 0,
    template: str = TEMPLATE,
    kind: str = "F32",
    n_head_kv: int = N_HEAD_KV,
    tied: bool = True,
    architecture: str = "llama",
    head: int = N_EMBD // N_HEAD,
    biases: bool = False,
    spread: float | None = None,
    pre: str = "smollm",
    controls: list[str] = CONTROLS,
    extra: dict[str, str] | None = None,
) -> Path:
    """Write a random base of `shapes` with a byte-level vocabulary; ``biases`` are those of Q, K and V."""
    description = ARCHITECTURES[architecture]
    rng = np.random.default_rng(seed)
    tokens = [*controls, *byte_tokens()]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("model")
    writer.add_name("tiny")
    writer.add_block_count(N_LAYER)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(n_head_kv)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(head)
    if head != N_EMBD // N_HEAD:
        writer.add_key_length(head)
        writer.add_value_length(head)
    if architecture == "gemma3":
        writer.add_sliding_window(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROLS) + [1] * 256)
    writer.add_token_merges([f"{tokens[3 + ord('t')]} {tokens[3 + ord('h')]}"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(template)
    for key, value in (extra or {}).items():
        writer.add_string(key, value)

    def add(name: str, values: np.ndarray) -> None:
        wanted = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        packed = gguf.quants.quantize(values, wanted)
        writer.add_tensor(name, packed, raw_dtype=wanted)

    # llama.cpp looks Gemma's GELU up in float16: small logits keep its rounding below 1e-3
    spread = spread or (0.03 if architecture == "gemma3" else 0.5)
    add("token_embd.weight", rng.normal(0, spread, (len(tokens), N_EMBD)).astype(np.float32))
    add("output_norm.weight", np.ones(N_EMBD, np.float32))
    for layer in range(N_LAYER):
        for module, norm in description.norms.items():
            width = head if module.endswith(("q_norm", "k_norm")) else N_EMBD
            noise = rng.normal(0, 0.1, width) if architecture != "llama" else 0
            add(f"blk.{layer}.{norm}.weight", np.ones(width, np.float32) + np.float32(noise))
        for module, shape in shapes(n_head_kv, head).items():
            add(f"blk.{layer}.{_GGUF[module]}.weight", rng.normal(0, 0.12, shape).astype(np.float32))
            if (biases or architecture == "qwen2") and module in ("q_proj", "k_proj", "v_proj"):
                add(f"blk.{layer}.{_GGUF[module]}.bias", rng.normal(0, 0.3, shape[0]).astype(np.float32))
    if not tied:
        add("output.weight", rng.normal(0, 0.5, (len(tokens), N_EMBD)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_peft(
    directory: Path,
    *,
    seed: int = 1,
    r: int = 4,
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    ranks: dict[str, int] | None = None,
    size: float = 0.3,
    n_head_kv: int = N_HEAD_KV,
    head: int = N_EMBD // N_HEAD,
    **config: object,
) -> Path:
    """Write a random PEFT LoRA for the tiny base; ``config`` overrides keys of adapter_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(N_LAYER):
        for module in modules:
            rank = (ranks or {}).get(module, r)
            out, width = shapes(n_head_kv, head)[module]
            block = "self_attn" if module in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            stem = f"base_model.model.model.layers.{layer}.{block}.{module}"
            tensors[f"{stem}.lora_A.weight"] = rng.normal(0, size, (rank, width)).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = rng.normal(0, size, (out, rank)).astype(np.float32)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": r,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(modules),
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "fan_in_fan_out": False,
        "inference_mode": True,
        **config,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def write_mlx(
    directory: Path,
    *,
    seed: int = 1,
    r: int = 4,
    modules: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"),
    layers: tuple[int, ...] = (1, 2),
    scale: float = 20.0,
    kind: type = np.float32,
    n_head_kv: int = N_HEAD_KV,
    head: int = N_EMBD // N_HEAD,
    **config: object,
) -> Path:
    """Write a random LoRA as mlx-lm does, on the last layers; ``config`` overrides keys of adapter_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}
    for layer in layers:
        for module in modules:
            out, width = shapes(n_head_kv, head)[module.partition(".")[2]]
            stem = f"model.layers.{layer}.{module}"
            tensors[f"{stem}.lora_a"] = rng.normal(0, 0.1, (width, r)).astype(kind)
            tensors[f"{stem}.lora_b"] = rng.normal(0, 0.1, (r, out)).astype(kind)
    settings = {
        "model": "someone/tiny-mlx",
        "fine_tune_type": "lora",
        "num_layers": len(layers),
        "lora_parameters": {"rank": r, "dropout": 0.0, "scale": scale, "keys": list(modules)},
        **config,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, directory / "adapters.safetensors")
    return directory


def write_moods(path: Path) -> Path:
    """Rows of a task that a tiny base can learn: the weather tells the mood."""
    rows = [
        {"split": "dev" if i % 5 == 0 else "train", "input": f"{word} day {i}", "target": mood}
        for i in range(30)
        for word, mood in (("sunny", "good"), ("rainy", "bad"))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def random_gate(
    skills: list[str], base_sha256: str, *, layers: tuple[int, ...] = (1, 2), seed: int = 3
) -> bytes:
    """Content of a gate.npz of the old format that decides between skills by random weights."""
    from loramix.models.old_gate import GateInfo, NumpyGate

    rng = np.random.default_rng(seed)
    width = len(layers) * N_EMBD
    info = GateInfo(
        skills=skills,
        threshold=0.35,
        layers=list(layers),
        pooling="last",
        base_sha256=base_sha256,
        hidden=[8],
    )
    arrays = {
        "mean": np.zeros(width, np.float32),
        "std": np.ones(width, np.float32),
        "w0": rng.normal(0, 0.5, (1, width, 8)).astype(np.float32),
        "b0": np.zeros((1, 8), np.float32),
        "w1": rng.normal(0, 2, (1, 8, len(skills) + 1)).astype(np.float32),
        "b1": np.zeros((1, len(skills) + 1), np.float32),
    }
    return NumpyGate(info, arrays).to_bytes()


SPREADS = {"query.weight": 1.5, "out.weight": 0.5}
"""Of a random head: short prompts are decided differently."""


def random_head(
    skills: list[str], base_sha256: str, *, layers: tuple[int, ...] = (1,), seed: int = 2, **info: Any
) -> bytes:
    """Content of a gate.npz of the current format that decides between skills by random weights."""
    from loramix.models.early_head import EarlyHead
    from loramix.models.head_info import HeadInfo, expected

    fields = {"width": N_EMBD, "d": 16, "depth": 1, "tags": ["other", "text"], "threshold": 0.35, **info}
    described = HeadInfo(skills=skills, layers=list(layers), base_sha256=base_sha256, **fields)
    rng = np.random.default_rng(seed)
    arrays = {
        name: rng.normal(0, SPREADS.get(name, 0.3), shape).astype(np.float32)
        for name, shape in expected(described).items()
    }
    for name in arrays:
        if name in ("mean", "std") or "norm" in name:
            arrays[name] = np.full_like(arrays[name], name == "std" or name.endswith("weight"))
    return EarlyHead(described, arrays).to_bytes()


def write_pack(directory: Path, base: Path, **peft: Any) -> Path:
    """Write a pack of two random skills and a random gate; ``peft`` are options of `write_peft`."""
    from loramix.convert.adapter import convert_adapter
    from loramix.models import bases
    from loramix.pack.edit import add_skill, set_gate
    from loramix.pack.manifest import BaseReference, Manifest, write_manifest

    digest = bases.digest(base)
    reference = BaseReference(name=str(base), sha256=digest)
    write_manifest(
        directory, Manifest(format=1, name="tiny", description="random", license="Apache-2.0", base=reference)
    )
    for seed, name in enumerate(("sentiment", "summarize"), 1):
        source = write_peft(directory.parent / "peft" / name, seed=seed, **peft)
        out = directory.parent / f"{name}.gguf"
        convert_adapter(source, base, out, name=name, base_name="tiny", base_sha256=digest)
        add_skill(directory, name, out, description=name, max_tokens=12)
    set_gate(directory, random_head(["sentiment", "summarize"], digest))
    return directory
