"""A JSON schema as a client sends it → a grammar for llguidance; what cannot be enforced is refused with its path."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher

from loramix.errors import UsageError
from loramix.runtime.constraints.schema_reader import Reader
from loramix.runtime.constraints.schema_values import at, refuse

MAX_SCHEMA_BYTES = 65_536
MAX_GRAMMAR_BYTES = 262_144
MAX_LOOKED_AT = 400
WHITESPACE = r" |\n[ ]{0,20}"
"""At most once between two parts of JSON: what pretty-printing takes. A small model would go on with it."""

ESCAPES = 'nrbtf"\\'
r"""What may follow a backslash in a text; each character then has one spelling, and "\u0000" none."""


def schema_to_grammar(schema: Mapping[str, Any] | bool) -> str:
    """A grammar of answers that a JSON schema allows.

    Args:
        schema: a JSON schema; references may point into itself alone.

    Returns:
        A grammar for `loramix.runtime.constraints.schema_sampler.SchemaSampler`.

    Raises:
        UsageError: too large, no schema, or something that cannot be enforced; with the path of the field.
    """
    try:
        size = len(json.dumps(schema))
    except RecursionError:
        refuse("$", "is nested too deep")
    if size > MAX_SCHEMA_BYTES:
        raise UsageError(f"the JSON schema has {size} bytes; at most {MAX_SCHEMA_BYTES} are accepted.")
    reader = Reader(schema)
    root = reader.read(schema)
    reader.check_references()
    grammar = _grammar(root, reader.definitions)
    if len(grammar) > MAX_GRAMMAR_BYTES:
        raise UsageError("the JSON schema refers to itself too often; make it simpler.")
    if reason := _error(grammar):
        _blame(reader, reason)
    return grammar


def _grammar(node: Any, definitions: Mapping[str, Any]) -> str:
    schema = {"anyOf": [node]} if isinstance(node, bool) else dict(node)
    schema["$defs"] = definitions
    schema["x-guidance"] = {"whitespace_pattern": WHITESPACE, "json_allowed_escapes": ESCAPES}
    # without forcing, the model may write what must come next in any tokens
    return f'%llguidance {{"no_forcing": true}}\nstart: %json {json.dumps(schema)}'


def _blame(reader: Reader, reason: str) -> None:
    """Refuse the innermost field that the engine does not take."""
    for path, node in reader.nodes[:MAX_LOOKED_AT]:
        inner = _error(_grammar(node, reader.definitions))
        if not inner:
            continue
        for word in sorted(node, key=lambda word: word == "type"):  # without its type anything may be
            rest = {name: node[name] for name in node if name != word}
            if not _error(_grammar(rest, reader.definitions)):
                refuse(at(path, word), f"cannot be enforced: {inner}")
        refuse(path, f"cannot be enforced: {inner}")
    refuse("$", f"cannot be enforced: {reason}")


def _error(grammar: str) -> str:
    """What the engine says against a grammar, in one line; empty where it takes it."""
    text = LLMatcher.validate_grammar(grammar)
    if "coerce_one_of" in text:
        return "its schemas must differ in their type, or in a required constant"
    inner = re.search(r"^error: (.+)", text, re.MULTILINE)
    return inner[1] if inner else text.partition("\n")[0].rpartition("JSON schema: ")[2]
