"""Prompts and answers → token ids to train on, from the runtime's tokenizer."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loramix.errors import InvalidData
from loramix.train.data import Example, Row, frames, prompts
from loramix.train.recipe import Recipe

MAX_NAMED = 10
"""Largest number of rows that a message lists one by one."""


def common_prefix(examples: Sequence[Example]) -> int:
    """Length in tokens of what all prompts begin with: the chat template's system message, as a rule."""
    first = examples[0].ids
    shared = min(len(example.ids) - example.n_answer - 1 for example in examples)
    for example in examples:
        differs = np.nonzero(example.ids[:shared] != first[:shared])[0]
        shared = int(differs[0]) if len(differs) else shared
    return max(shared, 0)


@dataclass(frozen=True, slots=True)
class Asked:
    """A row with one wording of its prompt."""

    prompt: str
    frame: str
    """The same prompt around an input of one character: what a long input may be cut down to."""
    answer: str
    line: int = 0
    """Line number in the data file, for messages."""


def prepare(
    recipe: Recipe, train: Sequence[Row], dev: Sequence[Row], base: Path, say: Callable[[str], None]
) -> list[list[Example]]:
    """Examples of each epoch, all of one length, and last those of dev; see `tokenize`.

    Args:
        recipe: recipe with wording, epochs and ``max_length``.
        train: training rows; the wording changes in each epoch.
        dev: evaluation rows, in one wording each.
        base: GGUF or Hugging Face directory.
        say: callback for messages on rows that are left out.

    Raises:
        InvalidData: too many rows are too long, or no row is left.
    """
    settings = recipe.training
    epochs = math.ceil(settings.epochs)
    parts = [*((train, f"{settings.seed}-{epoch}") for epoch in range(epochs)), (dev, "dev")]
    asked = [
        Asked(prompt, frame, row.target, row.line)
        for rows, seed in parts
        for row, prompt, frame in zip(
            rows, prompts(rows, recipe, seed), frames(rows, recipe, seed), strict=True
        )
    ]
    return whole(tokenize(base, asked, settings.max_length, say), len(train), epochs)


def tokenize(
    base: Path, asked: Sequence[Asked], max_length: int, say: Callable[[str], None] = lambda line: None
) -> list[Example | None]:
    """Token ids of prompts with answers, from the runtime (GGUF) or the tokenizer (directory).

    A long input is cut in its middle. A row whose answer and instruction alone are too long is left out, named
    by its line: an answer is never learned or measured in part.

    Args:
        base: GGUF or Hugging Face directory.
        asked: rows with their prompts.
        max_length: largest length of an example in tokens.
        say: callback for messages on rows that are left out.

    Returns:
        One example per row; None for a row that is left out.

    Raises:
        InvalidData: more than a twentieth of the rows is longer than ``max_length``.
    """
    examples = token_ids(base, [(row.prompt, row.answer) for row in asked])
    long = [i for i, example in enumerate(examples) if len(example.ids) > max_length]
    if not long:
        return list(examples)
    if len(long) > len(examples) // 20:
        lines = _few([asked[i].line for i in long])
        raise InvalidData(
            f"{len(long)} of {len(examples)} rows are longer than max_length = {max_length} tokens{lines}; raise it, "
            "or shorten these rows."
        )
    frames = token_ids(base, [(asked[i].frame, asked[i].answer) for i in long])
    found: list[Example | None] = list(examples)
    for i, frame in zip(long, frames, strict=True):
        fits = len(frame.ids) <= max_length
        found[i] = cut(examples[i], max_length, _around(examples[i], frame)) if fits else None
    dropped = {asked[i].line or -i: examples[i] for i in long if found[i] is None}
    for line, example in list(dropped.items())[:MAX_NAMED]:
        what = f"line {line}" if line > 0 else f"row {1 - line}"
        say(
            f"{what} is left out: its answer has {example.n_answer} tokens, with its instruction more than "
            f"max_length = {max_length}"
        )
    if dropped:
        say(
            f"{len(dropped)} rows are left out, too long for max_length = {max_length}; raise it to keep them"
        )
    return found


def whole(examples: Sequence[Example | None], n_rows: int, n_epochs: int) -> list[list[Example]]:
    """Examples of each epoch and of dev, without the rows that are left out in any epoch.

    Args:
        examples: those of ``n_epochs`` passes over ``n_rows`` rows, then those of dev.
        n_rows: training rows.
        n_epochs: passes.

    Returns:
        A list an epoch, all of one length, and last that of dev.

    Raises:
        InvalidData: nothing is left of train or of dev.
    """
    passes = [examples[i * n_rows : (i + 1) * n_rows] for i in range(n_epochs)]
    out = {i for part in passes for i, example in enumerate(part) if example is None}
    kept = [[e for i, e in enumerate(part) if e is not None and i not in out] for part in passes]
    dev = [example for example in examples[n_epochs * n_rows :] if example is not None]
    for split, part in (("train", kept[0]), ("dev", dev)):
        if not part:
            raise InvalidData(
                f"no row of split {split!r} is short enough; raise max_length, or shorten them."
            )
    return [*kept, dev]


def token_ids(base: Path, rows: Sequence[tuple[str, str]]) -> list[Example]:
    """Prompts with answers as examples of any length.

    Args:
        base: GGUF or Hugging Face directory.
        rows: prompt and answer.
    """
    texts = [{"prompt": prompt, "answer": answer} for prompt, answer in rows]
    if base.is_file():
        from loramix.runtime.children import tokenize_rows

        pairs, _ = tokenize_rows(base, texts)
    else:
        pairs = _tokenize_directory(base, texts)
    return [Example(ids, n) for ids, n in pairs]


def _few(lines: Sequence[int]) -> str:
    """Format distinct line numbers for a message."""
    known = sorted({line for line in lines if line})
    more = ", …" if len(known) > MAX_NAMED else ""
    return f" (lines {', '.join(map(str, known[:MAX_NAMED]))}{more})" if known else ""


def _around(example: Example, frame: Example) -> tuple[int, int]:
    """Tokens of the prompt before and behind its input: what it shares with the same prompt without one."""
    prompt, bare = example.ids[: -example.n_answer], frame.ids[: -frame.n_answer]
    most = min(len(prompt), len(bare))
    same = prompt[:most] == bare[:most]
    before = most if same.all() else int(np.argmin(same))
    same = prompt[::-1][: most - before] == bare[::-1][: most - before]
    behind = len(same) if same.all() else int(np.argmin(same))
    return before, behind


def header(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """The tokens that the chat template puts behind the user's text, up to the answer.

    Args:
        first: ids of a prompt.
        second: ids of another one, whose text ends differently.
    """
    count = 0
    while count < min(len(first), len(second)) and first[-1 - count] == second[-1 - count]:
        count += 1
    return [int(token) for token in first[len(first) - count :]]


def header_of(base: Path) -> list[int]:
    """What the base's template puts behind a user's text: two prompts that end differently show it."""
    first, second = token_ids(base, [("a", "x"), ("b", "x")])
    return header(first.ids[: -first.n_answer].tolist(), second.ids[: -second.n_answer].tolist())


def cut(example: Example, max_length: int, around: tuple[int, int] = (0, 0)) -> Example:
    """Shorten a long example by removing tokens from the middle of its prompt.

    Args:
        example: example of any length.
        max_length: number of tokens to keep.
        around: numbers of tokens at the prompt's start and end that are always kept.
    """
    surplus = len(example.ids) - max_length
    if surplus <= 0:
        return example
    n_prompt = len(example.ids) - example.n_answer
    before, behind = around
    last = n_prompt - behind - surplus  # of the places where the gap may begin
    if last < before:
        raise ValueError(f"{surplus} tokens too many, {n_prompt - before - behind} of them are input")
    start = min(max(n_prompt // 2 - surplus // 2, before), last)
    keep = np.r_[0:start, start + surplus : len(example.ids)]
    return Example(example.ids[keep], example.n_answer)


def _tokenize_directory(base: Path, rows: list[dict[str, str]]) -> list[tuple[Any, int]]:
    """Tokenize with a checkpoint's vocabulary, converted as for the GGUF, so that the ids match the runtime's."""
    from loramix.convert.hf.config import read_config
    from loramix.convert.hf.gguf_writer import write_vocabulary
    from loramix.convert.hf.vocabulary import read_vocabulary
    from loramix.runtime.children import tokenized
    from loramix.templates.chat_template import usable_template

    vocabulary = read_vocabulary(base, read_config(base).vocab_size)
    usable_template(vocabulary.chat_template, vocabulary.named_tokens, str(base))
    with tempfile.TemporaryDirectory() as directory:
        converted = Path(directory) / "vocabulary.gguf"
        write_vocabulary(vocabulary, converted)
        return tokenized(converted, rows)[0]
