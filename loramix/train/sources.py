"""Samples rows of several files for one skill by weight, so that no source dominates."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loramix.errors import InvalidData
from loramix.train.data import Row, data_file, read_rows
from loramix.train.made_rows import made_rows
from loramix.train.metrics import is_sentence, kept
from loramix.train.recipe import DataSource, Recipe
from loramix.train.schema_forms import rewritten


def read_sources(recipe: Recipe, data_dir: Path) -> list[list[Row]]:
    """Read the rows of each of a recipe's sources, of all splits.

    Args:
        recipe: recipe with ``data.sources``.
        data_dir: directory of their files.

    Returns:
        A list of rows per source. Rows name their file and source (``skills/spam``, ``skills_more/spam:sms``).

    Raises:
        NotFound: a file is missing.
        InvalidData: a file that cannot be read, a source without rows, a row in two splits.
    """
    files: dict[Path, list[Row]] = {}
    split_of: dict[str, str] = {}
    found = []
    for source in recipe.data.sources:
        path = Path(source.made) if source.made else _file(data_dir, source.file)
        if path not in files:
            files[path] = made_rows(source.made) if source.made else read_rows(path)
        rows = files[path]
        chosen = [_of(row, source) for row in rows if not source.take or row.source in source.take]
        if source.one_sentence:
            chosen = [row for row in chosen if row.split != "train" or is_sentence(row.target)]
        # an input may occur in two files; the split of the first one is used
        chosen = [
            row for row in kept(chosen, recipe) if split_of.setdefault(row.input, row.split) == row.split
        ]
        if not any(row.split == "train" for row in chosen):
            named = f" with source {', '.join(source.take)}" if source.take else ""
            raise InvalidData(f"{path} has no rows of split 'train'{named}; correct the recipe's source.")
        found.append(chosen)
    return found


def _of(row: Row, source: DataSource) -> Row:
    name = f"made:{source.made}" if source.made else source.file
    name = f"{name}:{row.source}" if row.source else name
    targets = [source.target] if source.target else [row.target, *row.references]
    targets = [_renamed(text, source.rename) for text in targets]
    return replace(
        row,
        source=name,
        target=targets[0],
        references=tuple(targets[1:] or targets),
        groups=source.instructions,
    )


def _renamed(target: str, rename: Mapping[str, str]) -> str:
    """Rename the types in a target "type: name; type: name"."""
    if not rename or ":" not in target:
        return target
    pairs = [part.partition(":") for part in target.split("; ")]
    return "; ".join(f"{rename.get(kind, kind)}{colon}{name}" for kind, colon, name in pairs)


def sample(recipe: Recipe, found: Sequence[Sequence[Row]], number: int = 0) -> list[Row]:
    """Sample the training rows of one pass.

    Each source contributes its share by weight; a source with fewer rows contributes all, and the others share the
    rest. Each pass continues where the previous one ended, so that all rows of a large source are used.

    Args:
        recipe: recipe with number of rows, weights and seed.
        found: rows from `read_sources`.
        number: number of the pass, from 0.

    Returns:
        Rows in random order.
    """
    seed = recipe.training.seed
    pools = []
    for place, (source, rows) in enumerate(zip(recipe.data.sources, found, strict=True)):
        rng = random.Random(f"{seed}-{place}")
        pool = [
            row
            for row in rows
            if row.split == "train" and rng.random() < source.target_rates.get(row.target, 1.0)
        ]
        rng.shuffle(pool)
        pools.append(pool)
    counts = shares([len(pool) for pool in pools], [s.weight for s in recipe.data.sources], recipe.data.rows)
    rng = random.Random(f"{seed}-pass-{number}")
    chosen = []
    for source, pool, count in zip(recipe.data.sources, pools, counts, strict=True):
        for i in range(number * count, (number + 1) * count):
            row = pool[i % len(pool)]
            chosen.append(replace(row, input=rewritten(row.input, rng)) if source.schema_forms else row)
    rng.shuffle(chosen)
    return chosen


def shares(sizes: Sequence[int], weights: Sequence[float], total: int) -> list[int]:
    """Compute the number of rows from each source, by weight.

    Args:
        sizes: number of rows of each source.
        weights: weight of each source.
        total: requested number of rows.

    Returns:
        A count per source, at most its size; the sum is ``total`` up to rounding, or all rows if there are fewer.
    """
    counts, rest = [0] * len(sizes), set(range(len(sizes)))
    while rest:
        free = total - sum(counts)
        unit = free / sum(weights[i] for i in rest)
        small = {i for i in rest if sizes[i] <= unit * weights[i]}
        for i in small or rest:
            counts[i] = sizes[i] if small else round(unit * weights[i])
        rest -= small or rest
    return counts


def dev_rows(recipe: Recipe, found: Sequence[Sequence[Row]], limit: int) -> list[Row]:
    """Sample rows of ``dev`` evenly from the sources.

    Args:
        recipe: recipe with the seed and the schema forms.
        found: rows from `read_sources`.
        limit: maximum number of rows of all sources.
    """
    rng = random.Random(f"{recipe.training.seed}-dev")
    groups: dict[str, list[Row]] = {}
    for source, rows in zip(recipe.data.sources, found, strict=True):
        if source.target is None:  # rows of another task with a replaced target are not evaluated
            for row in rows:
                if row.split == "dev":
                    form = replace(row, input=rewritten(row.input, rng)) if source.schema_forms else row
                    groups.setdefault(row.source, []).append(form)
    counts = shares([len(rows) for rows in groups.values()], [1.0] * len(groups), limit)
    return [row for rows, n in zip(groups.values(), counts, strict=True) for row in rng.sample(rows, n)]


def data_files(recipe: Recipe, data_dir: Path) -> list[Path]:
    """Return the data files of a recipe: those of its sources, otherwise the file of its name.

    Raises:
        NotFound: a file is missing.
    """
    files = (source.file for source in recipe.data.sources if source.file)
    names = dict.fromkeys(files) or [recipe.name]
    return [_file(data_dir, name) for name in names]


def rows_of(recipe: Recipe, data_dir: Path) -> list[Row]:
    """Read all rows of a recipe's file, or a sample of its sources (see `gather`).

    Raises:
        NotFound, InvalidData: see `read_rows` and `read_sources`.
    """
    return gather(recipe, data_dir) if recipe.data.sources else read_rows(_file(data_dir, recipe.name))


def _file(data_dir: Path, name: str) -> Path:
    path = data_dir / name
    return data_file(path.parent, path.name)


def gather(recipe: Recipe, data_dir: Path) -> list[Row]:
    """Sample training rows and ``dev`` rows for `loramix.train.lora.train_skill`.

    Raises:
        NotFound, InvalidData: see `read_sources`.
    """
    found = read_sources(recipe, data_dir)
    return [*sample(recipe, found), *dev_rows(recipe, found, recipe.training.dev_rows)]


def by_source(rows: Sequence[Row]) -> dict[str, int]:
    """Count the training rows of each named source, largest first."""
    return dict(Counter(row.source for row in rows if row.split == "train").most_common())
