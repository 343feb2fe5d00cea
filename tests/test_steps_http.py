"""The steps of a plan on the command line, in batch files, in both HTTP protocols, and on the page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from planning import CHAIN, ONE, TEXT, TWO
from serving import Served, served
from test_chat import chat
from test_cli import refused, run
from test_labels_http import events

from loramix import Engine
from loramix.pack.pack import Pack
from loramix.runtime.batch import run_batch

START = CHAIN.index(TEXT)
STEPS = [
    {"skill": "summarize", "on": "text", "text": [START, START + len(TEXT)]},
    {"skill": "sentiment", "on": "answer"},
]
SHOWN = [f'1. summarize on the text: "{TEXT}" ({len(TEXT)} characters)', "2. sentiment on answer 1"]


@pytest.fixture(scope="module")
def alone(plan_pack: Path) -> Iterator[Any]:
    """The answer to the chain."""
    with Engine.open(plan_pack, n_ctx=512, n_threads=1) as engine:
        yield engine.generate(CHAIN)


@pytest.fixture(scope="module")
def server(plan_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    own = {"LORAMIX_CACHE": str(tmp_path_factory.getbasetemp() / "cache")}
    with served(plan_pack, "--ctx", "512", "--threads", "1", **own) as server:
        yield server


def test_commands_show_the_steps(plan_pack: Path, alone: Any, tmp_path: Path) -> None:
    ran = run("run", "--pack", plan_pack, "--ctx", 512, "--show-route", CHAIN)
    assert ran.stdout == alone.text + "\n" and all(line in ran.stderr for line in SHOWN)
    whole = json.loads(run("run", "--pack", plan_pack, "--ctx", 512, "--json", CHAIN).stdout)
    assert whole["route"]["steps"] == STEPS and whole["answers"] == alone.parts
    shown = run("route", "--pack", plan_pack, "--ctx", 512, CHAIN).stdout
    assert all(line in shown for line in SHOWN)
    assert (
        json.loads(run("route", "--pack", plan_pack, "--ctx", 512, "--json", CHAIN).stdout)["steps"] == STEPS
    )
    page = tmp_path / "page.html"
    explained = run("explain", "--pack", plan_pack, "--ctx", 512, "--html", page, CHAIN)
    assert all(line in explained.stdout for line in SHOWN) and SHOWN[1] in page.read_text()
    said = chat(plan_pack, f"/policy each\n{CHAIN}\n/why\n")
    assert all(line in said.output for line in SHOWN), said.output


def test_control_characters_of_a_text_do_not_reach_the_terminal(plan_pack: Path) -> None:
    ran = run("run", "--pack", plan_pack, "--ctx", 512, "--show-route", "-n", 1, f"{TWO} \x1b[31mred")
    assert "1. summarize on the text" in ran.stderr and "\x1b[31m" not in ran.stderr


def test_batch_rows_hold_steps_and_answers(plan_pack: Path, alone: Any, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (CHAIN, ONE, CHAIN)))
    with Engine.open(plan_pack, n_ctx=512, n_threads=1) as engine:
        run_batch(engine, source, tmp_path / "out.jsonl")
    first, one, last = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["steps"] == last["steps"] == STEPS and first["answers"] == alone.parts
    assert first["text"] == last["text"] == alone.text
    assert "steps" not in one and "answers" not in one


def test_openai_whole_and_streamed(server: Served, alone: Any) -> None:
    ask = [{"role": "user", "content": CHAIN}]
    whole = server.chat(messages=ask).json()
    assert whole["choices"][0]["message"]["content"] == alone.text
    assert whole["loramix"]["steps"] == STEPS and whole["loramix"]["answers"] == alone.parts
    assert whole["usage"]["prompt_tokens"] == alone.usage["prompt_tokens"]
    chunks = events(server.chat(messages=ask, stream=True).text)
    assert chunks[0]["loramix"]["steps"] == STEPS and "answers" not in chunks[0]["loramix"]
    assert chunks[-1]["loramix"]["answers"] == alone.parts
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == alone.text
    plain = server.chat(messages=[{"role": "user", "content": ONE}]).json()
    assert plain["loramix"]["steps"] == [] and "answers" not in plain["loramix"]
    fixed = server.chat(messages=ask, response_format={"type": "json_object"}, max_tokens=4).json()
    assert fixed["loramix"]["steps"] == []


def test_ollama_route_and_explain(server: Served, alone: Any) -> None:
    ask = [{"role": "user", "content": CHAIN}]
    found = server.post("/api/chat", model="tiny", messages=ask, stream=False).json()
    assert found["message"]["content"] == alone.text
    assert found["loramix"]["steps"] == STEPS and found["loramix"]["answers"] == alone.parts
    assert server.post("/v1/route", messages=ask).json()["steps"] == STEPS
    explained = server.post("/v1/explain", model="tiny", messages=ask).json()
    assert explained["text"] == alone.text and explained["loramix"]["steps"] == STEPS
    assert explained["contributions"]["skills"] == ["sentiment", "summarize"]


def test_pack_add_takes_an_instruction(pack: Path) -> None:
    adapter = pack / "skills" / "sentiment.gguf"
    how = ["--description", "x", "--max-tokens", 5]
    assert run("pack", "add", pack, "mood", adapter, *how, "--instruction", "Mood? {input}").exit_code == 0
    assert run("pack", "add", pack, "tone", adapter, *how).exit_code == 0
    assert run("pack", "add", pack, "tale", adapter, "--recipe", "summarize").exit_code == 0
    found = {skill.name: skill.instruction for skill in Pack.load(pack).skills}
    assert (found["mood"], found["tone"]) == ("Mood? {input}", None)
    assert found["tale"] == "Summarize in one sentence:\n{input}"
    refused(run("pack", "add", pack, "m", adapter, *how, "--instruction", "Mood?"), code=2, says="{input}")
