"""Settings that the server accepts do what clients mean by them, in both protocols."""

from __future__ import annotations

import base64
import json
import math
import struct
from typing import Any

import pytest
from serving import ASK, Served


def openai_text(server: Served, **body: Any) -> tuple[str, int]:
    """An answer of the bare base, with its tokens."""
    found = server.chat(model="tiny:base", **body).json()
    return found["choices"][0]["message"]["content"], found["usage"]["completion_tokens"]


def ollama_text(server: Served, path: str = "/api/chat", **options: Any) -> tuple[str, int]:
    asked = {"messages": [ASK]} if path == "/api/chat" else {"prompt": ASK["content"]}
    found = server.post(path, model="tiny:base", stream=False, options=options, **asked).json()
    return found.get("response") or found["message"]["content"], found["eval_count"]


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repeat_penalty"])
def test_penalties_count_in_both(tiny_server: Served, penalty: str) -> None:
    warm: dict[str, Any] = {"temperature": 2, "seed": 1}
    strong = {**warm, penalty: 2.0}
    plain = openai_text(tiny_server, max_tokens=40, **warm)
    found = openai_text(tiny_server, max_tokens=40, **strong)
    assert found != plain
    assert found == ollama_text(tiny_server, num_predict=40, **strong)
    assert found == ollama_text(tiny_server, "/api/generate", num_predict=40, **strong)
    if penalty == "repeat_penalty":
        assert found == openai_text(tiny_server, max_tokens=40, **warm, repetition_penalty=2.0)
    assert plain == ollama_text(tiny_server, num_predict=40, **warm)
    assert plain == openai_text(tiny_server, max_tokens=40, **warm, presence_penalty=0, frequency_penalty=0.0)


def test_a_seed_repeats_and_minus_one_does_not(tiny_server: Served) -> None:
    warm: dict[str, Any] = {"max_tokens": 30, "temperature": 2}
    own: dict[str, Any] = {"num_predict": 30, "temperature": 2}
    assert len({openai_text(tiny_server, **warm, seed=-1)[0] for _ in range(4)}) > 1
    assert len({ollama_text(tiny_server, **own, seed=-1)[0] for _ in range(4)}) > 1
    assert len({openai_text(tiny_server, **warm, seed=seed)[0] for seed in (5, 5, 5)}) == 1
    assert len({ollama_text(tiny_server, **own, seed=seed)[0] for seed in (-7, -7)}) == 1
    several = tiny_server.chat(model="tiny:base", **warm, seed=-1, n=3).json()["choices"]
    assert len({choice["message"]["content"] for choice in several}) > 1
    same = [
        tiny_server.post("/v1/completions", model="tiny:base", prompt="a", **warm, seed=3).json()
        for _ in "ab"
    ]
    assert same[0]["choices"] == same[1]["choices"]


def test_no_limit_is_the_context(tiny_server: Served) -> None:
    limits = ({"max_tokens": -1}, {"max_tokens": 2**31 - 1})
    longest = 0
    for seed in (1, 2):
        warm: dict[str, Any] = {"model": "tiny:sentiment", "temperature": 2, "seed": seed}
        counts = {tiny_server.chat(**warm, **limit).json()["usage"]["completion_tokens"] for limit in limits}
        for limit in (-1, -2, 0):
            body: dict[str, Any] = {"options": {"temperature": 2, "seed": seed, "num_predict": limit}}
            own = tiny_server.post("/api/chat", model="tiny:sentiment", messages=[ASK], stream=False, **body)
            counts.add(own.json()["eval_count"])
        assert len(counts) == 1
        longest = max(longest, *counts)
        assert tiny_server.chat(**warm).json()["usage"]["completion_tokens"] <= 12  # as the skill says
    assert longest > 12
    newer = openai_text(tiny_server, temperature=2, seed=1, max_tokens=1, max_completion_tokens=-1)
    assert newer == openai_text(tiny_server, temperature=2, seed=1, max_tokens=-1)
    assert openai_text(tiny_server, max_tokens=9, max_completion_tokens=3)[1] == 3
    assert openai_text(tiny_server, max_tokens=3, max_completion_tokens=None)[1] == 3


def test_all_tokens_by_any_number(tiny_server: Served) -> None:
    warm: dict[str, Any] = {"max_tokens": 12, "temperature": 2, "seed": 4}
    usual = openai_text(tiny_server, **warm)
    assert all(openai_text(tiny_server, **warm, top_k=k) == usual for k in (0, -1, 1_000_000, None))
    assert openai_text(tiny_server, **warm, top_k=1) == openai_text(tiny_server, max_tokens=12)
    own: dict[str, Any] = {"num_predict": 12, "temperature": 2, "seed": 4}
    assert all(ollama_text(tiny_server, **own, top_k=k, repeat_last_n=-1) == usual for k in (0, -1))
    assert openai_text(tiny_server, **warm, min_p=1.0) == openai_text(tiny_server, max_tokens=12)


@pytest.mark.parametrize("count", [1, 7, 32, 64])
def test_dimensions_cut_and_renormalise(tiny_server: Served, count: int) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": ["a dog", "a cat"]}
    whole = [row["embedding"] for row in tiny_server.post("/v1/embeddings", **asked).json()["data"]]
    cut = [
        row["embedding"]
        for row in tiny_server.post("/v1/embeddings", **asked, dimensions=count).json()["data"]
    ]
    for short, long in zip(cut, whole, strict=True):
        length = math.hypot(*long[:count])
        assert short == pytest.approx([x / length for x in long[:count]], abs=1e-6)
    own = tiny_server.post("/api/embed", **asked, dimensions=count).json()["embeddings"]
    assert own == [pytest.approx(row, abs=1e-6) for row in cut]
    coded = tiny_server.post("/v1/embeddings", **asked, dimensions=count, encoding_format="base64").json()[
        "data"
    ]
    row = struct.unpack(f"<{count}f", base64.b64decode(coded[1]["embedding"]))
    assert row == pytest.approx(cut[1], abs=1e-6)


def test_dimensions_that_are_not_there_are_named(tiny_server: Served) -> None:
    for path in ("/v1/embeddings", "/api/embed"):
        for count in (65, 4096, 0, -1, 2.5, "many"):
            answer = tiny_server.post(path, model="tiny", input="a dog", dimensions=count)
            assert answer.status_code == 400 and "dimensions is" in answer.text
        ids = tiny_server.post(path, model="tiny", input=[[1, 2], [3]])
        assert ids.status_code == 400 and "input holds token ids" in ids.text


def test_long_texts_are_cut_where_ollama_cuts_them(tiny_server: Served) -> None:
    long = "word " * 2000
    first = tiny_server.post("/api/embed", model="tiny", input=[long]).json()["embeddings"][0]
    assert (
        first
        == tiny_server.post("/api/embed", model="tiny", input=long[:5000], truncate=True).json()[
            "embeddings"
        ][0]
    )
    assert tiny_server.post("/api/embeddings", model="tiny", prompt=long).status_code == 200
    for path, body in (("/api/embed", {"truncate": False}), ("/v1/embeddings", {})):
        refused = tiny_server.post(path, model="tiny", input=long, **body)
        assert refused.status_code == 400 and "tokens" in refused.text


def test_ollama_gives_log_probabilities(tiny_server: Served) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "options": {"num_predict": 5},
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = tiny_server.post("/api/chat", **asked, messages=[ASK], stream=False).json()
    own = tiny_server.chat(max_tokens=5, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"][
        "content"
    ]
    assert whole["logprobs"] == own and len(own[0]["top_logprobs"]) == 2
    lines = tiny_server.post("/api/generate", **asked, prompt=ASK["content"]).text.splitlines()
    streamed = [score for line in lines for score in json.loads(line).get("logprobs", [])]
    assert streamed == own
    nulls = {"logprobs": None, "top_logprobs": None}
    without = tiny_server.post("/api/chat", **{**asked, **nulls}, messages=[ASK], stream=False)
    assert without.status_code == 200 and "logprobs" not in without.json()


def test_all_nulls_at_once(tiny_server: Served) -> None:
    names = "stream stream_options max_tokens temperature top_p seed n stop tools tool_choice response_format user"
    nulls = dict.fromkeys(names.split())
    assert tiny_server.chat(**nulls).json()["choices"][0]["message"]["content"]
    own = dict.fromkeys(
        ["format", "options", "keep_alive", "tools", "think", "template", "images", "context"]
    )
    message = {**ASK, "images": None, "tool_calls": None}
    for path, body in (
        ("/api/chat", {"messages": [message]}),
        ("/api/generate", {"prompt": "a", "system": None}),
    ):
        last = tiny_server.post(path, model="tiny", **own, **body).text.splitlines()[-1]
        assert '"done":true' in last and "error" not in last
    embed = {"model": "tiny", "input": "a", "encoding_format": None, "dimensions": None}
    assert tiny_server.post("/v1/embeddings", **embed).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/chat/completions", {"messages": [ASK], "json_schema": {"type": "object"}}, "json_schema"),
        ("/v1/chat/completions", {"messages": [ASK], "stop_token_ids": [2]}, "stop_token_ids"),
        ("/v1/chat/completions", {"messages": [ASK], "xtc_probability": 0.5}, "xtc_probability"),
        ("/v1/completions", {"prompt": "a", "response_format": {"type": "json_object"}}, "response_format"),
        ("/api/chat", {"messages": [ASK], "options": {"dry_multiplier": 0.8}}, "dry_multiplier"),
        ("/api/embeddings", {"prompt": "a", "dimensions": 8}, "dimensions"),
    ],
)
def test_settings_of_other_servers_are_refused_by_name(
    tiny_server: Served, path: str, body: dict[str, Any], field: str
) -> None:
    answer = tiny_server.post(path, model="tiny", **body)
    assert answer.status_code == 400
    assert field in answer.text and "not supported" in answer.text


def test_settings_that_ask_for_nothing_pass(tiny_server: Served) -> None:
    quiet = {"xtc_probability": 0, "top_a": 0, "length_penalty": 1, "n_predict": -1}
    assert tiny_server.chat(max_tokens=2, **quiet).status_code == 200


@pytest.mark.parametrize(
    ("path", "name", "value", "harmless"),
    [
        ("/v1/chat/completions", "use_beam_search", True, False),
        ("/v1/chat/completions", "lora", [{"id": 0, "scale": 0.5}], []),
        ("/v1/chat/completions", "regex", "^a$", ""),
        ("/v1/chat/completions", "best_of", 3, 1),
        ("/v1/chat/completions", "allowed_token_ids", [5], []),
        ("/v1/chat/completions", "top_n_sigma", 1, -1),
        ("/v1/chat/completions", "chat_template_kwargs", {"date": "today"}, {"enable_thinking": False}),
        ("/v1/chat/completions", "max_new_tokens", 3, None),
        ("/v1/chat/completions", "stop_sequences", ["a"], []),
        ("/v1/chat/completions", "format", "json", ""),
        ("/v1/completions", "max_completion_tokens", 3, None),
        ("/v1/embeddings", "normalize", False, True),
        ("/v1/embeddings", "output_dimension", 8, None),
        ("/v1/embeddings", "output_dtype", "int8", "float"),
        ("/api/chat", "grammar", 'root ::= "a"', ""),
        ("/api/generate", "repetition_penalty", 1.3, None),
    ],
)
def test_names_of_other_servers_are_never_ignored(
    tiny_server: Served, path: str, name: str, value: Any, harmless: Any
) -> None:
    least: dict[str, Any] = {"messages": [ASK], "prompt": "a dog", "input": "a dog", "stream": False}

    def ask(given: Any) -> Any:
        own = {"options": {name: given}} if path.startswith("/api") else {name: given}
        return tiny_server.post(path, model="tiny", **least, **own)

    answer = ask(value)
    assert answer.status_code == 400 and f"{name} is not " in answer.text, answer.text
    assert ask(harmless).status_code == 200
