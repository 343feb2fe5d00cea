"""The command ``loramix``: registration of all commands, and exit codes.

Answers go to stdout, everything else to stderr. Commands import what they need when they run, so that ``--help``
loads no model code.
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import click

from loramix.defaults import __version__
from loramix.errors import LoramixError
from loramix.formats.textfile import has_lone_surrogate


class Group(click.Group):
    """A click group that prints errors as one sentence and sets the exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn expected errors into one sentence and an exit code."""
        from loramix.commands.terminal import drop_stdout, explain

        try:
            result = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()  # at interpreter exit a failing flush would print a traceback
            return result
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
        except UnicodeEncodeError as error:  # a file or pack name that is not valid text
            click.echo(
                f"error: {ascii(error.object)[:80]} contains bytes that are not UTF-8; rename it.", err=True
            )
            ctx.exit(1)

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> click.Context:
        """Parse the arguments; first reject words that are not UTF-8 text."""
        from loramix.commands.terminal import prepare_streams

        prepare_streams()
        for number, word in enumerate(args, 1):
            if has_lone_surrogate(word) and not Path(word).exists():
                raise click.UsageError(
                    f"argument {number}, {ascii(word)[:60]}, is not UTF-8 text; set the terminal to UTF-8, or pipe the "
                    "text in."
                )
        return super().make_context(info_name, args, *rest, **extra)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="loramix")
def main() -> None:
    """Many LoRA skills on one small quantized base, mixed by a learned gate, on a laptop CPU."""


def _add_commands() -> None:
    from loramix.commands import (
        answer,
        bases,
        batch,
        convert,
        doctor,
        evaluate,
        explain,
        export,
        pack,
        plan,
        search,
        serve,
        skill,
        train,
    )

    for command in (
        answer.run,
        answer.route,
        answer.chat,
        batch.batch,
        explain.explain,
        bases.pull,
        bases.list_bases,
        doctor.doctor,
        plan.plan,
        pack.pack,
        skill.skill,
        train.train,
        convert.convert,
        export.export,
        evaluate.evaluate,
        serve.serve,
    ):
        main.add_command(command)
    train.train.add_command(search.train_search)


_add_commands()
