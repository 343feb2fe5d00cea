"""TinyLlama 1.1B's exact shape with random weights: create, convert, quantize; time and memory of each step.

    python benchmarks/tinyllama_shape.py --out DIR --vocab ggml-vocab-llama-spm.gguf --quant Q4_K_M --quant Q4_0

The weights are meaningless; sizes, speed, memory and tokens are those of TinyLlama-1.1B-Chat. Its vocabulary is
Llama 2's, models/ggml-vocab-llama-spm.gguf in llama.cpp's source tree; without that file a synthetic one of 32,000
tokens is used.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import string
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from loramix.convert.hf.config import Config, expected
from loramix.paths import write_text

SHARD_VALUES = 250 * 10**6  # bfloat16: 500 MB
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "vocab_size": 32_000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
TEMPLATE = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
SPECIAL = ["<unk>", "<s>", "</s>"]


def write_weights(directory: Path) -> None:
    """Write random bfloat16 weights, shard by shard, with their index."""
    import safetensors

    shapes = expected(msgspec.convert(CONFIG, Config))
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        if held and held + size > SHARD_VALUES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    rng = np.random.default_rng(0)
    index = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors, held_data = {}, []
        for name in names:
            shape = shapes[name]
            values = np.ones(shape, np.float32)
            if len(shape) > 1:
                rng.standard_normal(out=values, dtype=np.float32)
                values *= np.float32(0.02)
            data = (values.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16 is the upper half
            held_data.append(data)  # a TensorSpec has only the address, so keep a reference
            tensors[name] = safetensors.TensorSpec(
                dtype="bfloat16", shape=shape, data_ptr=data.ctypes.data, data_len=data.nbytes
            )
            index[name] = file
        safetensors.serialize_file(tensors, str(directory / file), {"format": "pt"})
    total = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    write_text(directory / "model.safetensors.index.json", json.dumps(content))


def llama_2_tokens(vocabulary: Path) -> tuple[list[str], list[float]]:
    """Read tokens and scores of a SentencePiece vocabulary in GGUF."""
    import gguf

    reader = gguf.GGUFReader(vocabulary)
    fields = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores"))
    tokens, scores = fields
    return list(tokens), [float(score) for score in scores]


def made_up_tokens() -> tuple[list[str], list[float]]:
    """Create a vocabulary of the same size: bytes, then all words of one letter, of two, of three."""
    tokens = [
        *SPECIAL,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *string.printable[:95].replace(" ", ""),
    ]
    longer = (
        start + "".join(word)
        for length in itertools.count(1)
        for start in ("▁", "")
        for word in itertools.product(string.ascii_lowercase, repeat=length if start else length + 1)
    )
    tokens += itertools.islice(longer, CONFIG["vocab_size"] - len(tokens))
    return tokens, [-float(i) for i in range(len(tokens))]


def write_tokenizer(directory: Path, tokens: list[str], scores: list[float]) -> None:
    """Write the vocabulary like TinyLlama-Chat's ``tokenizer.json``, with merges in the order of the scores."""
    score = dict(zip(tokens, scores, strict=True))
    merges = sorted(
        (
            (text[:cut], text[cut:])
            for text in tokens[len(SPECIAL) + 256 :]
            for cut in range(1, len(text))
            if text[:cut] in score and text[cut:] in score
        ),
        key=lambda pair: -score[pair[0] + pair[1]],
    )
    added = [
        {"id": i, "content": text, "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for i, text in enumerate(SPECIAL)
    ]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, bos, second],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {text: i for i, text in enumerate(tokens)},
            "merges": [" ".join(pair) for pair in merges],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "add_bos_token": True,
        "add_eos_token": False,
        "model_max_length": 2048,
        "chat_template": TEMPLATE,
    }
    write_text(directory / "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False))
    write_text(directory / "tokenizer_config.json", json.dumps(settings, ensure_ascii=False))


def measured(arguments: list[str]) -> str:
    """Run a command; describe its time, CPU time and peak resident memory, including its children."""
    started = time.monotonic()
    child = subprocess.Popen(arguments)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(arguments)}")
    seconds, busy = time.monotonic() - started, usage.ru_utime + usage.ru_stime
    return f"{seconds:.0f} s ({busy:.0f} s of CPU time), at most {usage.ru_maxrss / 1024:.0f} MB of memory"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for hf/ and the GGUF files")
    parser.add_argument("--vocab", type=Path, help="ggml-vocab-llama-spm.gguf")
    parser.add_argument("--quant", action="append", help="Q4_K_M, Q4_0, ...; can be repeated")
    parser.add_argument("--make-only", action="store_true", help="write only the checkpoint")
    options = parser.parse_args()
    directory = options.out / "hf"
    if options.make_only:
        directory.mkdir(parents=True, exist_ok=True)
        write_weights(directory)
        write_tokenizer(directory, *(llama_2_tokens(options.vocab) if options.vocab else made_up_tokens()))
        write_text(directory / "config.json", json.dumps(CONFIG, indent=1))
        return
    # a child's peak memory starts at its parent's size, so this process stays small
    if not (directory / "config.json").is_file():  # written last, so the directory is complete
        print("checkpoint:", measured([sys.executable, *sys.argv, "--make-only"]), flush=True)
    for quant in options.quant or ["Q4_K_M"]:
        out = options.out / f"tinyllama-shape-{quant}.gguf"
        command = [sys.executable, "-m", "loramix", "convert", "base", str(directory)]
        cost = measured([*command, "--out", str(out), "--quant", quant, "--no-check"])
        print(f"{quant}: {cost}, file of {out.stat().st_size / 1e6:.0f} MB", flush=True)


if __name__ == "__main__":
    main()
