"""Client libraries that nobody here wrote, unmodified, against one server: LangChain, LiteLLM and llm."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from serving import ASK, Served

PROMPT = ASK["content"]
CALL = {"name": "weather", "args": {"city": "Bonn"}, "id": "c1"}


@pytest.fixture(scope="module")
def expected(tiny_server: Served) -> str:
    """The answer that all of them must give."""
    text: str = tiny_server.chat(max_tokens=9).json()["choices"][0]["message"]["content"]
    return text


@pytest.fixture(scope="module")
def litellm() -> Iterator[ModuleType]:
    """LiteLLM, which else fetches its list of prices when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        found = pytest.importorskip("litellm")
        patch.setattr(found, "telemetry", False)
        yield found


def test_langchain_openai(tiny_server: Served, expected: str) -> None:
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
    from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

    place: dict[str, Any] = {
        "base_url": f"{tiny_server.url}/v1",
        "api_key": "none",
        "model": "tiny",
        "max_retries": 0,
    }
    chat = ChatOpenAI(**place, max_tokens=9, temperature=0)
    whole = chat.invoke(PROMPT)
    assert whole.content == expected and whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 0
    chunks = list(chat.stream(PROMPT, stream_usage=True))
    assert "".join(str(chunk.content) for chunk in chunks) == expected
    assert any(chunk.usage_metadata for chunk in chunks)
    assert asyncio.run(chat.ainvoke(PROMPT)).content == expected
    several = chat.batch([PROMPT, PROMPT], stop=["\u0001\u0001"])
    assert [message.content for message in several] == [expected] * 2
    odd = ChatOpenAI(
        **place,
        max_tokens=3,
        seed=-1,
        n=2,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logprobs=True,
        top_logprobs=2,
        metadata={"a": "b"},
        extra_body={"top_k": 0},
        reasoning_effort="low",
    )
    scored = odd.invoke([SystemMessage("Be brief."), HumanMessage([{"type": "text", "text": PROMPT}])])
    assert len(scored.response_metadata["logprobs"]["content"]) == 3
    history = [
        HumanMessage("Is it warm?"),
        AIMessage("", tool_calls=[CALL]),
        ToolMessage("22 °C", tool_call_id="c1"),
    ]
    assert chat.invoke(history).content
    assert chat.invoke([*history, AIMessage("Yes."), HumanMessage(PROMPT)]).content
    with pytest.raises(Exception, match="tools requests tools"):
        chat.bind_tools([{"name": "f", "description": "d", "parameters": {"type": "object"}}]).invoke(PROMPT)

    schema = {
        "title": "Mood",
        "type": "object",
        "properties": {"good": {"type": "boolean"}},
        "required": ["good"],
    }
    formed = ChatOpenAI(**place, max_tokens=60).with_structured_output(
        {**schema, "additionalProperties": False}, method="json_schema"
    )
    assert isinstance(formed.invoke(PROMPT)["good"], bool)  # type: ignore[index]
    completion = OpenAI(**place, max_tokens=9, temperature=0)
    assert completion.invoke(PROMPT) == "".join(completion.stream(PROMPT)) == expected
    vectors = OpenAIEmbeddings(**place, check_embedding_ctx_length=False, dimensions=16)
    first, second = vectors.embed_documents(["a dog", "a cat"])
    assert len(first) == len(second) == 16 and vectors.embed_query("a dog") == pytest.approx(first, abs=1e-6)
    assert sum(x * x for x in first) == pytest.approx(1, abs=1e-5)


def test_langchain_ollama(tiny_server: Served, expected: str) -> None:
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
    from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM

    place: dict[str, Any] = {"base_url": tiny_server.url, "model": "tiny"}
    chat = ChatOllama(
        **place,
        num_predict=9,
        temperature=0,
        validate_model_on_init=True,
        num_ctx=4096,
        mirostat=0,
        tfs_z=1.0,
        top_k=40,
        repeat_last_n=-1,
        keep_alive="5m",
        seed=-1,
    )
    whole = chat.invoke(PROMPT)
    assert whole.content == expected and whole.response_metadata["done_reason"]
    assert "".join(str(chunk.content) for chunk in chat.stream(PROMPT)) == expected
    assert asyncio.run(chat.ainvoke([HumanMessage([{"type": "text", "text": PROMPT}])])).content
    history = [
        HumanMessage("Is it warm?"),
        AIMessage("", tool_calls=[CALL]),
        ToolMessage("22 °C", tool_call_id="c1"),
    ]
    assert chat.invoke([*history, AIMessage("Yes."), HumanMessage(PROMPT)]).content
    assert chat.invoke(history).content
    with pytest.raises(Exception, match="tools requests tools"):
        chat.bind_tools([{"name": "f", "description": "d", "parameters": {"type": "object"}}]).invoke(PROMPT)
    formed = ChatOllama(**place, num_predict=60, format="json").invoke(PROMPT)
    assert str(formed.content).lstrip().startswith("{")
    text = OllamaLLM(**place, num_predict=9, temperature=0)
    assert text.invoke(PROMPT) == "".join(text.stream(PROMPT)) == expected
    vectors = OllamaEmbeddings(**place)
    first, second = vectors.embed_documents(["a dog", "a cat"])
    assert len(first) == len(second) == 64 and vectors.embed_query("a dog") == pytest.approx(first, abs=1e-6)
    assert len(vectors.embed_query("word " * 2000)) == 64  # cut, as Ollama does


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own
def test_litellm(tiny_server: Served, expected: str, litellm: ModuleType) -> None:
    key = {"api_key": "none", "max_retries": 0}
    asked: dict[str, Any] = {"messages": [ASK], "max_tokens": 9, "temperature": 0}
    places: list[dict[str, Any]] = [
        {"model": "openai/tiny", "api_base": f"{tiny_server.url}/v1", **key},
        {"model": "hosted_vllm/tiny", "api_base": f"{tiny_server.url}/v1", **key},
        {"model": "ollama_chat/tiny", "api_base": tiny_server.url},
    ]
    for place in places:
        whole = litellm.completion(**place, **asked)
        assert whole.choices[0].message.content == expected, place
        assert whole.usage.completion_tokens > 0
        chunks = litellm.completion(**place, **asked, stream=True, stream_options={"include_usage": True})
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    # its older form for Ollama writes the roles into one prompt
    older = {"model": "ollama/tiny", "api_base": tiny_server.url}
    assert litellm.completion(**older, **asked).choices[0].message.content
    pieces = litellm.completion(**older, **asked, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces)
    more = {**asked, "user": "ann", "seed": -1, "n": 2, "metadata": {"trace": "1"}, "presence_penalty": 0.5}
    assert len(litellm.completion(**places[0], **more).choices) == 2
    text = litellm.text_completion(
        model="text-completion-openai/tiny",
        api_base=f"{tiny_server.url}/v1",
        prompt=PROMPT,
        max_tokens=9,
        **key,
    )
    assert text.choices[0].text == expected
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    ]
    with pytest.raises(litellm.BadRequestError, match="tools requests tools"):
        litellm.completion(**places[0], **asked, tools=tools)
    assert litellm.completion(**places[0], **asked, tools=tools, tool_choice="none").choices
    for place in ({**places[0]}, older):
        found = litellm.embedding(**place, input=["a dog", "a cat"])
        assert [len(row["embedding"]) for row in found.data] == [64, 64]
    found = litellm.embedding(**places[0], input="a dog", dimensions=8, allowed_openai_params=["dimensions"])
    assert len(found.data[0]["embedding"]) == 8


def test_llm(tiny_server: Served, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its documentation has it: a file that names models of servers that speak OpenAI's protocol."""
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "")
    llm = pytest.importorskip("llm")
    place = f"api_base: {tiny_server.url}/v1"
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: chat\n  model_name: tiny\n  {place}\n  supports_schema: true\n"
        f"- model_id: text\n  model_name: tiny\n  {place}\n  completion: true\n"
    )
    chat = llm.get_model("chat")
    response = chat.prompt(PROMPT, max_tokens=9, temperature=0, stream=False, key="none")
    assert response.text() == expected and response.usage().output > 0
    assert "".join(chat.prompt(PROMPT, max_tokens=9, seed=-1, temperature=0, key="none")) == expected
    conversation = chat.conversation()
    assert conversation.prompt(PROMPT, max_tokens=9, stream=False, key="none").text() == expected
    assert conversation.prompt("Go on.", system="Be brief.", max_tokens=4, key="none").text()
    schema = {"type": "object", "properties": {"good": {"type": "boolean"}}, "required": ["good"]}
    formed = chat.prompt(PROMPT, schema=schema, max_tokens=60, key="none", stream=False).text()
    assert formed.lstrip().startswith("{")
    text = llm.get_model("text")
    assert text.prompt(PROMPT, max_tokens=9, temperature=0, stream=False, key="none").text() == expected
    assert "".join(text.prompt(PROMPT, max_tokens=9, temperature=0, key="none")) == expected


def test_the_server_is_well_after_all_of_them(tiny_server: Served) -> None:
    log = "".join(tiny_server.log)
    assert "Traceback" not in log and tiny_server.http.get("/health").json()["restarts"] == 0
    assert not any(
        line for line in tiny_server.http.get("/metrics").text.splitlines() if 'status="500"' in line
    )
