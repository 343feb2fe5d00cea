"""Answers under a grammar are what their schema says, even from a model of random numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loramix.errors import UsageError

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "mood": {"enum": ["good", "bad"]},
        "score": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["mood", "score", "tags"],
}


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 1.5, "seed": 3}, {"mix": "sentiment", "top_logprobs": 1}]
)
def test_an_answer_follows_its_schema(tiny_engine: Any, how: dict[str, Any]) -> None:
    answer = tiny_engine.generate("a lazy dog", max_tokens=200, json_schema=SCHEMA, **{"mix": "base", **how})
    found = json.loads(answer.text)
    assert set(found) == {"mood", "score", "tags"} and answer.finish_reason == "stop"
    assert found["mood"] in ("good", "bad") and isinstance(found["score"], int)
    assert len(found["tags"]) <= 2 and all(isinstance(tag, bool) for tag in found["tags"])


@pytest.mark.parametrize(
    "how", [{"grammar": 'root ::= "yes" | "no"'}, {"json_schema": {"enum": ["yes", "no"]}}]
)
def test_one_mix_alone_answers_under_a_grammar(
    how: dict[str, Any], tiny_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    gate = type(tiny_engine.router.gate)
    monkeypatch.setattr(gate, "probabilities", lambda self, features: np.array([0.5, 0.45, 0.05]))
    assert tiny_engine.route("a dog", policy="each").then
    stream = tiny_engine.stream("a dog", policy="each", **how)
    assert "".join(stream).strip('"') in ("yes", "no") and not stream.route.then


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "minLength": 10**9},
        {"type": "array", "items": {}, "minItems": True},
        {"type": "string", "pattern": "^a{1000000}$"},
        {"$ref": "https://example.com/schema.json"},
        {"$ref": "file:///etc/passwd"},
        {"$ref": "#/nowhere"},
        {"type": "nonsense"},
        {"type": "object", "properties": 3},
        {"enum": ["x" * 70_000]},
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    ],
)
def test_a_schema_that_cannot_be_used_is_refused(tiny_engine: Any, schema: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        tiny_engine.stream("a dog", json_schema=schema)
