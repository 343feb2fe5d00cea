"""Database schemas in prompts: read from one form, written in another."""

from __future__ import annotations

import random

import pytest

from loramix.train.schema_forms import parse, rewritten

SCHEMAS = [
    "Table staff(id real, name text)\nTable shops(shop_id real, city text)\nQuestion: Who works in Rome?",
    "CREATE TABLE staff (id REAL, name TEXT);\nCREATE TABLE shops (shop_id REAL, city TEXT);\nWho works in Rome?",
    "staff(id, name); shops(shop_id, city)\nWho works in Rome?",
    "Tables: staff(id, name), shops(shop_id, city). Who works in Rome?",
    "staff(id, name)\nshops(shop_id, city)\nQuestion: Who works in Rome?",
]


@pytest.mark.parametrize("prompt", SCHEMAS)
def test_schemas_are_read_from_all_forms(prompt: str) -> None:
    read = parse(prompt)
    assert read is not None
    assert [table[:2] for table in read[0]] == [("staff", ("id", "name")), ("shops", ("shop_id", "city"))]
    assert read[1] == "Who works in Rome?"


def test_a_rewritten_schema_says_the_same() -> None:
    written = {rewritten(prompt, random.Random(i)) for prompt in SCHEMAS for i in range(80)}
    assert len(written) > 18
    for prompt in written:
        assert "o works in Rome?" in prompt
        assert all(word in prompt for word in ("staff", "shops", "shop_id", "city", "name"))
    sentences = [prompt for prompt in written if "with columns id and name" in prompt]
    assert sentences and all("a table shops with columns shop_id and city" in prompt for prompt in sentences)


@pytest.mark.parametrize(
    "prompt",
    [
        "Who works in Rome?",
        "staff(id, name)",
        'staff(id, "Home Town")\nWho?',
        "staff(id real, name)\nWho?",
        "t()\nWho?",
    ],
)
def test_what_is_no_known_schema_stays(prompt: str) -> None:
    assert parse(prompt) is None
    assert {rewritten(prompt, random.Random(i)) for i in range(20)} == {prompt}
