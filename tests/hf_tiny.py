"""Tiny random Hugging Face checkpoints, with tokenizers trained in a moment."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import TensorSpec, serialize_file

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "vocab_size": 400,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "max_window_layers": 1,
}
QWEN3: dict[str, Any] = {
    **QWEN2,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 24,
}
MISTRAL: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": None,
    "rope_theta": 1000000.0,
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + message['content'] }}{% endfor %}"
)
_NUMPY = {"float32": np.float32, "float16": np.float16}


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as a checkpoint of that dtype keeps them; bfloat16 as uint16."""
    if dtype == "bfloat16":
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(_NUMPY[dtype])


def write_shard(path: Path, tensors: dict[str, np.ndarray], dtype: str = "float32") -> None:
    """Write a safetensors file with the library, bfloat16 too."""
    kept = {name: np.ascontiguousarray(stored(values, dtype)) for name, values in tensors.items()}
    specs = {
        name: TensorSpec(dtype=dtype, shape=values.shape, data_ptr=values.ctypes.data, data_len=values.nbytes)
        for name, values in kept.items()
    }
    serialize_file(specs, str(path), {"format": "pt"})


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """float32 weights by transformers' names; norms near one."""
    rng = np.random.default_rng(seed)
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    size = config.get("head_dim") or (128 if config.get("model_type") == "qwen3" else width // heads)
    q, kv = heads * size, config.get("num_key_value_heads", heads) * size
    linear = {
        "self_attn.q_proj": (q, width),
        "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, q),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    always = list(linear)[:3] if config.get("model_type") == "qwen2" else []
    weights = {"model.embed_tokens.weight": rng.normal(0, 0.5, (config["vocab_size"], width))}
    for layer in range(config["num_hidden_layers"]):
        for module, shape in linear.items():
            key = f"model.layers.{layer}.{module}"
            weights[f"{key}.weight"] = rng.normal(0, 0.12, shape)
            if module in always or config.get("attention_bias" if "attn" in module else "mlp_bias"):
                weights[f"{key}.bias"] = rng.normal(0, 0.3, shape[0])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"] = rng.normal(1, 0.1, width)
        if config.get("model_type") == "qwen3":
            for norm in ("q_norm", "k_norm"):
                weights[f"model.layers.{layer}.self_attn.{norm}.weight"] = rng.normal(1, 0.3, size)
    weights["model.norm.weight"] = rng.normal(1, 0.1, width)
    if not config.get("tie_word_embeddings"):
        weights["lm_head.weight"] = rng.normal(0, 0.2, (config["vocab_size"], width))
    return {name: values.astype(np.float32) for name, values in weights.items()}


def write_checkpoint(
    directory: Path, *, shards: int = 1, dtype: str = "float32", seed: int = 0, **changes: Any
) -> Path:
    """Write config.json and weights; ``changes`` override `CONFIG`, None takes a key away."""
    directory.mkdir(parents=True, exist_ok=True)
    silent = ("sliding_window",)  # whose null says something else than their absence
    config = {k: value for k, value in {**CONFIG, **changes}.items() if value is not None or k in silent}
    (directory / "config.json").write_text(json.dumps(config))
    weights = random_weights(config, seed)
    if shards == 1:
        write_shard(directory / "model.safetensors", weights, dtype)
        return directory
    index = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(weights.items())[number::shards])
        write_shard(directory / name, part, dtype)
        index.update(dict.fromkeys(part, name))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory


def write_settings(directory: Path, **settings: Any) -> None:
    """Write tokenizer_config.json."""
    default = {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps({**default, **settings}))


CORPUS = [
    "The weather was fine, and the whole village had come to the market to look at the new clock.",
    "don't we'll they've I'm you're it's he'd; 1 22 333 4444 tickets at 3.50 each (2024-05-06)",
    "def area(width, height):\n    return width * height  # plain\n\n\tx = [i for i in range(10)]",
    "Übergrößenträger, déjà vu, naïve façade; Привет, мир; 你好世界; こんにちは; مرحبا; नमस्ते 🙂👍🏽",
] * 4


def write_bpe(
    directory: Path,
    parts: list[dict[str, Any]],
    *,
    ignore_merges: bool = False,
    size: int = 400,
    normalizer: dict[str, Any] | None = None,
) -> Path:
    """Train a byte-level BPE on `CORPUS` with a pre-tokenizer of these parts, and write it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("[KEEP]", normalized=False)])
    content = json.loads(tokenizer.to_str())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    content["normalizer"] = normalizer
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(content, ensure_ascii=False))
    write_settings(directory)
    return path


def write_sentencepiece(directory: Path, size: int = 500) -> Path:
    """Train a SentencePiece model with Llama's options on `CORPUS`, and write ``tokenizer.model``."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()
    write_settings(directory, bos_token="<s>", eos_token="</s>")
    return directory / "tokenizer.model"


PIECES = [
    "the",
    "weather,",
    "1",
    "22",
    "333",
    "1234567",
    "don't",
    "I'LL",
    "we've",
    "x=y+z;",
    "(a)",
    "[b]",
    "{c}",
    "foo_bar",
    "Über",
    "naïve",
    "Привет",
    "мир",
    "你好世界",
    "こんにちは",
    "مرحبا",
    "नमस्ते",
    "한국어",
    "🙂",
    "👩\u200d🚀",
    "👍🏽",
    "e\u0301",
    "ﬁ",
    "ⅻ",
    "½",
    "٣",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "  ",
    "    ",
    "\xa0",
    "\u3000",
    "\u200b",
    "…",
    "—",
    "''",
    "````",
    "!!!",
    "\x7f",
]


# what NFC changes, and what else Qwen's tokenizer could cut otherwise than llama.cpp
COMPOSED = (
    "e\u0301te\u0301",
    "A\u030a\u212b",
    "\u1112\u1161\u11ab",
    "\u037e\u1fef\u212a",
    "\u0928\u093c",
    "q\u0323\u0307\u0323",
    "\u0338",
    "\u0301\u0301",
    "\ufb2a\ufa10",
    "\U0001d15e",
    "\u2126m",
    "\u0627\u0653",
    "\u304b\u3099",
    "it'\u017f",
    "THEY'RE",
    "\u0130\u0131",
    "\x00\x01\x1b[0m",
    "\x85",
    "\u2028\u2029",
    "\u202e",
    "\ufeff",
    "\U0001f1eb\U0001f1f7\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0002070e\u9fff",
    "1,234.5e-6\u0661\u0662\u0663\u2083\u00b2",
    "if (x != y) {\n\t\treturn `${a}`;\r\n}",
    " \n \n\n  \t x",
    "<|im_end",
    "|>",
)


def strings(count: int = 1000, extra: tuple[str, ...] = ()) -> list[str]:
    """Random texts of words, scripts, emoji, white space and whatever ``extra`` adds."""
    chance = random.Random(7)
    pool = [*PIECES, *extra]
    return [
        "".join(
            chance.choice(pool) + chance.choice(["", " ", " ", "  "]) for _ in range(chance.randint(1, 12))
        )
        for _ in range(count)
    ]
