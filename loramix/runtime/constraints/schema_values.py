"""Validates and rewrites keywords of a JSON schema that hold values rather than schemas."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NoReturn

from loramix.errors import UsageError
from loramix.runtime.constraints.schema_strings import as_patterns

MAX_COUNT = 10_000
MAX_NUMBER = 9_000_000_000_000_000_000  # the engine computes with 64 bits
MAX_MULTIPLE = 9_999  # llguidance has a state per digit: a million take seconds
MAX_VALUE_DEPTH = 16
TYPES = ("null", "boolean", "object", "array", "number", "integer", "string")
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
LIMITS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
VALUES = (*COUNTS, *LIMITS, "type", "enum", "const", "pattern", "format", "multipleOf")


def refuse(path: str, what: str) -> NoReturn:
    """Raise the error that names a field of the schema."""
    raise UsageError(f"the JSON schema's {path} {what}; change or remove it.")


def at(path: str, *names: str | int) -> str:
    """The path of a field inside another."""
    for name in names:
        plain = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_$-]+", name)
        path += f".{name}" if plain else f"[{json.dumps(name)}]"
    return path


def short(value: Any) -> str:
    """A value for a message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_values(node: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Read a schema's keywords of `VALUES` in llguidance's form.

    Args:
        node: a schema.
        path: its path in the root schema.

    Raises:
        UsageError: a keyword cannot be enforced; the message has its path.
    """
    out: dict[str, Any] = {}
    if "type" in node:
        out["type"] = _types(node["type"], at(path, "type"))
    if "enum" in node:
        if not isinstance(node["enum"], list) or not node["enum"]:
            refuse(at(path, "enum"), "must be a list of values")
        out["enum"] = [_value(value, at(path, "enum", i)) for i, value in enumerate(node["enum"])]
    if "const" in node:
        out["const"] = _value(node["const"], at(path, "const"))
    for word in COUNTS:
        if word in node:
            out[word] = _count(node[word], at(path, word))
    kinds = {out["type"]} if isinstance(out.get("type"), str) else set(out.get("type", TYPES))
    if "string" in kinds:  # pattern and format are ignored for other types
        _strings(node, path, out)
    _numbers(node, path, out)
    if kinds & {"integer", "number"} == {"integer"} and not {*LIMITS, "enum", "const"} & set(node):
        out["minimum"], out["maximum"] = -MAX_NUMBER, MAX_NUMBER  # bounds the number of digits
    return out


def encodable(text: Any, path: str) -> str:
    """Check that text can be encoded as UTF-8."""
    try:
        str(text).encode()
    except UnicodeEncodeError:
        refuse(path, "has half of a surrogate pair, which no answer can have")
    return str(text)


def writable(text: Any, path: str) -> str:
    """Check that text has no control characters without a short JSON escape."""
    if re.search(r"[\x00-\x07\x0b\x0e-\x1f\x7f]", str(text)):
        refuse(path, "has a control character, which no answer can have")
    return encodable(text, path)


def _types(value: Any, path: str) -> Any:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name in TYPES for name in names):
        refuse(path, f"is {short(value)}; there are {', '.join(TYPES)}")
    return value


def _value(value: Any, path: str, depth: int = 0) -> Any:
    """Check a constant value."""
    if depth > MAX_VALUE_DEPTH:
        refuse(path, f"is nested deeper than {MAX_VALUE_DEPTH} levels")
    if isinstance(value, str):
        writable(value, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _number(value, path)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _value(item, at(path, i), depth + 1)
    elif isinstance(value, dict):
        for name, item in value.items():
            _value(item, at(path, writable(name, path)), depth + 1)
    return value


def _number(value: Any, path: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:
        refuse(path, f"is {short(value)}; it must be a number from {-MAX_NUMBER} to {MAX_NUMBER}")
    return value


def _count(value: Any, path: str) -> int:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not whole or value != int(value) or not 0 <= value <= MAX_COUNT:
        refuse(path, f"is {short(value)}; it must be a whole number from 0 to {MAX_COUNT}")
    return int(value)


def _text(node: Mapping[str, Any], word: str, path: str) -> str | None:
    if word not in node:
        return None
    if not isinstance(node[word], str):
        refuse(at(path, word), f"is {short(node[word])}; it must be text")
    return encodable(node[word], at(path, word))


def _strings(node: Mapping[str, Any], path: str, out: dict[str, Any]) -> None:
    """Read ``pattern`` and ``format``."""
    pattern, format_ = _text(node, "pattern", path), _text(node, "format", path)
    if format_ == "regex":
        refuse(at(path, "format"), "cannot be enforced")
    try:
        patterns = as_patterns(pattern, format_)
    except ValueError as error:
        refuse(at(path, "pattern"), f"cannot be enforced: {error}")
    if len(patterns) == 1:
        out["pattern"] = patterns[0]
    elif patterns:
        out["allOf"] = [{"pattern": text} for text in patterns]


def _numbers(node: Mapping[str, Any], path: str, out: dict[str, Any]) -> None:
    """Read numeric limits, including the syntax of draft 4, and ``multipleOf``."""
    for word in LIMITS:
        if word in node and not (word.startswith("exclusive") and isinstance(node[word], bool)):
            out[word] = _number(node[word], at(path, word))
    for exclusive, word in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if node.get(exclusive) is True and word in out:
            out[exclusive] = out.pop(word)
    if "multipleOf" in node:
        step = _number(node["multipleOf"], at(path, "multipleOf"))
        digits = Decimal(str(step)).normalize().as_tuple().digits
        if step <= 0 or int("".join(map(str, digits))) > MAX_MULTIPLE:
            refuse(at(path, "multipleOf"), f"is {step}; it must be above 0 and have at most four digits")
        out["multipleOf"] = step
