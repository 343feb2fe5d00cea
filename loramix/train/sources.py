"""Rows of several files for one skill, sampled by weight, so that no source drowns the others."""

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
        recipe: with ``data.sources``.
        data_dir: where their files are.

    Returns:
        A list a source. Rows name their file and source (``skills/spam``, ``skills_more/spam:sms``).

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
        # an input may stand in two files: the first one's split counts
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
    """A target "type: name; type: name" with other names for the types."""
    if not rename or ":" not in target:
        return target
    pairs = [part.partition(":") for part in target.split("; ")]
    return "; ".join(f"{rename.get(kind, kind)}{colon}{name}" for kind, colon, name in pairs)


def sample(recipe: Recipe, found: Sequence[Sequence[Row]], number: int = 0) -> list[Row]:
    """The training rows of one pass.

    Each source gives its share by weight; one with fewer rows gives all it has, and the others share the rest.
    Later passes go on where the one before ended, so that all rows of a large source are seen.

    Args:
        recipe: gives number of rows, weights and seed.
        found: from `read_sources`.
        number: of the pass, from 0.

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
    """How many rows each source gives: by weight, none more than it has.

    Args:
        sizes: rows of each source.
        weights: of each source.
        total: rows wanted.

    Returns:
        A count a source; their sum is ``total``, up to rounding, or all rows where there are fewer.
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
    """Rows of ``dev``, as many of each named source as there is room for.

    Args:
        recipe: gives the seed and the forms.
        found: from `read_sources`.
        limit: most rows of all sources together.
    """
    rng = random.Random(f"{recipe.training.seed}-dev")
    groups: dict[str, list[Row]] = {}
    for source, rows in zip(recipe.data.sources, found, strict=True):
        if source.target is None:  # a class lent from another task measures nothing
            for row in rows:
                if row.split == "dev":
                    form = replace(row, input=rewritten(row.input, rng)) if source.schema_forms else row
                    groups.setdefault(row.source, []).append(form)
    counts = shares([len(rows) for rows in groups.values()], [1.0] * len(groups), limit)
    return [row for rows, n in zip(groups.values(), counts, strict=True) for row in rng.sample(rows, n)]


def data_files(recipe: Recipe, data_dir: Path) -> list[Path]:
    """The files that a recipe is trained on: those of its sources, else the one of its name.

    Raises:
        NotFound: one is missing.
    """
    files = (source.file for source in recipe.data.sources if source.file)
    names = dict.fromkeys(files) or [recipe.name]
    return [_file(data_dir, name) for name in names]


def rows_of(recipe: Recipe, data_dir: Path) -> list[Row]:
    """All rows of a recipe's one file, or a sample of its sources (see `gather`).

    Raises:
        NotFound, InvalidData: see `read_rows` and `read_sources`.
    """
    return gather(recipe, data_dir) if recipe.data.sources else read_rows(_file(data_dir, recipe.name))


def _file(data_dir: Path, name: str) -> Path:
    path = data_dir / name
    return data_file(path.parent, path.name)


def gather(recipe: Recipe, data_dir: Path) -> list[Row]:
    """A sample of the training rows and of ``dev``, as `loramix.train.lora.train_skill` takes them.

    Raises:
        NotFound, InvalidData: see `read_sources`.
    """
    found = read_sources(recipe, data_dir)
    return [*sample(recipe, found), *dev_rows(recipe, found, recipe.training.dev_rows)]


def by_source(rows: Sequence[Row]) -> dict[str, int]:
    """Training rows of each named source, most first."""
    return dict(Counter(row.source for row in rows if row.split == "train").most_common())
