"""Rows of labelled data → prompts with answers → batches of token ids with a mask on the answer."""

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
    """Its place in the data file, from 1; 0 where it is from none."""
    groups: tuple[str, ...] = ()
    """Groups of instructions that fit; none: ``any`` and the source's own."""


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized training example: ``ids`` int32 (T,), of which the last ``n_answer`` are learned."""

    ids: npt.NDArray[np.int32]
    n_answer: int


def data_file(data_dir: Path, name: str) -> Path:
    """``NAME.jsonl.gz`` or ``NAME.jsonl`` in a directory.

    Raises:
        NotFound: neither is there.
    """
    for suffix in (".jsonl.gz", ".jsonl"):
        if (data_dir / f"{name}{suffix}").is_file():
            return data_dir / f"{name}{suffix}"
    raise NotFound(f"no {name}.jsonl.gz or {name}.jsonl in {data_dir}; put the data of skill {name!r} there.")


def read_rows(path: Path, *, split: str | None = None) -> list[Row]:
    """Read a JSONL or JSONL.gz file of ``split``, ``input``, ``target``.

    A repeated row is dropped, and so is one whose input stood in another split before. An input with
    several targets is several rows of ``train``, and elsewhere one row with several references.

    Args:
        path: the file.
        split: taken for rows that name none; None refuses them.

    Raises:
        NotFound: there is no such file.
        InvalidData: a row that cannot be read, named by its line.
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
            f"{where}: holds half a character (a lone \\ud800 to \\udfff); fix or delete that line."
        )
    return row


def limited(rows: Sequence[Row], max_rows: int | None) -> list[Row]:
    """All rows but those of ``train`` beyond the first ``max_rows`` in `take`'s order."""
    if max_rows is None:
        return list(rows)
    return [*take(rows, "train", max_rows), *(row for row in rows if row.split != "train")]


def take(rows: Sequence[Row], split: str, limit: int | None = None, seed: int = 0) -> list[Row]:
    """Rows of one split, in a seeded random order, at most ``limit``.

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
    """Ask for a row's answer in one of the recipe's phrasings, those of the row's source preferred.

    Args:
        row: the row.
        recipe: gives the instruction templates.
        rng: chooses.
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
    """One prompt a row; the phrasing is drawn from the seed and the row's place alone."""
    return [instruct(row, recipe, random.Random(f"{seed}-{i}")) for i, row in enumerate(rows)]


def frames(rows: Sequence[Row], recipe: Recipe, seed: str) -> list[str]:
    """The prompts of `prompts` around an input of one character."""
    return prompts([replace(row, input=".") for row in rows], recipe, seed)


def batches(lengths: Sequence[int], batch_size: int, rng: np.random.Generator) -> list[npt.NDArray[np.int64]]:
    """Batches of like length in random order: little padding, and still a random pass.

    Args:
        lengths: tokens of each example.
        batch_size: examples in a batch.
        rng: shuffles.

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
    """Split a batch so that no part has more than ``max_tokens`` tokens with its padding."""
    ordered = sorted(batch.tolist(), key=lambda i: lengths[i], reverse=True)
    parts: list[npt.NDArray[np.int64]] = []
    while ordered:
        size = max(1, max_tokens // lengths[ordered[0]])
        parts.append(np.asarray(ordered[:size], np.int64))
        ordered = ordered[size:]
    return parts
