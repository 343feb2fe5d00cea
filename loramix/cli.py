"""The command ``loramix``: each command parses, calls one function, prints.

stdout is the answer, stderr the rest. Imports stand inside the commands: ``--help`` loads no model code.
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
    """A click group that shows our errors as one sentence and finds the tool commands late."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error that a user can meet becomes one sentence and an exit code."""
        from loramix.commands.terminal import drop_stdout, explain

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
        """Parse the arguments; words that are not UTF-8 text are refused first."""
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


_add_commands()
