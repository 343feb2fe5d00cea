"""Prompts and answers → token ids to train on, from the runtime's tokenizer."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loramix.errors import InvalidData
from loramix.train.data import Example


def common_prefix(examples: Sequence[Example]) -> int:
    """Length in tokens of what all prompts begin with: the chat template's system message, as a rule."""
    first = examples[0].ids
    shared = min(len(example.ids) - example.n_answer - 1 for example in examples)
    for example in examples:
        differs = np.nonzero(example.ids[:shared] != first[:shared])[0]
        shared = int(differs[0]) if len(differs) else shared
    return max(shared, 0)


def tokenize(base: Path, asked: Sequence[str], answers: Sequence[str], max_length: int) -> list[Example]:
    """Token ids of prompts with answers, as the runtime has them.

    Args:
        base: a GGUF, or a Hugging Face directory.
        asked: prompts.
        answers: one for each.
        max_length: most tokens of both together.

    Raises:
        InvalidData: an example is longer than ``max_length``.
    """
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(asked, answers, strict=True)]
    if base.is_file():
        from loramix.runtime.tokenize import tokenize_rows

        pairs, _ = tokenize_rows(base, rows)
    else:
        pairs = _tokenize_directory(base, rows)
    examples = [Example(ids, n) for ids, n in pairs]
    long = sum(len(example.ids) > max_length for example in examples)
    if long > len(examples) // 20:
        raise InvalidData(
            f"{long} of {len(examples)} rows are longer than max_length = {max_length} tokens; raise it."
        )
    return [cut(example, max_length) for example in examples]


def header_of(base: Path) -> list[int]:
    """What the base's template puts behind a user's text: two prompts that end differently show it."""
    from loramix.runtime.tokenize import header

    first, second = tokenize(base, ["a", "b"], ["x", "x"], 1 << 20)
    return header(first.ids[: -first.n_answer].tolist(), second.ids[: -second.n_answer].tolist())


def cut(example: Example, max_length: int) -> Example:
    """Shorten a long example by taking tokens out of its prompt's middle; instruction ends and answer stay."""
    surplus = len(example.ids) - max_length
    if surplus <= 0:
        return example
    middle = (len(example.ids) - example.n_answer) // 2
    keep = np.r_[0 : middle - surplus // 2, middle - surplus // 2 + surplus : len(example.ids)]
    return Example(example.ids[keep], example.n_answer)


def _tokenize_directory(base: Path, rows: list[dict[str, str]]) -> list[tuple[Any, int]]:
    """Token ids as the base has them once it is converted: by the same code, from its vocabulary alone."""
    from loramix.chat_template import usable_template
    from loramix.convert.hf_config import read_config
    from loramix.convert.hf_gguf import write_vocabulary
    from loramix.convert.hf_vocab import read_vocabulary
    from loramix.runtime.tokenize import tokenized

    vocabulary = read_vocabulary(base, read_config(base).vocab_size)
    usable_template(vocabulary.chat_template, vocabulary.named_tokens, str(base))
    with tempfile.TemporaryDirectory() as directory:
        converted = Path(directory) / "vocabulary.gguf"
        write_vocabulary(vocabulary, converted)
        return tokenized(converted, rows)[0]
