"""The `openai` and `ollama` packages, unmodified, against a server in another process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ollama
import openai
import pytest
from serving import ASK, Served, served

REVIEW = (
    "Is this review positive or negative? The film starts slowly, but the last half hour is the best thing."
)
SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}, "sure": {"type": "boolean"}},
    "required": ["mood", "sure"],
}


@pytest.fixture(scope="module")
def client(tiny_server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def llama(tiny_server: Served) -> ollama.Client:
    return ollama.Client(host=tiny_server.url)


def test_a_chat_streamed_or_not(client: openai.OpenAI, tiny_engine: Any) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [ASK], "max_tokens": 9}
    whole = client.chat.completions.create(**asked)
    choice, usage = whole.choices[0], whole.usage
    expected = tiny_engine.generate(ASK["content"], max_tokens=9)
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert usage is not None
    assert usage.completion_tokens == len(expected.tokens)
    assert usage.prompt_tokens == expected.usage["prompt_tokens"]
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    route = whole.loramix  # type: ignore[attr-defined]  # the client keeps what it does not know
    assert route["mix"] == expected.route.mix and route["probabilities"] and route["reason"]
    assert {"queue", "features", "gate", "first_token", "total"} <= set(route["timings"])

    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected.text and chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == len(expected.tokens)
    assert chunks[-2].choices[0].finish_reason == expected.finish_reason
    assert chunks[-2].loramix["mix"] == expected.route.mix  # type: ignore[attr-defined]


def test_names_policies_and_mixes(client: openai.OpenAI, tiny_engine: Any) -> None:
    def ask(model: str, **extra: Any) -> tuple[str, dict[str, float]]:
        found = client.chat.completions.create(
            model=model, messages=[ASK], max_tokens=9, extra_body={"loramix": extra} if extra else None
        )
        return found.choices[0].message.content or "", found.loramix["mix"]  # type: ignore[attr-defined]

    def direct(**options: Any) -> tuple[str, dict[str, float]]:
        found = tiny_engine.generate(ASK["content"], max_tokens=9, **options)
        return found.text, found.route.mix

    assert ask("tiny:sentiment") == direct(mix="sentiment")
    assert ask("tiny:base") == direct(mix="base")
    assert ask("tiny", policy="top1") == direct(policy="top1")
    assert ask("tiny", policy="token") == direct(policy="token")
    half = {"sentiment": 0.5, "summarize": 0.5}
    assert ask("tiny", mix=half) == direct(mix=half)
    with pytest.raises(openai.NotFoundError, match="tiny:sentiment"):
        ask("tiny:nobody")
    with pytest.raises(openai.NotFoundError):
        ask("gpt-4")
    with pytest.raises(openai.BadRequestError, match="names what answers"):
        ask("tiny:sentiment", policy="top1")


def test_seeds_choices_stops_and_logprobs(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny:base", "messages": [ASK], "max_tokens": 8}
    warm = {**asked, "temperature": 2.0, "top_p": 0.999, "seed": 7}
    first, second = (client.chat.completions.create(**warm, n=3) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices] and len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**warm, n=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    greedy = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert greedy.choices[0].logprobs is not None and greedy.choices[0].logprobs.content is not None
    scores = greedy.choices[0].logprobs.content
    assert len(scores) == 8 and all(len(score.top_logprobs) == 2 for score in scores)
    assert all(score.logprob == score.top_logprobs[0].logprob <= 0 for score in scores)
    said = b"".join(bytes(score.bytes or []) for score in scores).decode("utf-8", "replace")
    assert said == greedy.choices[0].message.content
    stop = said[3:5]
    stopped = client.chat.completions.create(
        **{**asked, "max_tokens": None}, max_completion_tokens=8, stop=[stop]
    )
    assert stopped.choices[0].message.content == said[: said.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_response_formats(client: openai.OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "mood", "schema": SCHEMA, "strict": True}}
    found = client.chat.completions.create(
        model="tiny:base",
        messages=[ASK],
        max_tokens=200,
        response_format=schema,  # type: ignore[call-overload]
    )
    assert json.loads(found.choices[0].message.content)["mood"] in ("good", "bad")
    free = client.chat.completions.create(
        model="tiny:base", messages=[ASK], max_tokens=30, response_format={"type": "json_object"}
    )
    assert (free.choices[0].message.content or "").startswith("{")


def test_completions_embeddings_and_models(client: openai.OpenAI) -> None:
    found = client.completions.create(model="tiny", prompt=["a dog", "a cat"], max_tokens=5, logprobs=1)
    assert [choice.index for choice in found.choices] == [0, 1]
    assert found.choices[0].logprobs is not None and len(found.choices[0].logprobs.tokens or []) == 5
    chunks = list(client.completions.create(model="tiny", prompt="a dog", max_tokens=5, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == found.choices[0].text
    vectors = client.embeddings.create(model="tiny", input=["a dog", "a cat", "a dog"])
    a, b, again = (row.embedding for row in vectors.data)
    assert len(a) == 64 and a == again != b and sum(x * x for x in a) == pytest.approx(1, abs=1e-4)
    plain = client.embeddings.create(model="tiny", input="a dog", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(a, abs=1e-5) and plain.usage.prompt_tokens == 5
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", "tiny:sentiment", "tiny:summarize", "tiny:base"]
    assert client.models.retrieve("tiny:base").id == "tiny:base"


def test_ollama_chats_and_generates(llama: ollama.Client, tiny_engine: Any) -> None:
    expected = tiny_engine.generate(ASK["content"], max_tokens=9)
    options = {"num_predict": 9, "temperature": 0}
    whole = llama.chat(model="tiny", messages=[ASK], options=options)
    assert whole.message.content == expected.text and whole.done
    assert whole.eval_count == len(expected.tokens)
    assert whole.prompt_eval_count == expected.usage["prompt_tokens"]
    parts = list(llama.chat(model="tiny", messages=[ASK], options=options, stream=True))
    assert "".join(part.message.content or "" for part in parts) == expected.text
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    one = llama.generate(model="tiny", prompt=ASK["content"], options=options)
    assert one.response == expected.text and one.done_reason == expected.finish_reason
    pieces = list(llama.generate(model="tiny:latest", prompt=ASK["content"], options=options, stream=True))
    assert "".join(piece.response or "" for piece in pieces) == expected.text
    formed = llama.chat(model="tiny:base", messages=[ASK], format=SCHEMA, options={"num_predict": 200})
    assert set(json.loads(formed.message.content or "")) == {"mood", "sure"}
    assert llama.generate(model="tiny").done_reason == "load"


def test_ollama_lists_shows_and_embeds(llama: ollama.Client, tiny_server: Served) -> None:
    assert [model.model for model in llama.list().models][:2] == ["tiny", "tiny:sentiment"]
    shown = llama.show("tiny:summarize")
    assert shown.modelinfo is not None and shown.modelinfo["loramix.skills"] == ["sentiment", "summarize"]
    assert [model.model for model in llama.ps().models] == ["tiny"]
    found = llama.embed(model="tiny", input=["a dog", "a cat"])
    assert len(found.embeddings) == 2 and len(found.embeddings[0]) == 64
    assert len(llama.embeddings(model="tiny", prompt="a dog").embedding) == 64
    assert tiny_server.http.get("/api/version").json()["version"]
    with pytest.raises(ollama.ResponseError) as refused:
        llama.chat(model="llama3", messages=[ASK])
    assert refused.value.status_code == 404
    with pytest.raises(ollama.ResponseError):
        llama.pull("llama3")


@pytest.fixture(scope="module")
def real(default_base: Path) -> Iterator[Served]:
    with served("smollm2-135m") as server:
        yield server


@pytest.mark.base
def test_the_default_pack_answers_both_clients(real: Served) -> None:
    message = {"role": "user", "content": REVIEW}
    client = openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0)
    found = client.chat.completions.create(model="smollm2-135m", messages=[message])  # type: ignore[list-item]
    assert found.choices[0].message.content == "positive"
    assert found.loramix["mix"] == {"sentiment": 1.0}  # type: ignore[attr-defined]
    asked: dict[str, Any] = {"model": "smollm2-135m", "messages": [message], "stream": True}
    chunks = list(client.chat.completions.create(**asked))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "positive"
    llama = ollama.Client(host=real.url)
    assert llama.chat(model="smollm2-135m", messages=[message]).message.content == "positive"
    parts = llama.generate(model="smollm2-135m:sentiment", prompt=REVIEW, stream=True)
    assert "".join(part.response or "" for part in parts) == "positive"
    base = client.chat.completions.create(model="smollm2-135m:base", messages=[message], max_tokens=4)  # type: ignore[list-item]
    assert base.choices[0].message.content != "positive"
