"""A tiny SentencePiece base that says what it is told to: each token leads to the next one, whatever came before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from hf_tiny import CONFIG, random_weights, write_checkpoint, write_sentencepiece, write_settings, write_shard

from loramix.convert.hf.to_gguf import convert_base
from loramix.models import bases
from loramix.pack.edit import new_pack
from loramix.pack.pack import Pack

ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
N_VOCAB = 500


def pieces(directory: Path, text: str) -> list[int]:
    """SentencePiece's own ids of a text."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    return list(processor.encode(text))


def write_speaking(
    directory: Path, says: str, then: int, *, ends: int | list[int], template: str = ZEPHYR, **settings: Any
) -> Path:
    """Write a checkpoint that answers with a text and a token behind it, and convert it.

    Args:
        directory: made.
        says: text whose tokens all differ.
        then: token behind it.
        ends: ``eos_token_id`` of generation_config.json.
        template: chat template whose header ends with a line's end.
        **settings: of tokenizer_config.json.

    Returns:
        The GGUF.
    """
    directory.mkdir(parents=True)
    write_sentencepiece(directory, N_VOCAB)
    named = {"bos_token": "<s>", "eos_token": "</s>", **settings}
    write_settings(directory, chat_template=template, **named)
    write_checkpoint(directory, vocab_size=N_VOCAB)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    chain = [pieces(directory, "\n")[-1], *pieces(directory, says), then, *pieces(directory, " clock")[:1]]
    assert len(set(chain)) == len(chain), "each token can lead to one other only"
    write_shard(directory / "model.safetensors", _weights(chain))
    out = directory / "base.gguf"
    convert_base(directory, out, "F32")
    return out


def _weights(chain: Sequence[int]) -> dict[str, np.ndarray]:
    """Layers that add nothing, and a head that knows each token's follower."""
    weights = random_weights({**CONFIG, "vocab_size": N_VOCAB})
    for name, values in weights.items():
        if "proj" in name:
            values[:] = 0
        elif "norm" in name:
            values[:] = 1
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    head[:] = 0
    for token, following in pairwise(chain):
        head[following] += embedding[token]
    return weights


def pack_on(base: Path) -> Pack:
    """An empty pack on a base."""
    return new_pack(base.parent / "said", str(base), bases.digest(base))
