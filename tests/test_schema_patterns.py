"""Patterns of JSON Schema: what an answer may be is what another implementation of them accepts."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest
from test_schema import allows, words  # noqa: F401  (a fixture)

PATTERNS = [
    '^[^"]$',
    "^[^\\\\]$",
    '^[^"\\\\]$',
    "^[^\\n]$",
    "^.$",
    "^\\S$",
    "^\\s$",
    "^\\W$",
    "^\\D$",
    "^[\\x00-\\x7f]$",
    "^[^\\s-]$",
    "^[-\\w]$",
    "^[^\\S]$",
    "^[\\S ]$",
    '^([^"]|a)$',
    '^(?:[^"a]|\\s)$',
    "^(.|\\n)$",
    '^(?=[^"]).$',
    '^\\x41|[^"]$',
    "^[^\\W]$",
    "^[\\s\\S]$",
    "^[^\\x00-\\x1f]$",
    "^[+-.]$",
    "^\\p{L}$",
    "^[\\u00e0-\\u00ff]$",
    '[^"]',
    "^[^a-]$",
    '^\\[\\^"\\]$',
]
CHARACTERS = ['"', "\\", *"\n\t\r\b\f\x01\x1f\x7f aB_-0/~[^é٣\u00a0\x85\u2028\ufeff😀"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_never_allows_what_it_forbids(pattern: str, words: Any) -> None:  # noqa: F811
    schema = {"type": "string", "pattern": pattern}
    judge = jsonschema_rs.validator_for(schema)
    texts = [*CHARACTERS, "", '"a', "A", '[^"]']
    taken = [text for text in texts if allows(words, schema, json.dumps(text, ensure_ascii=False))]
    assert taken and all(judge.is_valid(text) for text in taken)
