"""Searches learning rate, rank and layers of a recipe on dev, as trials of Ray Tune that ASHA stops early.

ASHA (Li et al., arXiv 1810.05934) compares trials at 1/9 and 1/3 of the run and lets the best third go on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from loramix.cluster.training import row
from loramix.cluster.trials import Report, Trials
from loramix.paths import sha256_file, write_text
from loramix.train.data import read_rows
from loramix.train.lora import Progress, train_skill
from loramix.train.recipe import Recipe
from loramix.train.sources import data_files, gather

REDUCTION = 3
"""ASHA lets one of so many trials go on at each comparison."""
FIRST = 11.0
"""Percent of the run at which ASHA first compares."""
_COLUMNS = ("learning_rate", "r", "skip_lowest", "steps", "dev_loss", "dev_exact")


@dataclass(frozen=True, slots=True)
class Space:
    """What is searched: ranges and choices; the recipe's own values are tried first.

    Args:
        rates: lowest and highest learning rate, sampled log-uniformly.
        ranks: ranks of the adapter; alpha is changed with them, so that alpha / r stays.
        skip_lowest: shares of the lowest layers without matrices.
        trials: number of trials.
    """

    rates: tuple[float, float]
    ranks: tuple[int, ...]
    skip_lowest: tuple[float, ...]
    trials: int


@dataclass(frozen=True, slots=True)
class _Search:
    """What all trials share."""

    recipe: Recipe
    data: Path
    base: Path
    out: Path
    max_rows: int | None
    max_steps: int | None


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return a recipe with a trial's learning rate, rank and layers."""
    lora, training = recipe.lora, recipe.training
    return msgspec.structs.replace(
        recipe,
        lora=msgspec.structs.replace(
            lora,
            r=values["r"],
            lora_alpha=lora.lora_alpha * values["r"] / lora.r,
            skip_lowest=values["skip_lowest"],
        ),
        training=msgspec.structs.replace(training, learning_rate=values["learning_rate"]),
    )


def search_recipe(
    recipe: Recipe,
    data: Path,
    base: Path,
    out: Path,
    space: Space,
    *,
    max_rows: int | None = None,
    max_steps: int | None = None,
    workers: int | None = None,
    cpus_per_worker: int = 1,
) -> tuple[Path, str]:
    """Search a recipe's settings on dev; an interrupted search resumes.

    Args:
        recipe: the recipe to start from.
        data: file of the skill's rows, or directory of its sources.
        base: GGUF file or Hugging Face directory of the base.
        out: directory of the search; all paths must be visible to all machines.
        space: what is searched.
        max_rows: maximum number of training rows of a trial.
        max_steps: maximum number of optimizer steps of a trial.
        workers: largest number of trials at a time; as many as there are free CPUs if None.
        cpus_per_worker: CPUs, and threads, of a trial.

    Returns:
        The written recipe, ``OUT/NAME.toml``, and the table of all trials, best first.

    Raises:
        LoramixError: a trial failed.
    """
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search import BasicVariantGenerator

    own = {
        "learning_rate": recipe.training.learning_rate,
        "r": recipe.lora.r,
        "skip_lowest": recipe.lora.skip_lowest,
    }
    files = data_files(recipe, data) if data.is_dir() else [data]
    key = [recipe.fingerprint(), *map(sha256_file, files), base.name, repr((space, max_rows, max_steps))]
    trials = Trials(key, out / ".ray", _COLUMNS[3:], workers, cpus_per_worker)
    found = trials.run(
        _train,
        _Search(recipe, data.absolute(), base.absolute(), out.absolute(), max_rows, max_steps),
        {
            "learning_rate": tune.loguniform(*space.rates),
            "r": tune.choice(space.ranks),
            "skip_lowest": tune.choice(space.skip_lowest),
        },
        metric="dev_loss",
        mode="min",
        num_samples=space.trials,
        search_alg=BasicVariantGenerator(points_to_evaluate=[own], random_state=recipe.training.seed),
        scheduler=ASHAScheduler(
            time_attr="percent",
            grace_period=FIRST,
            max_t=100,
            reduction_factor=REDUCTION,
            stop_last_trials=False,
        ),
    )
    rows = sorted(({**one, **_rounded(one["config"])} for one in found), key=lambda one: one["dev_loss"])
    table = _table(rows, own)
    path = out / f"{recipe.name}.toml"
    write_text(
        path, _toml(with_values(recipe, rows[0]), f"the best of {len(rows)} on dev, base {base.name}", table)
    )
    return path, table


def _train(config: Mapping[str, Any], search: _Search, report: Report) -> None:
    """Train one trial in a directory of its own, which a resumed search finds again."""
    from ray import tune

    values = _rounded(config)
    recipe = with_values(search.recipe, values)
    rows = gather(recipe, search.data) if search.data.is_dir() else read_rows(search.data)
    directory = search.out / "trials" / str(tune.get_context().get_trial_id())
    last: dict[str, Any] = {}

    def forward(progress: Progress) -> None:
        percent = 100 * progress.step / min(progress.steps, search.max_steps or progress.steps)
        last.update(row(progress), steps=progress.step, percent=percent)
        if progress.note:
            report(last)

    result = train_skill(
        recipe,
        rows,
        search.base,
        directory,
        resume=True,
        max_rows=search.max_rows,
        max_steps=search.max_steps,
        report=forward,
    )
    if not last:  # an earlier attempt had reached the end
        steps = json.loads((directory / "log.jsonl").read_text().splitlines()[-1])["step"]
        best = {"dev_loss": result.dev_loss, "dev_exact": result.dev_exact}
        report({**best, "steps": steps, "percent": 100.0})


def _rounded(config: Mapping[str, Any]) -> dict[str, Any]:
    """Round the learning rate to three digits, as people write it."""
    return {
        "learning_rate": float(f"{config['learning_rate']:.3g}"),
        "r": config["r"],
        "skip_lowest": config["skip_lowest"],
    }


def _table(rows: Sequence[Mapping[str, Any]], own: Mapping[str, Any]) -> str:
    """Format the trials, best first; the first one of equal values is the recipe as it was."""
    lines = ["{:>13} {:>4} {:>11} {:>6} {:>9} {:>9}".format(*_COLUMNS)]
    for number, one in enumerate(rows):
        notes = ["this recipe"] * (number == 0) + ["as it was"] * (_rounded(own).items() <= one.items())
        lines.append(
            f"{one['learning_rate']:13g} {one['r']:4} {one['skip_lowest']:11g} {one['steps']:6} "
            f"{one['dev_loss']:9.4f} {one['dev_exact']:9.3f} {', '.join(notes)}".rstrip()
        )
    return "\n".join(lines)


def _toml(recipe: Recipe, title: str, table: str) -> str:
    """Write a recipe as TOML, under the table that justifies it."""
    comment = "".join(
        f"# {line}\n" for line in [f"Found by 'loramix train search': {title}.", *table.splitlines()]
    )
    return comment + tomli_w.dumps(_plain(msgspec.to_builtins(recipe)), multiline_strings=True)


def _plain(value: Any) -> Any:
    """Leave out what is empty: a recipe's defaults, and None, which TOML does not have."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if one not in (None, "", (), [], {})}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
