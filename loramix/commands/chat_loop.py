"""The terminal chat: a routed conversation, with commands that start with ``/``."""

from __future__ import annotations

from typing import Any

import click

from loramix.commands.chat_input import enable_line_editing, read_message
from loramix.defaults import DEFAULT_POLICY, POLICIES
from loramix.errors import InvalidPrompt, LoramixError
from loramix.models.mixing import Mix
from loramix.runtime.engine import Engine
from loramix.runtime.router import Route

HELP = f'''\
"""             begins and ends a message of several lines
/skill NAME     answer with this skill until /policy is given
/mix a=1,b=0.5  answer with this mix
/policy NAME    let the gate choose again, or the bare base: {", ".join(POLICIES)}
/why            why the last answer came from the mix it did
/history        the conversation so far
/reset          forget the conversation
/quit           leave (also Ctrl-D); Ctrl-C stops an answer'''

ROOM = 256
"""Tokens of the context reserved for an answer; at most a quarter of the context."""


class Chat:
    """A conversation with an engine.

    Args:
        engine: engine that answers.
        system: system message, if any.
        policy: one of `POLICIES`.
        mix: fixed mix instead of the gate's choice.
        **options: options of `Engine.stream`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None = None,
        policy: str = DEFAULT_POLICY,
        mix: str | None = None,
        **options: Any,
    ) -> None:
        self.engine, self.policy, self.mix, self.options = engine, policy, mix, options
        self.system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = []
        self.last: Route | None = None
        self._full = False
        room = options.get("max_tokens") or ROOM
        self._room = min(room, engine.n_ctx // 4)

    def loop(self) -> None:
        """Read messages and commands until the end of input; errors are printed and do not end the chat."""
        enable_line_editing()
        click.echo(f"{self.engine.pack.name}: /help lists commands, Ctrl-D leaves", err=True)
        while True:
            try:
                line, plain = read_message()
            except EOFError:
                click.echo(err=True)
                return
            except KeyboardInterrupt:
                click.echo(err=True)
                continue
            if plain and line in ("/quit", "/exit"):
                return
            try:
                if plain and line.startswith("/"):
                    self.command(line)
                elif line:
                    self.turn(line)
            except LoramixError as error:
                click.echo(f"error: {error}", err=True)

    def turn(self, text: str) -> None:
        """Answer one message; Ctrl-C stops the answer and keeps the partial output."""
        messages = self._fitting(text)
        answer = ""
        stream = self.engine.stream(
            [*self.system, *messages], policy=self.policy, mix=self.mix, **self.options
        )
        self.last = stream.route
        click.echo(click.style(f"[{self.last.named}] ", dim=True), nl=False, err=True)
        try:
            for piece in stream:
                answer += piece
                click.echo(piece, nl=False)
        except KeyboardInterrupt:
            stream.close()
            click.echo(" …", nl=False, err=True)
        click.echo()
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _fitting(self, text: str) -> list[dict[str, str]]:
        """Append a message to the conversation and drop the oldest turns until it fits the context.

        Raises:
            InvalidPrompt: the message alone is too long; the conversation is unchanged.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        limit = self.engine.n_ctx - self._room
        while (count := self.engine.count_tokens([*self.system, *messages])) > limit and len(messages) > 1:
            messages = messages[2:]
        if count >= self.engine.n_ctx:
            including = " with the system message" if self.system else ""
            raise InvalidPrompt(
                f"this message has {count} tokens{including}, and the context holds {self.engine.n_ctx}: shorten it, "
                f"or begin the chat with a larger --ctx (the base reads at most {self.engine.model.n_ctx_train}). The "
                "earlier turns are kept; /reset forgets them."
            )
        if len(messages) <= len(self.messages) and not self._full:
            self._full = True
            click.echo(
                f"the context of {self.engine.n_ctx} tokens is full: the oldest turns are forgotten from now on "
                "(/reset forgets all of them; --ctx sets the size)",
                err=True,
            )
        return messages

    def command(self, line: str) -> None:
        """Run a command line that starts with ``/``."""
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
            self.messages, self.last, self._full = [], None, False
        else:
            if name != "/help" and name not in HELP.split():
                click.echo(
                    f'{name[:40]} is no command; put a message that begins with / between """.', err=True
                )
            click.echo(HELP, err=True)

    def _why(self) -> None:
        if self.last is None:
            click.echo("nothing has been answered yet", err=True)
            return
        for skill, p in sorted(self.last.probabilities.items(), key=lambda item: -item[1]):
            click.echo(f"  {skill}: {p:.1%}")
        click.echo(f"mix {self.last.named}: {self.last.reason}")
        for line in self.last.step_lines:
            click.echo(f"  {line}")
        if self.last.words:
            click.echo(f"looked at: {self.last.looked_at}")
