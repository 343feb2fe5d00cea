"""The command ``loramix``: each command parses, calls one function, prints.

stdout is the answer, stderr the rest. Imports stand inside the commands: ``--help`` loads no model code.
"""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import loramix
from loramix.cli_base import fetch_base_of
from loramix.errors import LoramixError
from loramix.textfile import has_lone_surrogate

if TYPE_CHECKING:
    from loramix.runtime.engine import Engine
    from loramix.runtime.router import Route
    from loramix.runtime.stream import Answer

POLICIES = ("top1", "blend", "each", "token", "base")  # those of models.mixing, which would load NumPy
policy_option = click.option("--policy", type=click.Choice(POLICIES), default="each", show_default=True)


class Group(click.Group):
    """A click group that shows our errors as one sentence and finds the tool commands late."""

    def invoke(self, ctx: click.Context) -> Any:
        from loramix.terminal import drop_stdout, explain

        try:
            found = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()  # what fails here would be a traceback of the interpreter's at its end
            return found
        except LoramixError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(130)
        except BrokenPipeError:
            drop_stdout()
            ctx.exit(0)
        except OSError as error:
            click.echo(f"error: {explain(error)}", err=True)
            if sys.stdout is not None and error.errno in (errno.ENOSPC, errno.EIO):
                drop_stdout()
            ctx.exit(1)
        except UnicodeEncodeError as error:  # a file's or a pack's name that is no text
            click.echo(
                f"error: {ascii(error.object)[:80]} holds bytes that are not UTF-8; rename it.", err=True
            )
            ctx.exit(1)

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> click.Context:
        from loramix.terminal import prepare_streams

        prepare_streams()
        for number, word in enumerate(args, 1):
            if has_lone_surrogate(word) and not Path(word).exists():
                raise click.UsageError(
                    f"argument {number}, {ascii(word)[:60]}, is not UTF-8 text; set the terminal to UTF-8, or pipe the "
                    "text in."
                )
        return super().make_context(info_name, args, *rest, **extra)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(loramix.__version__, prog_name="loramix")
def main() -> None:
    """Many LoRA skills on one small quantized base, mixed by a learned gate, on a laptop CPU."""


def engine_options(command: Any) -> Any:
    """Options of every command that opens a pack."""
    for option in (
        click.option(
            "--threads", type=click.IntRange(1, 1024), help="Threads; by default the cores we may use."
        ),
        click.option(
            "--ctx", type=click.IntRange(64), default=2048, show_default=True, help="Context in tokens."
        ),
        click.option(
            "--pack", "-p", default=loramix.DEFAULT, show_default=True, help="Pack: name or directory."
        ),
    ):
        command = option(command)
    return command


def answer_options(command: Any) -> Any:
    """Options of every command that answers."""
    for option in (
        click.option("--stop", multiple=True, help="Text that ends the answer; may be given again."),
        click.option("--seed", type=click.IntRange(0), help="Seed of the random draws."),
        click.option("--repeat-penalty", type=float, default=1.0, show_default=True),
        click.option("--min-p", type=float, default=0.0, show_default=True),
        click.option("--top-k", type=int, default=0, show_default=True, help="0 keeps all tokens."),
        click.option("--top-p", type=float, default=1.0, show_default=True),
        click.option("--temperature", "-t", type=float, default=0.0, show_default=True, help="0 is greedy."),
        click.option(
            "--max-tokens", "-n", type=click.IntRange(1), help="Longest answer; by default the skill's."
        ),
        click.option(
            "--mix", "-m", help="Fixed mix instead of the gate: 'sentiment=0.7,summarize=0.3', or 'base'."
        ),
        policy_option,
    ):
        command = option(command)
    return command


def open_engine(pack: str, ctx: int, threads: int | None) -> Engine:
    """The engine of a pack; a base that is missing is fetched where the user wants that."""
    fetch_base_of(pack)
    from loramix.runtime.engine import Engine

    return Engine.open(pack, n_ctx=ctx, n_threads=threads)


def read_prompt(prompt: tuple[str, ...]) -> str:
    """The prompt's words, or stdin where it is ``-`` or absent.

    Raises:
        UsageError: stdin is closed, or no text.
    """
    from loramix.terminal import read_stdin

    return " ".join(prompt) if prompt and prompt != ("-",) else read_stdin()


@main.command()
@click.argument("prompt", nargs=-1)
@engine_options
@answer_options
@click.option("--show-route", is_flag=True, help="Show on stderr which mix answers, and why.")
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


@main.command()
@click.argument("prompt", nargs=-1)
@engine_options
@policy_option
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


@main.command()
@engine_options
@answer_options
@click.option("--system", help="System message.")
def chat(pack: str, ctx: int, threads: int | None, system: str | None, **options: Any) -> None:
    """Talk; each turn is routed. /help lists what can be typed."""
    from loramix.chat import Chat
    from loramix.terminal import need_stdin

    need_stdin()
    with open_engine(pack, ctx, threads) as engine:
        Chat(engine, system=system, **options).loop()


def echo_route(chosen: Route) -> None:
    """Mix and reason, on stderr."""
    click.echo(click.style(f"[{chosen.named}] {chosen.reason}", dim=True), err=True)


def answer_json(answer: Answer) -> dict[str, Any]:
    """An answer as a JSON object; where the mix changed on the way, with each token's."""
    moved = {"mixes": [mix.to_json() for mix in answer.mixes]} if len(set(answer.mixes)) > 1 else {}
    return {
        "text": answer.text,
        "route": answer.route.to_json(),
        **moved,
        "usage": answer.usage,
        "timings": {name: round(seconds, 4) for name, seconds in answer.timings.items()},
        "finish_reason": answer.finish_reason,
    }


@main.command()
@click.argument("name")
@click.option("--quant", default="", help="Quantization where there are several, e.g. Q4_0.")
@click.option("--revision", default="", help="Branch, tag or commit on the hub.")
@click.option("--sha256", default="", help="What the file must be.")
def pull(name: str, **options: str) -> None:
    """Fetch the base NAME (see 'loramix bases'), or OWNER/REPO[:FILE] of the Hugging Face hub."""
    from loramix.models import bases

    click.echo(str(bases.pull(name, **options)))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="A JSON list instead of lines.")
def doctor(as_json: bool) -> None:
    """Check this machine, the build, the base and the pack, and say how to mend what is wrong."""
    from loramix.runtime.doctor import report, to_json

    checks = report()
    if as_json:
        click.echo(to_json(checks))
    else:
        marks = {"ok": ("ok  ", "green"), "warn": ("note", "yellow"), "fail": ("FAIL", "red")}
        for check in checks:
            mark, colour = marks[check.status]
            click.echo(f"{click.style(mark, fg=colour)}  {check.name}: {check.detail}")
            if check.mend and check.status != "ok":
                click.echo(f"      → {check.mend}")
    if any(check.status == "fail" for check in checks):
        raise SystemExit(1)


def _add_tools() -> None:
    from loramix import (
        cli_bases,
        cli_batch,
        cli_convert,
        cli_eval,
        cli_explain,
        cli_export,
        cli_pack,
        cli_plan,
        cli_serve,
        cli_skill,
        cli_train,
    )

    main.add_command(cli_bases.list_bases)
    main.add_command(cli_train.train)
    main.add_command(cli_convert.convert)
    main.add_command(cli_export.export)
    main.add_command(cli_pack.pack)
    main.add_command(cli_skill.skill)
    main.add_command(cli_serve.serve)
    main.add_command(cli_eval.evaluate)
    main.add_command(cli_plan.plan)
    main.add_command(cli_explain.explain)
    main.add_command(cli_batch.batch)


_add_tools()
