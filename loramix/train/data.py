"""Labelled rows, prompts made from them, and batches of similar length."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loramix.errors import InvalidData, NotFound
from loramix.formats.textfile import has_lone_surrogate, read_lines
from loramix.prompts import fill
from loramix.train.frames import framed
from loramix.train.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled example of a data file."""

    split: str
    input: str
    target: str
    source: str = ""
    references: tuple[str, ...] = ()
    line: int = field(default=0, compare=False)
    """Line number in the data file, from 1; 0 if it is not from a file."""
    groups: tuple[str, ...] = ()
    """Groups of instructions for this row; if empty, ``any`` and the source's group."""


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized training example: ``ids`` int32 (T,); the last ``n_answer`` are the answer."""

    ids: npt.NDArray[np.int32]
    n_answer: int


SUFFIXES = (".jsonl.gz", ".jsonl")


def has_data(data_dir: Path, name: str) -> bool:
    """Return whether a directory has ``NAME.jsonl.gz`` or ``NAME.jsonl``."""
    return any((data_dir / f"{name}{suffix}").is_file() for suffix in SUFFIXES)


def data_file(data_dir: Path, name: str) -> Path:
    """Return the path of ``NAME.jsonl.gz`` or ``NAME.jsonl`` in a directory.

    Raises:
        NotFound: neither file exists.
    """
    for suffix in SUFFIXES:
        if (data_dir / f"{name}{suffix}").is_file():
            return data_dir / f"{name}{suffix}"
    raise NotFound(f"no {name}.jsonl.gz or {name}.jsonl in {data_dir}; put the data of skill {name!r} there.")


def read_rows(path: Path, *, split: str | None = None) -> list[Row]:
    """Read a JSONL or JSONL.gz file of ``split``, ``input``, ``target``.

    Duplicate rows are dropped, and rows whose input appeared before in another split. An input with several
    targets becomes several rows in ``train``, and one row with several references in other splits.

    Args:
        path: data file.
        split: split of rows that name none; with None such rows are an error.

    Raises:
        NotFound: the file does not exist.
        InvalidData: a row is invalid; the message names its line.
    """
    if not path.is_file():
        raise NotFound(f"no data file {path}: give one with --data FILE (JSONL or JSONL.gz).")
    rows: dict[tuple[str, ...], Row] = {}
    split_of: dict[tuple[str, str], str] = {}
    for number, line in read_lines(path):
        if not line.strip():
            continue
        row = _row(line, path, number, split)
        if split_of.setdefault((row.source, row.input), row.split) != row.split:
            continue
        key = (row.source, row.input, *([row.target] if row.split == "train" else []))
        known = rows.get(key)
        if known is None:
            rows[key] = row
        elif row.split != "train":
            rows[key] = replace(known, references=tuple(dict.fromkeys(known.references + row.references)))
    if not rows:
        raise InvalidData(f"{path} has no rows; each line needs 'split', 'input' and 'target'.")
    return list(rows.values())


def _row(line: str, path: Path, number: int, split: str | None) -> Row:
    where = f"{path}, line {number}"
    try:
        raw = json.loads(line.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise InvalidData(f"{where}: not JSON ({error}); fix or delete that line.") from None
    if not isinstance(raw, dict):
        raise InvalidData(f"{where}: found a {type(raw).__name__}, needs an object; fix or delete that line.")
    if split is not None:
        raw.setdefault("split", split)
    for key in ("split", "input", "target"):
        if not isinstance(raw.get(key), str) or not raw[key].strip():
            raise InvalidData(f"{where}: {key!r} must be non-empty text; fix or delete that line.")
    references = raw.get("references") or [raw["target"]]
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise InvalidData(f"{where}: 'references' must be a list of texts; fix or delete that line.")
    row = Row(
        raw["split"], raw["input"], raw["target"], str(raw.get("source", "")), tuple(references), number
    )
    if any(map(has_lone_surrogate, (row.split, row.input, row.target, row.source, *references))):
        raise InvalidData(
            f"{where}: has half a character (a lone \\ud800 to \\udfff); fix or delete that line."
        )
    return row


def limited(rows: Sequence[Row], max_rows: int | None) -> list[Row]:
    """Limit the ``train`` rows to the first `max_rows` in the order of `take`; keep all other rows."""
    if max_rows is None:
        return list(rows)
    return [*take(rows, "train", max_rows), *(row for row in rows if row.split != "train")]


def take(rows: Sequence[Row], split: str, limit: int | None = None, seed: int = 0) -> list[Row]:
    """Return at most `limit` rows of one split, in a seeded random order.

    Raises:
        InvalidData: the split has no rows.
    """
    chosen = [row for row in rows if row.split == split]
    if not chosen:
        found = ", ".join(sorted({row.split for row in rows}))
        raise InvalidData(f"the data has no rows of split {split!r} (found: {found}); add some.")
    random.Random(f"{seed}-{split}").shuffle(chosen)
    return chosen[:limit]


def instruct(row: Row, recipe: Recipe, rng: random.Random) -> str:
    """Build a row's prompt in a random phrasing of its source, or of the recipe.

    Args:
        row: row with the input.
        recipe: recipe with the instruction templates.
        rng: source of the random choice.
    """
    if row.groups:
        asks = [text for group in row.groups for text in recipe.asks.get(group, [])]
        pool = [text for group in row.groups for text in recipe.instructions.get(group, [])]
        if asks and (not pool or rng.random() < 0.5):
            return framed(rng.choice(asks), row.input, rng)
        return fill(rng.choice(pool), row.input)
    own = recipe.instructions.get(row.source, []) if row.source else []
    common = recipe.instructions.get("any", [])
    pool = own if own and (not common or rng.random() < 0.5) else common
    if not pool:
        raise InvalidData(f"recipe {recipe.name!r} has no instructions for rows of source {row.source!r}.")
    return fill(rng.choice(pool), row.input)


def prompts(rows: Sequence[Row], recipe: Recipe, seed: str) -> list[str]:
    """Build one prompt per row; the phrasing depends only on the seed and the row's position."""
    return [instruct(row, recipe, random.Random(f"{seed}-{i}")) for i, row in enumerate(rows)]


def frames(rows: Sequence[Row], recipe: Recipe, seed: str) -> list[str]:
    """Build the same prompts as `prompts`, with each input replaced by one character."""
    return prompts([replace(row, input=".") for row in rows], recipe, seed)


def batches(lengths: Sequence[int], batch_size: int, rng: np.random.Generator) -> list[npt.NDArray[np.int64]]:
    """Group examples of similar length into batches, in random order, to reduce padding.

    Args:
        lengths: length of each example in tokens.
        batch_size: number of examples per batch.
        rng: source of the shuffles.

    Returns:
        Index arrays that cover each example once.
    """
    order = rng.permutation(len(lengths))
    pool = batch_size * 32
    groups: list[npt.NDArray[np.int64]] = []
    for start in range(0, len(order), pool):
        part = order[start : start + pool]
        part = part[np.argsort(np.asarray(lengths)[part], kind="stable")]
        groups += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [groups[i] for i in rng.permutation(len(groups))]


def micro_batches(
    batch: npt.NDArray[np.int64], lengths: Sequence[int], max_tokens: int
) -> list[npt.NDArray[np.int64]]:
    """Split a batch into parts of at most `max_tokens` tokens, padding included."""
    ordered = sorted(batch.tolist(), key=lambda i: lengths[i], reverse=True)
    parts: list[npt.NDArray[np.int64]] = []
    while ordered:
        size = max(1, max_tokens // lengths[ordered[0]])
        parts.append(np.asarray(ordered[:size], np.int64))
        ordered = ordered[size:]
    return parts
