"""All that a request may hold, field by field: null is absent, odd values get a sentence, and none of them a 500."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pydantic
import pytest
from serving import ASK, Served

from loramix.runtime.sampling import Sampling
from loramix.server.body_types import limit_of, sampling_of
from loramix.server.fields import Body, Row, Use, sentence
from loramix.server.request_table import BODIES, WITHOUT, table

LEAST: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": [ASK], "max_tokens": 1},
    "/v1/completions": {"model": "tiny", "prompt": "a dog", "max_tokens": 1},
    "/v1/embeddings": {"model": "tiny", "input": "a dog"},
    "/v1/route": {"prompt": "a dog"},
    "/v1/explain": {"model": "tiny", "messages": [ASK], "max_tokens": 1},
    "/api/chat": {"model": "tiny", "messages": [ASK], "stream": False, "options": {"num_predict": 1}},
    "/api/generate": {"model": "tiny", "prompt": "a dog", "stream": False, "options": {"num_predict": 1}},
    "/api/embed": {"model": "tiny", "input": "a dog"},
    "/api/embeddings": {"model": "tiny", "prompt": "a dog"},
    "/api/show": {"model": "tiny"},
}
DEEP: Any = "x"
for _ in range(20):
    DEEP = [DEEP]
ABSENT: Any = object()
ODD: list[Any] = [
    None, True, False, 0, -1, 1, -2, 1.5, 10**30, -(10**30), 2**63, 1e308, "", "x", "1", "none", "x" * 300, "a\u0000b",
    [], [None], [[]], [1], ["x"], [{}], [{"type": "image_url"}], {}, {"a": None}, {"type": "x"}, {"a": 1}, DEEP,
]  # fmt: skip
OTHERS_WORDS = re.compile(
    r"input should|field required|extra inputs|validation|pydantic|unable to parse|list_type|traceback|error_",
    re.IGNORECASE,
)


def rows(found: dict[str, Row], *before: str) -> Iterator[tuple[tuple[str, ...], Row]]:
    """Every field, also those of objects in a field."""
    for name, row in found.items():
        yield (*before, name), row
        if row.fields:
            yield from rows(dict(row.fields), *before, name)


FIELDS = [(path, names, row) for path, found in table().items() for names, row in rows(found)]


def with_value(path: str, names: tuple[str, ...], value: Any) -> dict[str, Any]:
    """The least body of an endpoint, with a field set; lists of objects get one."""
    body: dict[str, Any] = {**LEAST[path]}
    if names == ("top_logprobs",):
        body["logprobs"] = True
    inside = body
    for name in names[:-1]:
        known = {
            "messages": [dict(ASK)],
            "options": {"num_predict": 1},
            "tool_calls": [{}],
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
            "json_schema": {"schema": {"type": "object"}},
        }.get(name, {})
        inside[name] = known
        inside = known[0] if isinstance(known, list) else known
    if value is ABSENT:
        inside.pop(names[-1], None)
    else:
        inside[names[-1]] = value
    return body


def read(path: str, body: dict[str, Any]) -> Body | str:
    """What the server makes of a body: an object, or what it says of it."""
    try:
        return BODIES[path].model_validate(body)
    except pydantic.ValidationError as error:
        return sentence(BODIES[path], error.errors())[1]


def is_sentence(text: str) -> bool:
    return text.endswith(".") and "\n" not in text and len(text) < 400 and not OTHERS_WORDS.search(text)


def test_the_table_is_what_the_server_takes(tiny_server: Served) -> None:
    document = tiny_server.http.get("/openapi.json").json()
    assert set(document["paths"]) == set(table()) == set(LEAST) | set(WITHOUT)
    schemas = document["components"]["schemas"]
    for path, found in table().items():
        content = document["paths"][path].get("post", {}).get("requestBody", {}).get("content", {})
        if not content:
            assert not found
            continue
        name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
        honoured = {field for field, row in found.items() if row.use is Use.HONOURED}
        assert set(schemas[name]["properties"]) == honoured
    assert all(row.rule for _, _, row in FIELDS if row.use is not Use.IGNORED)


def test_null_is_absent() -> None:
    nulls = 0
    for path, names, _ in FIELDS:
        found = read(path, with_value(path, names, None))
        assert found == read(path, with_value(path, names, ABSENT)), (path, names)
        nulls += isinstance(found, Body)
    assert nulls > 200
    for path, least in LEAST.items():
        every = {names[0]: None for where, names, _ in FIELDS if where == path}
        assert read(path, {**every, **least}) == read(path, least)


@pytest.mark.parametrize("path", LEAST)
def test_bounds_are_those_that_are_said(path: str) -> None:
    checked = 0
    for where, names, row in FIELDS:
        found = re.match(r"a (whole )?number from (-?[\d.]+) to (-?[\d.]+)", row.rule)
        if where != path or not found or row.use is not Use.HONOURED:
            continue
        low, high = (int(end) if found[1] else float(end) for end in found.group(2, 3))
        for value in (low, high):
            assert isinstance(read(path, with_value(path, names, value)), Body), (names, value)
        for value in (low - 3, high + 1):
            said = read(path, with_value(path, names, value))
            assert isinstance(said, str) and said.startswith(".".join(names)) and row.rule in said
        checked += 1
    assert checked >= {"/v1/chat/completions": 9, "/v1/completions": 9, "/api/chat": 9}.get(path, 0)


def test_what_is_ignored_may_hold_anything() -> None:
    for path, names, row in FIELDS:
        if row.use is not Use.IGNORED:
            continue
        least = read(path, with_value(path, names, ABSENT))
        assert isinstance(least, Body), (path, names, least)
        for value in ODD:
            assert read(path, with_value(path, names, value)) == least, (path, names, value)


def test_what_is_refused_is_refused_with_a_sentence() -> None:
    refusals = 0
    for path, names, row in FIELDS:
        if row.use is not Use.REFUSED:
            continue
        said = [read(path, with_value(path, names, value)) for value in ODD]
        assert all(text == said[-1] for text in said if isinstance(text, str))
        name = re.escape(names[-1])
        assert isinstance(said[-1], str) and re.match(
            rf"([\w.\[\]]+\.)?{name} {re.escape(row.rule)}$", said[-1]
        )
        assert is_sentence(said[-1]) and isinstance(said[0], Body)
        refusals += 1
    assert refusals > 30


def test_odd_values_are_taken_or_named() -> None:
    taken = named = 0
    for path, names, _ in FIELDS:
        for value in ODD:
            found = read(path, with_value(path, names, value))
            if isinstance(found, str):
                outer = [name for name in names if name in found]
                assert is_sentence(found) and outer, (path, names, value, found)
                named += 1
                continue
            taken += 1
            for body in (found, getattr(found, "options", None)):
                Sampling(**{**sampling_of(body), "repeat_last_n": 0})  # type: ignore[arg-type]
            limit = limit_of(getattr(found, "limit", getattr(found, "max_tokens", None)), 512)
            assert limit is None or 1 <= limit <= 512
    assert taken > 1000 and named > 1000


def test_the_server_survives_odd_values(tiny_server: Served) -> None:
    """Every eleventh of them: no 500, no worker that dies, and an answer that names the field."""
    honoured = [(path, names) for path, names, row in FIELDS if row.use is Use.HONOURED]
    cases = list(itertools.islice(itertools.product(honoured, ODD), 0, None, 11))
    restarts = tiny_server.http.get("/health").json()["restarts"]

    def ask(case: tuple[tuple[str, tuple[str, ...]], Any]) -> str | None:
        (path, names), value = case
        answer = tiny_server.post(path, **with_value(path, names, value))
        if answer.status_code == 200:
            return None
        error = answer.json()["error"]
        text = error if path.startswith("/api") else error["message"]
        if answer.status_code in (400, 404, 413) and is_sentence(text):
            return None
        return f"{path} {names} {value!r}: {answer.status_code} {text}"

    with ThreadPoolExecutor(4) as threads:
        assert [text for text in threads.map(ask, cases) if text] == []
    assert len(cases) > 200
    assert tiny_server.http.get("/health").json()["restarts"] == restarts


@pytest.mark.parametrize(
    "content, words",
    [
        (b'{"temperature": NaN}', "not valid JSON"),
        (b'{"temperature": 1e999}', "too large"),
        (b'{"seed": ' + b"9" * 6000 + b"}", "too large"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b"", "must be a JSON object"),
        (b"{}{}", "not valid JSON"),
        (b'{"a":' * 1000 + b"1" + b"}" * 1000, "too deep"),
    ],
)
def test_bodies_that_are_no_objects(tiny_server: Served, content: bytes, words: str) -> None:
    for path in ("/v1/chat/completions", "/api/chat"):
        answer = tiny_server.http.post(path, content=content, headers={"content-type": "application/json"})
        error = answer.json()["error"]
        text = error if path.startswith("/api") else error["message"]
        assert answer.status_code == 400 and words in text and is_sentence(text), text


def test_settings_of_ollama_at_the_top_level_count_unless_options_hold_the_same() -> None:
    for path in ("/api/chat", "/api/generate"):
        least = {key: value for key, value in LEAST[path].items() if key != "options"}
        for given, expected in (
            ({"num_predict": 3, "temperature": 0.5, "stop": "x"}, (3, 0.5, ["x"])),
            ({"num_predict": 3, "options": {"temperature": 0.5}}, (3, 0.5, None)),
            ({"num_predict": 3, "options": {"num_predict": 4}}, (4, None, None)),
            ({"num_predict": 3, "options": {"num_predict": None}}, (3, None, None)),
            ({"num_predict": 3, "options": None}, (3, None, None)),
            ({"temperature": None, "num_ctx": 512}, (None, None, None)),
            ({"max_tokens": 3}, (3, None, None)),
            ({"max_completion_tokens": 3, "max_tokens": 5}, (3, None, None)),
            ({"options": {"max_tokens": 3}}, (3, None, None)),
            ({"max_tokens": 3, "options": {"num_predict": 4}}, (4, None, None)),
        ):
            options = BODIES[path].model_validate({**least, **given}).options  # type: ignore[attr-defined]
            assert (options.num_predict, options.temperature, options.stop) == expected, given


def test_the_limit_of_ollama_counts_in_bodies_of_openai() -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        least = {key: value for key, value in LEAST[path].items() if key != "max_tokens"}
        for given, expected in (
            ({"num_predict": 3}, 3),
            ({"num_predict": 0}, 0),
            ({"num_predict": -2}, -2),
            ({"num_predict": 3, "max_tokens": 5}, 5),
            ({"num_predict": None}, None),
        ):
            assert BODIES[path].model_validate({**least, **given}).limit == expected  # type: ignore[attr-defined]


def test_scores_of_other_tokens_need_the_scores_to_be_on() -> None:
    for path in ("/v1/chat/completions", "/api/chat", "/api/generate"):
        said = read(path, {**LEAST[path], "top_logprobs": 2})
        assert said == "top_logprobs needs 'logprobs': true; set it, or leave it out."
        for fine in ({"top_logprobs": 0}, {"top_logprobs": None}, {"top_logprobs": 2, "logprobs": True}):
            assert not isinstance(read(path, {**LEAST[path], **fine}), str)
