"""A Jinja sandbox for chat templates with limits on time and size.

Has the filters, extensions and globals of ``transformers.utils.chat_template_utils``, so that both render the same
text. Templates are untrusted: one that runs too long or writes too much is rejected.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from loramix.errors import InvalidArtifact, InvalidPrompt

MAX_RENDERED_CHARACTERS = 4_000_000
_RENDER_SECONDS = 1.0
_MAX_WIDTH = 1000  # maximum width that a filter pads, wraps or indents to
_MAX_BITS = 4096  # maximum size of a number
_PADDING_FILTERS = {"center", "indent", "wordwrap", "pprint", "tojson"}
_PADDED_DIRECTIVE = re.compile(r"\d{5}|\*")  # a width that can produce long text
_OTHER_FILES = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with transformers' additions and a deadline."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self._deadline = float("inf")
        self.filters["tojson"] = _to_json
        for name, function in list(self.filters.items()):
            self.filters[name] = self._limited(name, function)
        self.filters[_BOUNDED] = self._bounded
        self.filters[_JOINED] = _joined
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace

    def compiled(self, source: str) -> tuple[Any, nodes.Template]:
        """Compile a template with deadline checks; also return its original syntax tree.

        Raises:
            TemplateError: not valid Jinja.
            InvalidArtifact: the template uses something that renders differently in transformers.
        """
        written = self.parse(source)
        _refuse_unsupported(written)
        tree = _Bounds().visit(self.parse(source))
        tree.set_environment(self)
        code: Any = self.compile(tree)
        return self.template_class.from_code(self, code, self.make_globals(None)), written

    def start(self) -> None:
        """Set the deadline of one rendering, in processor time because the machine may be busy."""
        self._deadline = time.thread_time() + _RENDER_SECONDS

    def check(self, size: int = 0) -> None:
        """Reject a rendering that is past the deadline, or a text of too many characters."""
        if time.thread_time() > self._deadline or size > MAX_RENDERED_CHARACTERS:
            raise _too_long()

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function for the template within the limits of time and size."""
        self.check()
        method = getattr(obj, "__wrapped__", obj)  # Jinja wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            self.check(_growth(name, owner, [*args, *kwargs.values()]))
        return self._small(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute ``left operator right``; a result that would be too large is rejected before it is computed."""
        self.check()
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            self._small(left)
            self._small(right)
            if operator == "**" and right * max(left.bit_length(), 1) > _MAX_BITS:
                raise _too_long()
        elif operator == "*":
            count = right if isinstance(right, int) else left
            text = left if isinstance(right, int) else right
            if isinstance(count, int) and hasattr(text, "__len__"):
                self.check(len(text) * max(count, 0))
        elif operator == "%" and isinstance(left, str):
            self.check(_growth("%", left, right if isinstance(right, tuple) else [right]))
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self.check(len(left) + len(right))
        return self._small(super().call_binop(context, operator, left, right))

    def _small(self, value: Any) -> Any:
        if isinstance(value, str):
            self.check(len(value))
        elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise _too_long()
        return value

    def _bounded(self, items: Any) -> Iterator[Any]:
        for item in items:
            self.check()
            yield item

    def _limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # keeps Jinja's markers of the first argument
        def limited(*args: Any, **kwargs: Any) -> Any:
            values = [*args, *kwargs.values()]
            self.check()
            if name in _PADDING_FILTERS:
                for value in values[1:]:
                    width = value if isinstance(value, int) else len(value) if isinstance(value, str) else 0
                    if width > _MAX_WIDTH:
                        raise _too_long()
            texts = [i for i, value in enumerate(values) if isinstance(value, str)]
            if name in ("replace", "format") and texts:
                self.check(_growth(name, values[texts[0]], values[texts[0] + 1 :]))
            if name == "join" and texts:
                size = sum(len(value) for value in values if isinstance(value, Sequence | Mapping))
                self.check(len(values[texts[-1]]) * size)
            return self._small(function(*args, **kwargs))

        return limited


_BOUNDED, _JOINED = " bounded", " joined"  # names that no template can use


class _Bounds(NodeTransformer):
    """Adds a deadline check to every loop, and a length check to every ``~``."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, _BOUNDED, [], [], None, None)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(list(node.nodes)), _JOINED, [], [], None, None)


class _GenerationTag(Extension):
    """``{% generation %}``: marks answers for training masks; the text inside is printed unchanged."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's type

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_print"), [], [], body).set_lineno(line)

    def _print(self, caller: Macro) -> str:
        return caller()


class _Dict:
    """``dict`` without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """Jinja's namespace without names that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works, as in Jinja
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the namespace attribute {name[:40]!r} begins with an underscore")


def _refuse_unsupported(tree: nodes.Template) -> None:
    """Reject templates with random text or other files, which would render differently in transformers."""
    found = [node.name for node in tree.find_all(nodes.Name) if node.name == "lipsum"]
    found += [node.name for node in tree.find_all(nodes.Filter) if node.name == "random"]
    found += [type(node).__name__.lower() for node in tree.find_all(_OTHER_FILES)]
    if found:
        raise InvalidArtifact(
            f"the chat template uses {found[0]!r}, which is random or reads another file; use another template."
        )


def _growth(name: str, text: str, values: Sequence[Any]) -> int:
    """Return an upper bound of the length that a string method can produce."""
    sizes = [len(value) for value in values if isinstance(value, str | list | tuple | dict)]
    numbers = [value for value in values if isinstance(value, int)]
    longest, number = max(sizes, default=0), max(numbers, default=0)
    if name == "replace" and len(values) > 1 and isinstance(values[0], str) and isinstance(values[1], str):
        return len(text) + text.count(values[0]) * len(values[1])
    if name == "join":
        return len(text) * longest
    if name in ("format", "format_map", "%"):
        directives = re.findall(r"%[^a-zA-Z%]*|\{[^}]*", text)
        if any(_PADDED_DIRECTIVE.search(directive) for directive in directives):
            return MAX_RENDERED_CHARACTERS + 1
        return len(text) + len(directives) * max(longest, number)
    if name == "expandtabs":
        return len(text) + text.count("\t") * number
    if name in ("center", "ljust", "rjust", "zfill"):
        return number
    return len(text) * longest if name == "translate" else 0


def _joined(items: Sequence[object]) -> str:
    pieces = [str(item) for item in items]
    if sum(map(len, pieces)) > MAX_RENDERED_CHARACTERS:
        raise _too_long()
    return "".join(pieces)


def _to_json(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Format JSON without Jinja's HTML escapes; the arguments are those of transformers."""
    if separators is not None and any(len(separator) > _MAX_WIDTH for separator in separators):
        raise _too_long()
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    if re.search(r"%[^a-zA-Z%]*\d{3}", format) or len(format) > _MAX_WIDTH:
        raise _too_long()
    return datetime.now().strftime(format)


def _raise_exception(message: object) -> NoReturn:
    raise InvalidPrompt(f"the base's chat template rejects this conversation: {message}")


def _too_long() -> InvalidArtifact:
    return InvalidArtifact(
        "the base's chat template runs too long or produces too much text; get the base from another source."
    )
