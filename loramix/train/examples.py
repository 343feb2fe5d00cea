"""Tokenizes prompts and answers for training, with the runtime's tokenizer."""

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
"""Maximum number of rows that a message lists individually."""


def common_prefix(examples: Sequence[Example]) -> int:
    """Length of the common prefix of all prompts in tokens, usually the chat template's system message."""
    first = examples[0].ids
    shared = min(len(example.ids) - example.n_answer - 1 for example in examples)
    for example in examples:
        differs = np.nonzero(example.ids[:shared] != first[:shared])[0]
        shared = int(differs[0]) if len(differs) else shared
    return max(shared, 0)


@dataclass(frozen=True, slots=True)
class PromptedRow:
    """A row with one wording of its prompt."""

    prompt: str
    frame: str
    """The same prompt with an input of one character; its tokens are kept if a long input is cut."""
    answer: str
    line: int = 0
    """Line number in the data file, for messages."""


def prepare(
    recipe: Recipe, train: Sequence[Row], dev: Sequence[Row], base: Path, say: Callable[[str], None]
) -> list[list[Example]]:
    """Tokenize the rows of all epochs and of dev; see `tokenize`.

    Args:
        recipe: recipe with wording, epochs and ``max_length``.
        train: training rows; the wording changes in each epoch.
        dev: evaluation rows, in one wording each.
        base: GGUF or Hugging Face directory.
        say: callback for messages on rows that are dropped.

    Returns:
        A list of examples per epoch, all of equal length, and finally that of dev.

    Raises:
        InvalidData: too many rows are too long, or no row is left.
    """
    settings = recipe.training
    epochs = math.ceil(settings.epochs)
    parts = [*((train, f"{settings.seed}-{epoch}") for epoch in range(epochs)), (dev, "dev")]
    asked = [
        PromptedRow(prompt, frame, row.target, row.line)
        for rows, seed in parts
        for row, prompt, frame in zip(
            rows, prompts(rows, recipe, seed), frames(rows, recipe, seed), strict=True
        )
    ]
    return complete_epochs(tokenize(base, asked, settings.max_length, say), len(train), epochs)


def tokenize(
    base: Path, asked: Sequence[PromptedRow], max_length: int, say: Callable[[str], None] = lambda line: None
) -> list[Example | None]:
    """Tokenize prompts with answers, with the runtime (GGUF) or the tokenizer (directory).

    A long input is shortened in its middle. A row with an answer and instruction that are too long is dropped with
    a message that names its line, because a part of an answer must not be learned or measured.

    Args:
        base: GGUF or Hugging Face directory.
        asked: rows with their prompts.
        max_length: maximum length of an example in tokens.
        say: callback for messages on rows that are dropped.

    Returns:
        One example per row; None for a dropped row.

    Raises:
        InvalidData: more than a twentieth of the rows are longer than ``max_length``.
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
            f"{what} is dropped: its answer of {example.n_answer} tokens and its instruction have more than "
            f"max_length = {max_length} tokens"
        )
    if dropped:
        say(f"{len(dropped)} rows are dropped, too long for max_length = {max_length}; raise it to keep them")
    return found


def complete_epochs(examples: Sequence[Example | None], n_rows: int, n_epochs: int) -> list[list[Example]]:
    """Split examples by epoch, without the rows that are dropped in any epoch.

    Args:
        examples: examples of ``n_epochs`` passes over ``n_rows`` rows, then those of dev.
        n_rows: number of training rows.
        n_epochs: number of passes.

    Returns:
        A list of examples per epoch, all of equal length, and finally that of dev.

    Raises:
        InvalidData: no row of train or of dev is left.
    """
    passes = [examples[i * n_rows : (i + 1) * n_rows] for i in range(n_epochs)]
    out = {i for part in passes for i, example in enumerate(part) if example is None}
    kept = [[e for i, e in enumerate(part) if e is not None and i not in out] for part in passes]
    dev = [example for example in examples[n_epochs * n_rows :] if example is not None]
    for split, part in (("train", kept[0]), ("dev", dev)):
        if not part:
            raise InvalidData(
                f"no row of split {split!r} is short enough; raise max_length, or shorten the rows."
            )
    return [*kept, dev]


def token_ids(base: Path, rows: Sequence[tuple[str, str]]) -> list[Example]:
    """Tokenize prompts with answers, without a limit on the length.

    Args:
        base: GGUF or Hugging Face directory.
        rows: pairs (prompt, answer).
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
    """Count the prompt's tokens before and after its input, by comparison with the prompt for a short input."""
    prompt, bare = example.ids[: -example.n_answer], frame.ids[: -frame.n_answer]
    most = min(len(prompt), len(bare))
    same = prompt[:most] == bare[:most]
    before = most if same.all() else int(np.argmin(same))
    same = prompt[::-1][: most - before] == bare[::-1][: most - before]
    behind = len(same) if same.all() else int(np.argmin(same))
    return before, behind


def header(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Return the tokens of the chat template between the user's text and the answer.

    Args:
        first: ids of a prompt.
        second: ids of another prompt, with a text that ends differently.
    """
    count = 0
    while count < min(len(first), len(second)) and first[-1 - count] == second[-1 - count]:
        count += 1
    return [int(token) for token in first[len(first) - count :]]


def header_of(base: Path) -> list[int]:
    """Return `header` of the base's template, found with two prompts that end differently."""
    first, second = token_ids(base, [("a", "x"), ("b", "x")])
    return header(first.ids[: -first.n_answer].tolist(), second.ids[: -second.n_answer].tolist())


def cut(example: Example, max_length: int, around: tuple[int, int] = (0, 0)) -> Example:
    """Shorten a long example by removing tokens from the middle of its prompt.

    Args:
        example: example of any length.
        max_length: number of tokens to keep.
        around: numbers of tokens at the prompt's start and end that are always kept.

    Raises:
        ValueError: the input has too few tokens to remove.
    """
    surplus = len(example.ids) - max_length
    if surplus <= 0:
        return example
    n_prompt = len(example.ids) - example.n_answer
    before, after = around
    last = n_prompt - after - surplus  # last possible start of the gap
    if last < before:
        raise ValueError(f"{surplus} tokens too many, {n_prompt - before - after} of them are input")
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
