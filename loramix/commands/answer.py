"""The commands ``loramix run``, ``route`` and ``chat``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from loramix.commands.options import (
    POLICY,
    answer_json,
    answer_options,
    engine_options,
    open_engine,
    read_prompt,
)

if TYPE_CHECKING:
    from loramix.runtime.router import Route


@click.command()
@click.argument("prompt", nargs=-1)
@engine_options
@answer_options
@click.option(
    "--show-route",
    is_flag=True,
    help="Show on stderr which mix answers and why, and the labels' probabilities.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def run(
    prompt: tuple[str, ...],
    pack: str,
    ctx: int,
    threads: int | None,
    show_route: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer PROMPT (words, or stdin)."""
    text = read_prompt(prompt)
    with open_engine(pack, ctx, threads) as engine:
        stream = engine.stream(text, **options)
        if show_route:
            echo_route(stream.route)
        for piece in stream:
            if not as_json:
                click.echo(piece, nl=False)
        if stream.answer is not None and as_json:
            click.echo(json.dumps(answer_json(stream.answer), ensure_ascii=False))
        elif not as_json:
            click.echo()
        if stream.answer is not None and show_route:
            for labels in filter(None, stream.answer.step_labels):
                click.echo(click.style(f"[{shares(labels)}]", dim=True), err=True)


@click.command()
@click.argument("prompt", nargs=-1)
@engine_options
@POLICY
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of bars.")
def route(
    prompt: tuple[str, ...], pack: str, ctx: int, threads: int | None, policy: str, as_json: bool
) -> None:
    """Show which mix would answer PROMPT, and why, without answering."""
    text = read_prompt(prompt)
    with open_engine(pack, ctx, threads) as engine:
        chosen = engine.route(text, policy=policy)
    if as_json:
        click.echo(json.dumps(chosen.to_json()))
        return
    width = max(map(len, chosen.probabilities), default=0)
    for name, p in sorted(chosen.probabilities.items(), key=lambda item: -item[1]):
        click.echo(f"{name:<{width}}  {'█' * round(40 * p):<40}  {p:6.1%}")
    click.echo(f"mix: {chosen.named}")
    click.echo(f"why: {chosen.reason}")
    for line in chosen.step_lines:
        click.echo(f"  {line}")
    if chosen.words:
        click.echo(f"looked at: {chosen.looked_at}")


@click.command()
@engine_options
@answer_options
@click.option("--system", help="System message.")
def chat(pack: str, ctx: int, threads: int | None, system: str | None, **options: Any) -> None:
    """Chat in the terminal; each turn is routed. /help lists the commands."""
    from loramix.commands.chat_loop import Chat
    from loramix.commands.terminal import need_stdin

    need_stdin()
    with open_engine(pack, ctx, threads) as engine:
        Chat(engine, system=system, **options).loop()


def shares(labels: Mapping[str, float]) -> str:
    """Write probabilities by label as text: ``positive 97.1%, negative 2.9%``."""
    return ", ".join(f"{label} {p:.1%}" for label, p in labels.items())


def echo_route(chosen: Route) -> None:
    """Print the mix, the reason, the words that the gate looked at, and the steps of a plan to stderr."""
    looked = f"; looked at: {chosen.looked_at}" if chosen.words else ""
    click.echo(click.style(f"[{chosen.named}] {chosen.reason}{looked}", dim=True), err=True)
    for line in chosen.step_lines:
        click.echo(click.style(f"  {line}", dim=True), err=True)
