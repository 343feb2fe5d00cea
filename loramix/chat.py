"""The terminal chat: several turns, each routed, with commands that begin with ``/``."""

from __future__ import annotations

from typing import Any

import click

from loramix.errors import LoramixError
from loramix.models.mixing import POLICIES, Mix
from loramix.runtime.engine import Engine
from loramix.runtime.router import DEFAULT, Route

HELP = """\
/skill NAME     answer with this skill until /policy is given
/mix a=1,b=0.5  answer with this mix
/policy NAME    let the gate choose again: top1, blend, each, token; or base
/why            why the last answer came from the mix it did
/history        the conversation so far
/reset          begin anew
/quit           leave (also Ctrl-D); Ctrl-C stops an answer"""


class Chat:
    """A conversation with an engine.

    Args:
        engine: answers.
        system: system message, if any.
        policy: ``top1``, ``blend``, ``each``, ``token`` or ``base``.
        mix: a fixed mix instead of the gate.
        **options: as `Engine.stream` takes them.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        policy: str = DEFAULT,
        mix: str | None = None,
        **options: Any,
    ) -> None:
        self.engine, self.policy, self.mix, self.options = engine, policy, mix, options
        self.system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = []
        self.last: Route | None = None

    def loop(self) -> None:
        """Read lines until the end of input; what is wrong with one does not end the chat."""
        _enable_line_editing()
        click.echo(f"{self.engine.pack.name}: /help lists commands, Ctrl-D leaves", err=True)
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                click.echo(err=True)
                return
            except KeyboardInterrupt:
                click.echo(err=True)
                continue
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self.command(line)
                elif line:
                    self.turn(line)
            except LoramixError as error:
                click.echo(f"error: {error}", err=True)

    def turn(self, text: str) -> None:
        """Answer one message; Ctrl-C keeps what was said so far."""
        asked = [*self.messages, {"role": "user", "content": text}]
        said = ""
        stream = self.engine.stream([*self.system, *asked], policy=self.policy, mix=self.mix, **self.options)
        self.last = stream.route
        click.echo(click.style(f"[{self.last.named}] ", dim=True), nl=False, err=True)
        try:
            for piece in stream:
                said += piece
                click.echo(piece, nl=False)
        except KeyboardInterrupt:
            stream.close()
            click.echo(" …", nl=False, err=True)
        click.echo()
        self.messages = [*asked, {"role": "assistant", "content": said}]

    def command(self, line: str) -> None:
        """Carry out a line that begins with ``/``."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/skill":
            self.engine.pack.skill(argument)
            self.mix = argument
        elif name == "/mix":
            mix = Mix.parse(argument)
            for skill in mix.scales:
                self.engine.pack.skill(skill)
            self.mix = str(mix)
        elif name == "/policy" and argument in POLICIES:
            self.policy, self.mix = argument, None
        elif name == "/why":
            self._why()
        elif name == "/history":
            for message in self.messages:
                click.echo(f"{message['role']}: {message['content']}")
        elif name == "/reset":
            self.messages, self.last = [], None
        else:
            click.echo(HELP, err=True)

    def _why(self) -> None:
        if self.last is None:
            click.echo("nothing has been answered yet", err=True)
            return
        for skill, p in sorted(self.last.probabilities.items(), key=lambda item: -item[1]):
            click.echo(f"  {skill}: {p:.1%}")
        click.echo(f"mix {self.last.named}: {self.last.reason}")


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401  # importing it gives input() editing and history
    except ImportError:
        pass
