"""The command ``loramix explain``: an answer with the contribution of each skill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click

from loramix.commands.options import answer_json, answer_options, engine_options, open_engine, read_prompt

FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument("prompt", nargs=-1)
@engine_options
@answer_options
@click.option("--html", type=FILE, help="Write a self-contained page.")
@click.option("--png", type=FILE, help="Write the heat maps as a figure.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of heat maps.")
def explain(
    prompt: tuple[str, ...],
    pack: str,
    ctx: int,
    threads: int | None,
    html: Path | None,
    png: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer PROMPT, and show the contribution of each skill to each token, by layer."""
    from loramix.commands.explain_report import lines, to_html, write_png
    from loramix.paths import write_text
    from loramix.runtime.contributions import contributions

    text = read_prompt(prompt)
    with open_engine(pack, ctx, threads) as engine:
        answer = engine.generate(text, **options)
        found = contributions(engine, answer)
    if as_json:
        click.echo(json.dumps({**answer_json(answer), "contributions": found.to_json()}, ensure_ascii=False))
    else:
        looked = f"looked at: {answer.route.looked_at}\n" if answer.route.words else ""
        steps = "".join(f"  {line}\n" for line in answer.route.step_lines)
        click.echo(f"mix: {answer.route.named}\nwhy: {answer.route.reason}\n{steps}{looked}")
        click.echo("\n".join(lines(found, shutil.get_terminal_size().columns)))
    if html:
        write_text(html, to_html(text, answer, found))
        click.echo(str(html), err=True)
    if png:
        write_png(png, found)
        click.echo(str(png), err=True)
