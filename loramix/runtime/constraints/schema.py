"""Converts a client's JSON schema to a grammar for llguidance; rejects unenforceable fields with their path."""

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
"""Allowed at most once between parts of JSON, as in pretty-printing; small models would repeat it endlessly."""

ESCAPES = 'nrbtf"\\'
r"""Allowed characters after a backslash in a string; each character has one spelling, and "\u0000" has none."""


def schema_to_grammar(schema: Mapping[str, Any] | bool) -> str:
    """Convert a JSON schema to a grammar of its instances.

    Args:
        schema: a JSON schema, with internal references only.

    Returns:
        A grammar for `loramix.runtime.constraints.schema_sampler.SchemaSampler`.

    Raises:
        UsageError: too large, invalid, or not enforceable; the message has the field's path.
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
    # without forcing, the model may choose the tokenization of required text
    return f'%llguidance {{"no_forcing": true}}\nstart: %json {json.dumps(schema)}'


def _blame(reader: Reader, reason: str) -> None:
    """Raise for the innermost field that llguidance rejects."""
    for path, node in reader.nodes[:MAX_LOOKED_AT]:
        inner = _error(_grammar(node, reader.definitions))
        if not inner:
            continue
        for word in sorted(
            node, key=lambda word: word == "type"
        ):  # "type" last, because a schema without it allows any value
            rest = {name: node[name] for name in node if name != word}
            if not _error(_grammar(rest, reader.definitions)):
                if word == "allOf" and path in reader.split:
                    word = "pattern"
                refuse(at(path, word), f"cannot be enforced: {inner}")
        refuse(path, f"cannot be enforced: {inner}")
    refuse("$", f"cannot be enforced: {reason}")


def _error(grammar: str) -> str:
    """Return llguidance's error for a grammar in one line; empty if it is valid."""
    text = LLMatcher.validate_grammar(grammar)
    if "coerce_one_of" in text:
        return "its schemas must differ in their type, or in a required constant"
    inner = re.search(r"^error: (.+)", text, re.MULTILINE)
    return inner[1] if inner else text.partition("\n")[0].rpartition("JSON schema: ")[2]
