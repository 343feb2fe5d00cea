"""The command ``loramix train search``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from loramix.commands.fetch_base import fetch_base
from loramix.commands.options import PATH, training_extra
from loramix.commands.ray_options import need_flag, ray_options
from loramix.defaults import DEFAULT_PACK, MAX_RANK
from loramix.errors import UsageError


@click.command("search")
@click.argument("recipe")
@click.option("--data", type=PATH, required=True, help="As for 'loramix train skill'.")
@click.option("--base", default=DEFAULT_PACK, show_default=True, help="Base: name, GGUF or HF directory.")
@click.option("--out", type=PATH, help="Directory of the search; by default runs/search-RECIPE.")
@click.option("--trials", type=click.IntRange(1), default=16, show_default=True, help="Number of trials.")
@click.option(
    "--rate",
    "rates",
    type=click.FloatRange(0, 1, min_open=True),
    nargs=2,
    help="Lowest and highest learning rate; by default a quarter of the recipe's and four times it.",
)
@click.option(
    "--rank",
    "ranks",
    type=click.IntRange(1, MAX_RANK),
    multiple=True,
    help="Rank; repeatable; by default 8, 16, 32.",
)
@click.option(
    "--skip-lowest",
    type=click.FloatRange(0, 1, max_open=True),
    multiple=True,
    help="Share of the lowest layers without matrices; repeatable; by default 0, 0.33, 0.5.",
)
@click.option("--max-rows", type=click.IntRange(1), help="Maximum training rows of a trial.")
@click.option("--max-steps", type=click.IntRange(1), help="Maximum steps of a trial.")
@ray_options(
    "Run the trials on a Ray cluster; needed, since the search is Ray Tune's.",
    "Largest number of trials at a time; by default as many as the cluster's CPUs hold.",
)
def train_search(
    recipe: str,
    data: Path,
    base: str,
    out: Path | None,
    trials: int,
    rates: tuple[float, float] | None,
    ranks: tuple[int, ...],
    skip_lowest: tuple[float, ...],
    max_rows: int | None,
    max_steps: int | None,
    ray: bool,
    address: str | None,
    **cluster: Any,
) -> None:
    """Search learning rate, rank and layers of RECIPE on dev; write the best recipe with the table of trials.

    After an interruption, the same command resumes.
    """
    from loramix.models import bases
    from loramix.train.recipe import recipe_for

    if not ray:
        raise UsageError("the search runs on a Ray cluster, which may be this machine: add --ray.")
    loaded = recipe_for(recipe, base)
    rate = loaded.training.learning_rate
    if not Path(base).is_dir():
        fetch_base(base)
    base_path = Path(base) if Path(base).is_dir() else bases.resolve(base)
    with training_extra():
        from loramix.cluster.search import Space, search_recipe
        from loramix.cluster.session import pool_size, session

        with session(address) as started_here:
            pool_size(None, cluster.get("cpus_per_worker") or 1, 0, started_here)
            path, table = search_recipe(
                loaded,
                data,
                base_path,
                out or Path("runs") / f"search-{loaded.name}",
                Space(
                    rates or (rate / 4, rate * 4),
                    ranks or (8, 16, 32),
                    skip_lowest or (0.0, 0.33, 0.5),
                    trials,
                ),
                max_rows=max_rows,
                max_steps=max_steps,
                **need_flag(ray, **cluster),
            )
    click.echo(table, err=True)
    click.echo(str(path))
