"""Chat and instruction templates: the same code in training and at run time.

A base brings its chat template as Jinja inside its GGUF, from a stranger: it is rendered in a sandbox
with bounds on its size, its loops and its time. A skill's instruction template is plain ``{input}``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from loramix.errors import InvalidArtifact, InvalidPrompt
from loramix.textfile import has_lone_surrogate

Message: TypeAlias = Mapping[str, str]
Segment: TypeAlias = tuple[str, bool]  # text, and whether special tokens in it are meant

MAX_TEMPLATE_BYTES = 64 * 1024
MAX_RENDERED_CHARACTERS = 4_000_000
_RENDER_SECONDS = 1.0
_ROLES = ("system", "user", "assistant")


def as_messages(prompt: str | Sequence[Message]) -> list[dict[str, str]]:
    """Turn a prompt or OpenAI-style messages into a checked list of messages.

    Args:
        prompt: the user's text, or messages with ``role`` (system, user, assistant) and ``content``.

    Raises:
        InvalidPrompt: empty, of an unknown role, or not ending with a user's message.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise InvalidPrompt("a prompt must be text, or a list of messages with role and content.")
    checked: list[dict[str, str]] = []
    for message in messages:
        role, content = message.get("role"), _text_of(message.get("content"))
        if role not in _ROLES or not isinstance(content, str):
            raise InvalidPrompt(
                f"a message with role {role!r} and content of type {type(content).__name__} cannot be used: "
                f"it needs a role of {', '.join(_ROLES)} and text."
            )
        checked.append({"role": role, "content": content})
    if not checked or checked[-1]["role"] != "user":
        raise InvalidPrompt("the conversation must end with a user's message; add one.")
    if not checked[-1]["content"].strip():
        raise InvalidPrompt("the prompt is empty; write what you want done, and the text to do it with.")
    whole = "".join(message["content"] for message in checked)
    if "\0" in whole:
        raise InvalidPrompt("the prompt holds a NUL character; remove it.")
    if has_lone_surrogate(whole):
        raise InvalidPrompt(
            "the prompt holds bytes that are not UTF-8 text, or half a character; remove them."
        )
    return checked


def _text_of(content: Any) -> Any:
    """The text of OpenAI-style parts; anything else as it is.

    Raises:
        InvalidPrompt: a part that is no text, named by its type.
    """
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        return content
    for part in content:
        if not isinstance(part.get("text"), str) or part.get("type", "text") not in ("text", "input_text"):
            kind = str(part.get("type") or "without a type")
            what = next((word for word in ("image", "audio", "video", "file") if word in kind), "other")
            raise InvalidPrompt(
                f"a message holds a part of type {kind[:40]!r} ({what}): the base reads text alone; leave that part "
                "out, or put what it says into words."
            )
    return "".join(part["text"] for part in content)


def fill(template: str, text: str) -> str:
    """Put ``text`` into an instruction template's ``{input}``; nothing else in it is special."""
    return template.replace("{input}", text)


class ChatTemplate:
    """A base's chat template, compiled once in the sandbox.

    Args:
        source: Jinja text, as in the GGUF key ``tokenizer.chat_template``.
        special: names that templates use, such as ``bos_token`` and ``eos_token``.

    Raises:
        InvalidArtifact: too long, or not valid Jinja.
    """

    def __init__(self, source: str, special: Mapping[str, str] | None = None) -> None:
        if len(source.encode()) > MAX_TEMPLATE_BYTES:
            raise InvalidArtifact(
                f"the chat template has {len(source.encode())} bytes; at most {MAX_TEMPLATE_BYTES} are accepted."
            )
        self._special = dict(special or {})
        self._environment = _Sandbox(trim_blocks=True, lstrip_blocks=True)
        try:
            tree = self._environment.parse(source)
            tree = _Bounds().visit(tree)
            tree.set_environment(self._environment)
            code: Any = self._environment.compile(tree)
        except (TemplateError, RecursionError) as error:
            raise InvalidArtifact(f"the chat template is not valid Jinja: {error}.") from None
        self._template = self._environment.template_class.from_code(
            self._environment, code, self._environment.make_globals(None)
        )

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Render a conversation as the text that the base was tuned on.

        Args:
            messages: checked messages, see `as_messages`.
            add_generation_prompt: end with the header of the assistant's answer.

        Raises:
            InvalidArtifact: the template fails, reaches for what it may not, or runs too long.
        """
        pieces: list[str] = []
        size = 0
        self._environment.deadline = time.monotonic() + _RENDER_SECONDS
        try:
            for piece in self._template.generate(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._special,
            ):
                pieces.append(piece)
                size += len(piece)
                self._environment.check(size)
        except (InvalidArtifact, InvalidPrompt):
            raise
        except Exception as error:  # a stranger's template may raise anything
            raise InvalidArtifact(
                f"the base's chat template failed: {type(error).__name__}: {error}"
            ) from None
        return "".join(pieces)

    def segments(self, messages: Sequence[Message], controls: Iterable[str] = ()) -> list[Segment]:
        """Split a rendered conversation so that a user's text can never become a control token.

        Args:
            messages: checked messages.
            controls: the vocabulary's control tokens as text, e.g. ``<|im_end|>``.

        Returns:
            Texts in order, each with whether its special tokens are to be parsed. One segment in the
            usual case; more only where a message contains the text of a control token.
        """
        controls = tuple(controls)
        guilty = any(token in message["content"] for token in controls for message in messages)
        if not guilty:
            return [(self.render(messages), True)]
        marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
        marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
        rest, out = self.render(marked), list[Segment]()
        for message, mark in zip(messages, marks, strict=True):
            before, found, rest = rest.partition(mark)
            if not found:
                raise InvalidPrompt(
                    "the prompt holds a control token of the base, and its template cannot quote it."
                )
            out += [(before, True), (message["content"], False)]
        return [segment for segment in [*out, (rest, True)] if segment[0]]


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a deadline that every loop checks."""

    deadline: float = float("inf")
    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters["bounded"] = self._bounded
        self.filters["joined"] = _joined
        for name in (
            "pprint",
            "center",
            "indent",
            "wordwrap",
            "urlize",
            "xmlattr",
        ):  # can make much of little
            self.filters.pop(name, None)
        self.globals["raise_exception"] = _raise

    def check(self, size: int = 0) -> None:
        if time.monotonic() > self.deadline or size > MAX_RENDERED_CHARACTERS:
            raise InvalidArtifact("the base's chat template runs too long; the base cannot be trusted.")

    def _bounded(self, items: Any) -> Iterator[Any]:
        for item in items:
            self.check()
            yield item

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" or (operator == "*" and not numbers):
            raise InvalidArtifact(
                "the base's chat template multiplies what is no number; it cannot be trusted."
            )
        if operator == "+" and not numbers and len(left) + len(right) > MAX_RENDERED_CHARACTERS:
            raise InvalidArtifact("the base's chat template builds too long a text; it cannot be trusted.")
        return super().call_binop(context, operator, left, right)


class _Bounds(NodeTransformer):
    """Makes every loop check the deadline, and every ``~`` its length."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "bounded", [], [], None, None)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(list(node.nodes)), "joined", [], [], None, None)


def _joined(items: Sequence[object]) -> str:
    pieces = [str(item) for item in items]
    if sum(map(len, pieces)) > MAX_RENDERED_CHARACTERS:
        raise InvalidArtifact("the base's chat template builds too long a text; it cannot be trusted.")
    return "".join(pieces)


def _raise(message: object) -> None:
    raise InvalidPrompt(f"the base's chat template refuses this conversation: {message}")
