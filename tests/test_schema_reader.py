"""What a schema's words become: texts that an answer may and may not be, and refusals that name the field."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_tiny import write_sentencepiece
from test_schema import allows, words  # noqa: F401  (a fixture)

from loramix.errors import UsageError
from loramix.runtime.constraints.schema import schema_to_grammar

TEXT = {"type": "string"}
ALLOWED: list[tuple[Any, list[str], list[str]]] = [
    (
        TEXT,
        ['"a\\"b\\\\c\\n"', '"é😀"', '""'],
        ['"a\nb"', '"\x01"', '"\\u0041"', '"\\ud800"', '"\\x"', ' "a"', '"a" '],
    ),
    (
        {"pattern": r"^\d{3}-\d{4}$", "type": "string"},
        ['"123-4567"'],
        ['"123-456"', '"x123-4567"', '"١٢٣-4567"'],
    ),
    ({"pattern": "b", "type": "string"}, ['"abc"', '"b"'], ['"ac"']),
    ({"pattern": '^["\\\\]$', "type": "string"}, ['"\\""', '"\\\\"'], ['"""', '"a"']),
    ({"pattern": r"^[^\"]+$", "type": "string"}, ['"ab\\\\"'], ['"a\\"b"']),
    ({"pattern": r"^(?=.*\d)(?=.*[a-z]).{3}$", "type": "string"}, ['"a1b"'], ['"abc"', '"123"', '"a1"']),
    (
        {
            "type": "object",
            "properties": {"minLength": {"type": "integer"}, "$ref": TEXT},
            "required": ["$ref"],
        },
        ['{"minLength":3,"$ref":"a"}', '{"$ref":""}'],
        ['{"minLength":"a","$ref":"a"}', "{}", '{"$ref":"a","x":1}'],
    ),
    (
        {"type": "object", "properties": {'a"\\\n': {}}, "required": ['a"\\\n']},
        ['{"a\\"\\\\\\n":[1,{"b":null}]}'],
        ['{"a":1}'],
    ),
    (
        {"type": "object", "properties": {"a": {}}, "additionalProperties": True},
        ['{"a":1,"b":2}', '{"b":2}'],
        [],
    ),
    ({"type": "object"}, ["{}", '{"a":{"b":[]}}'], ["[]", "3", "{'a':1}"]),
    (
        {"type": "object", "patternProperties": {"^x": {"type": "integer"}}},
        ['{"x1":1}', "{}"],
        ['{"x1":"a"}', '{"y":1}'],
    ),
    (
        {
            "type": "object",
            "propertyNames": {"enum": ["a", "b"]},
            "additionalProperties": {"type": "integer"},
        },
        ['{"a":1}', '{"b":2}'],
        ['{"c":1}', '{"a":"x"}'],
    ),
    ({"type": "object", "propertyNames": {"minLength": 2}}, ['{"ab":1}'], ['{"a":1}', '{"":1}']),
    (
        {"type": "array", "items": [TEXT, {"type": "integer"}], "additionalItems": False},
        ['["a",1]'],
        ['["a",1,2]', "[1]"],
    ),
    (
        {"type": "array", "prefixItems": [TEXT], "items": {"type": "integer"}, "minItems": 2},
        ['["a",1,2]'],
        ['["a"]'],
    ),
    ({"type": "integer", "minimum": 3, "exclusiveMaximum": 6}, ["3", "5"], ["2", "6", "3.5", "03"]),
    ({"type": "number", "minimum": 3, "exclusiveMinimum": True}, ["3.5", "4"], ["3", "2.9"]),
    ({"type": "integer", "multipleOf": 7}, ["0", "21"], ["22"]),
    ({"type": "number"}, ["1.5", "-3e8", "0"], ["01", "1.", "+1", ".5", "NaN", "Infinity"]),
    (
        {"enum": ["a", 1, None, True, [1], {"k": "v"}]},
        ['"a"', "1", "null", "true", "[1]", '{"k":"v"}'],
        ['"1"', "false"],
    ),
    ({"const": 'q"\\\n'}, ['"q\\"\\\\\\n"'], ['"q"']),
    ({"type": ["string", "null"]}, ['"a"', "null"], ["1"]),
    ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, ["1", "null"], ['"a"', "1.5"]),
    ({"oneOf": [{"type": "integer"}, TEXT]}, ["1", '"a"'], ["null"]),
    (
        {
            "allOf": [
                {"type": "object", "properties": {"a": TEXT}, "required": ["a"]},
                {"type": "object", "properties": {"b": TEXT}, "required": ["b"]},
            ]
        },
        ['{"a":"","b":""}'],
        ['{"a":""}', '{"b":""}'],
    ),
    ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2023-02-29"', '"2024-02-30"', '"24-01-01"']),
    (
        {"type": "string", "format": "date-time"},
        ['"2024-02-29T10:00:00Z"'],
        ['"2024-02-29 10:00:00"', '"2024-02-29T24:00:00Z"'],
    ),
    ({"type": "string", "format": "email"}, ['"a.b@c.de"'], ['"a..b@c.de"', '"a@b"', '"@b.de"']),
    ({"type": "string", "format": "password"}, ['"x"'], []),
    ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "integer"}}}, ["1"], ['"a"']),
    (
        {"$id": "https://x.example/s", "$ref": "https://x.example/s#/$defs/a", "$defs": {"a": TEXT}},
        ['"a"'],
        ["1"],
    ),
    (
        {"type": "object", "properties": {"n": {"$ref": "#"}, "v": {"type": "integer"}}, "required": ["v"]},
        ['{"n":{"n":{"v":1},"v":2},"v":3}'],
        ['{"n":{},"v":1}'],
    ),
    (
        {"type": "array", "items": {"type": "integer"}},
        ["[1, 2]", "[\n  1,\n  2\n]"],
        ["[1,  2]", "[\n\n1]", "[\t1]"],
    ),
    ({"x-guidance": {"lenient": True}, "type": "string", "maxLength": 1}, ['"a"'], ['"ab"']),
    (True, ["1", '{"a":[]}'], ["a"]),
]


@pytest.mark.parametrize("number", range(len(ALLOWED)))
def test_texts_that_an_answer_may_be(number: int, words: Any) -> None:  # noqa: F811
    schema, good, bad = ALLOWED[number]
    for text in good:
        assert allows(words, schema, text), text
    for text in bad:
        assert not allows(words, schema, text), text


REFUSALS: list[tuple[Any, str]] = [
    (
        {"type": "object", "properties": {"a b": {"type": "array", "uniqueItems": True}}},
        '$.properties["a b"].uniqueItems',
    ),
    ({"properties": {"a": {"items": {"not": {"type": "string"}}}}}, "$.properties.a.items.not"),
    (
        {"$defs": {"N": {"properties": {"v": {"pattern": "(?!a)"}}}}, "$ref": "#/$defs/N"},
        "$.$defs.N.properties.v.pattern",
    ),
    ({"anyOf": [TEXT, {"contains": TEXT}]}, "$.anyOf[1].contains"),
    ({"type": "object", "if": {}, "then": {}}, "$.if"),
    ({"properties": {"if": {"dependentRequired": {"a": ["b"]}}}}, "$.properties.if.dependentRequired"),
    ({"properties": {"p": {"type": "string", "pattern": "^[a[b]$"}}}, "$.properties.p.pattern"),
    ({"properties": {"p": {"type": "string", "pattern": "^(a)\\1$"}}}, "$.properties.p.pattern"),
    ({"properties": {"p": {"type": "string", "pattern": "(a"}}}, "$.properties.p.pattern"),
    ({"properties": {"p": {"type": "string", "pattern": "^(?=a(?!b)).+$"}}}, "$.properties.p.pattern"),
    ({"allOf": [{"type": "string", "pattern": "^(?=.*x)(?<!y)z$"}]}, "$.allOf[0].pattern"),
    ({"type": "string", "pattern": "^(?=a)b(?=c)$", "allOf": [{"minLength": 3}]}, "$.pattern"),
    ({"type": "string", "format": "date", "pattern": "^(?=.*\\d).{4}$"}, "$.pattern"),
    ({"properties": {"p": {"type": "string", "format": "regex"}}}, "$.properties.p.format"),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "$.oneOf"),
    (
        {
            "type": "object",
            "properties": {"a": {"type": "string", "minLength": 5, "maxLength": 3}},
            "required": ["a"],
        },
        "$.properties.a.minLength",
    ),
    (
        {"type": "object", "properties": {"a": {"type": "integer", "enum": ["x"]}}, "required": ["a"]},
        "$.properties.a.enum",
    ),
    ({"properties": {"a": {"type": "text"}}}, "$.properties.a.type"),
    ({"properties": {"a": {"type": "integer", "minimum": "3"}}}, "$.properties.a.minimum"),
    ({"properties": {"a": {"const": "\ud800"}}}, "$.properties.a.const"),
    ({"properties": {"a": {"enum": [1, "\x01"]}}}, "$.properties.a.enum[1]"),
    ({"properties": {"a": {"const": 10**30}}}, "$.properties.a.const"),
    ({"properties": {"a": {"const": float("nan")}}}, "$.properties.a.const"),
    ({"properties": {"a": {"multipleOf": 1_000_003}}}, "$.properties.a.multipleOf"),
    ({"properties": {"a": {"multipleOf": 0}}}, "$.properties.a.multipleOf"),
    ({"type": "object", "additionalProperties": TEXT, "minProperties": 2}, "$.minProperties"),
    ({"type": "object", "propertyNames": {"not": TEXT}}, "$.propertyNames.not"),
    ({"properties": {"a": 3}}, "$.properties.a"),
    ({"properties": []}, "$.properties"),
    ({"required": "a"}, "$.required"),
    ({"items": [TEXT, 3]}, "$.items[1]"),
    ({"anyOf": []}, "$.anyOf"),
    ({"enum": []}, "$.enum"),
    ("text", "$ is"),
    ({"properties": {"a": {"$ref": "other.json"}}}, "$.properties.a.$ref"),
    ({"properties": {"a": {"$ref": "#/$defs/none"}}}, "$.properties.a.$ref"),
    (
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
        "$.$defs.a",
    ),
    (False, "$ cannot"),
]


@pytest.mark.parametrize("number", range(len(REFUSALS)))
def test_a_refusal_names_the_field_in_one_sentence(number: int) -> None:
    schema, path = REFUSALS[number]
    with pytest.raises(UsageError) as caught:
        schema_to_grammar(schema)
    assert re.fullmatch(rf"the JSON schema's {re.escape(path)}.*; change or remove it\.", str(caught.value))


def _nested(levels: int, word: str) -> Any:
    schema: Any = {"type": "integer"}
    for _ in range(levels):
        schema = {word: [schema] if word == "allOf" else schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        _nested(500, "items"),
        _nested(100_000, "items"),
        _nested(90, "allOf"),
        {"const": _nested(3_000, "items")},
        {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(6)]} for i in range(12)
            ]
        },
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"},
        {"type": "string", "pattern": "^" + "(a|b|ab){900}" * 60 + "$"},
        {"type": "string", "pattern": "(" * 5_000 + ")" * 5_000},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2_000)}},
    ],
)
def test_a_hostile_schema_ends_soon(schema: Any, words: Any) -> None:  # noqa: F811
    began = time.monotonic()
    try:
        assert not allows(words, schema, "no JSON")
    except UsageError as error:
        assert "JSON schema" in str(error)
    assert time.monotonic() - began < 120  # milliseconds to seconds on an idle machine


@pytest.mark.parametrize("number", range(3))
def test_the_server_names_the_field(number: int, tiny_server: Any) -> None:
    schema, path = REFUSALS[number]
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked = {"model": "tiny:base", "messages": [{"role": "user", "content": "a dog"}], "stream": False}
    openai = tiny_server.post("/v1/chat/completions", **asked, response_format=wanted)
    assert openai.status_code == 400 and f"schema's {path} " in openai.json()["error"]["message"]
    ollama = tiny_server.post("/api/chat", **asked, format=schema)
    assert ollama.status_code == 400 and f"schema's {path} " in ollama.json()["error"]


def test_the_server_follows_a_schema(tiny_server: Any) -> None:
    schema = {
        "$defs": {"A": {"const": 'say "a\\"\n'}},
        "type": "array",
        "items": {"$ref": "#/$defs/A"},
        "maxItems": 2,
    }
    asked = {"model": "tiny:base", "messages": [{"role": "user", "content": "a dog"}], "stream": False}
    found = tiny_server.post("/api/chat", **asked, format=schema).json()
    assert found["done_reason"] == "stop" and set(json.loads(found["message"]["content"])) <= {'say "a\\"\n'}


def test_sentencepiece_tokens_are_read_as_bytes(tmp_path: Path) -> None:
    from llguidance import LLMatcher

    from loramix.runtime.constraints.schema_sampler import vocabulary

    sentencepiece = pytest.importorskip("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(write_sentencepiece(tmp_path)))

    class Model:
        """What a base of these tokens says of itself."""

        n_vocab, eot = processor.vocab_size(), processor.eos_id()

        def piece(self, token: int) -> bytes:
            if processor.is_control(token) or processor.is_unknown(token):
                return b""
            text = processor.id_to_piece(token)
            return (
                bytes([int(text[3:5], 16)]) if processor.is_byte(token) else text.replace("▁", " ").encode()
            )

        def is_end(self, token: int) -> bool:
            return bool(token == self.eot)

    model = Model()
    matcher = LLMatcher(vocabulary(model), schema_to_grammar({"items": TEXT, "type": "array"}), log_level=0)  # type: ignore[arg-type]
    for text in ('["', "the weather, é😀", '",', ' "', "a", '"]'):
        left = text.encode()
        while left:  # the longest token first
            token = max(
                (t for t in range(model.n_vocab) if model.piece(t) and left.startswith(model.piece(t))),
                key=lambda t: len(model.piece(t)),
            )
            assert matcher.consume_token(token), (text, left)
            left = left[len(model.piece(token)) :]
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    assert np.flatnonzero(bits).tolist() == [model.eot]
