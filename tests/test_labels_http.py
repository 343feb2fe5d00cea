"""Labels in both HTTP protocols, on the command line, in batch files, and in what `loramix pack add` writes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import ASK, Served, served
from test_cli import refused, run
from test_labels import SETS, set_labels

from loramix.pack.manifest import Labels, read_manifest
from loramix.pack.pack import Pack
from loramix.runtime.label_calibration import HIGHEST, LOWEST, Branch, fit_temperature, loss

LABELS = SETS["shared beginnings"]
MODEL = "tiny:sentiment"


@pytest.fixture(scope="module")
def server(tiny_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The tiny pack whose skill sentiment has labels, served."""
    pack = Path(shutil.copytree(tiny_pack, tmp_path_factory.mktemp("labelled") / "tiny"))
    set_labels(pack, LABELS, 2.0)
    own = {"LORAMIX_CACHE": str(tmp_path_factory.getbasetemp() / "cache")}
    with served(pack, "--ctx", "512", "--threads", "1", **own) as server:
        yield server


def checked(found: dict[str, Any], text: str) -> dict[str, float]:
    """The labels of a ``loramix`` field, checked."""
    labels: dict[str, float] = found["labels"]
    assert set(labels) == set(LABELS) and text == next(iter(labels)) and "step_labels" not in found
    assert sum(labels.values()) == pytest.approx(1, abs=1e-5)
    assert list(labels.values()) == sorted(labels.values(), reverse=True)
    return labels


def events(text: str) -> list[Any]:
    rows = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(row) for row in rows]


def test_openai_whole_and_streamed(server: Served) -> None:
    whole = server.chat(MODEL).json()
    text = whole["choices"][0]["message"]["content"]
    labels = checked(whole["loramix"], text)
    chunks = events(server.chat(MODEL, stream=True).text)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == text
    assert chunks[-1]["loramix"]["labels"] == labels and "labels" not in chunks[0]["loramix"]
    said = server.post("/v1/completions", model=MODEL, prompt=[ASK["content"], "x"]).json()
    assert said["choices"][0]["text"] == text and said["loramix"]["labels"] == labels
    for choice, found in zip(said["choices"], said["loramix"]["choices"], strict=True):
        checked(found, choice["text"])
    short = server.chat(MODEL, max_tokens=1).json()
    assert short["choices"][0]["message"]["content"] == text
    assert short["choices"][0]["finish_reason"] == "stop"


def test_ollama_whole_and_streamed(server: Served) -> None:
    for path, body in (("/api/chat", {"messages": [ASK]}), ("/api/generate", {"prompt": ASK["content"]})):
        whole = server.post(path, model=MODEL, stream=False, **body).json()
        text = whole["response"] if "response" in whole else whole["message"]["content"]
        labels = checked(whole["loramix"], text)
        lines = [json.loads(line) for line in server.post(path, model=MODEL, **body).text.splitlines()]
        assert lines[-1]["done"] and lines[-1]["loramix"]["labels"] == labels
        assert all("loramix" not in line for line in lines[:-1])


def test_choices_are_drawn_from_the_probabilities(server: Served) -> None:
    found = server.chat(MODEL, n=8, temperature=1, seed=1).json()
    again = server.chat(MODEL, n=8, temperature=1, seed=1).json()
    texts = [choice["message"]["content"] for choice in found["choices"]]
    assert set(texts) <= set(LABELS)
    assert texts == [choice["message"]["content"] for choice in again["choices"]]
    assert all(part["labels"] == found["loramix"]["labels"] for part in found["loramix"]["choices"])


def test_log_probabilities_are_those_of_the_label(server: Served) -> None:
    found = server.chat(MODEL, logprobs=True, top_logprobs=2).json()
    text = found["choices"][0]["message"]["content"]
    tokens = found["choices"][0]["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == text
    total = math.exp(sum(token["logprob"] for token in tokens))
    beginnings = sum(p for label, p in found["loramix"]["labels"].items() if label.startswith(text))
    assert total == pytest.approx(beginnings, abs=1e-5)


def test_opting_out_and_constraints(server: Served) -> None:
    def text(**body: Any) -> str:
        said = server.chat(**{"model": "tiny", **body}).json()
        assert "labels" not in said["loramix"]
        return str(said["choices"][0]["message"]["content"])

    mix = {"mix": {"sentiment": 1}}
    free = text(loramix={**mix, "labels": False}, max_tokens=9)
    assert free not in LABELS
    assert text(model=MODEL, loramix={"labels": False}, max_tokens=9) == free
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1, 2]}}}
    assert text(model=MODEL, response_format=schema) in ("1", "2")
    said = server.post("/api/chat", model=MODEL, messages=[ASK], stream=False, format={"enum": [1, 2]}).json()
    assert said["message"]["content"] in ("1", "2") and "labels" not in said["loramix"]
    checked(
        server.chat("tiny", loramix={**mix, "labels": True}).json()["loramix"],
        server.chat(MODEL).json()["choices"][0]["message"]["content"],
    )
    wrong = server.chat("tiny", loramix={"labels": 7})
    assert wrong.status_code == 400 and "loramix.labels" in wrong.json()["error"]["message"]


def test_the_command_line(pack: Path, tmp_path: Path) -> None:
    set_labels(pack, LABELS)
    options = ["--pack", pack, "--ctx", 256, "--threads", 1, "--mix", "sentiment"]
    shown = run("run", *options, "--show-route", "hello")
    assert (
        shown.stdout.strip() in LABELS and f"[{shown.stdout.strip()} " in shown.stderr and "%" in shown.stderr
    )
    whole = json.loads(run("run", *options, "--json", "hello").stdout)
    checked(whole, whole["text"])
    assert whole["text"] == shown.stdout.strip()
    free = json.loads(run("run", *options, "--no-labels", "--json", "-n", 9, "hello").stdout)
    assert free["text"] not in LABELS and "labels" not in free
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello"}\n{"prompt": "x"}\n')
    assert run("batch", tmp_path / "in.jsonl", tmp_path / "out.jsonl", *options).exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows[0]["labels"] == whole["labels"]
    for row in rows:
        checked(row, row["text"])


RECIPE = """
name = "mood"
description = "good or bad"
metrics = ["accuracy"]
max_tokens = 6
{labels}
[data]
license = "none"
how = "by hand"
[instructions]
any = ["Mood: {{input}}", "{{input}}\\n\\nMood?"]
"""


def recipe(path: Path, labels: str = "") -> Path:
    path.write_text(RECIPE.format(labels=labels))
    return path


def test_pack_add_writes_the_labels_and_calibrates_them(pack: Path, tmp_path: Path) -> None:
    adapter = Pack.load(pack).adapter_path("sentiment")
    data = tmp_path / "data"
    data.mkdir()
    rows = [
        {"split": "dev" if i % 2 else "train", "input": f"day {i}", "target": target}
        for i in range(60)
        for target in (("good", "bad", "so so")[i // 2 % 3],)
    ]
    (data / "mood.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with_labels = recipe(tmp_path / "mood.toml", 'labels = ["good", "bad", "so so"]')
    keep = ["--recipe", with_labels, "--replace"]

    def added(*options: Any) -> Labels:
        result = run("pack", "add", pack, "mood", adapter, *options)
        assert result.exit_code == 0, result.output
        return Pack.load(pack).skill("mood").closed_labels

    assert added("--recipe", with_labels) == Labels(("good", "bad", "so so"), None)
    fitted = added(*keep, "--data", data)
    assert fitted.texts == ("good", "bad", "so so")
    assert fitted.temperature is not None and LOWEST < fitted.temperature <= HIGHEST
    assert fitted.temperature > 1.5  # random weights are sure of themselves and wrong
    own = recipe(tmp_path / "mood2.toml")
    assert added("--recipe", own, "--replace", "--data", data).texts == ("bad", "good", "so so")
    assert added("--recipe", own, "--replace") == Labels()
    assert added("--description", "free", "--max-tokens", 4, "--replace") == Labels()
    refused(
        run("pack", "add", pack, "x", adapter, "--description", "d", "--max-tokens", 4, "--data", data),
        code=2,
        says="--recipe",
    )
    said = json.loads(run("run", "--pack", pack, "--mix", "mood", "--ctx", 256, "--json", "day 3").stdout)
    assert "labels" not in said
    assert added(*keep, "--data", data) == fitted
    said = json.loads(run("run", "--pack", pack, "--mix", "mood", "--ctx", 256, "--json", "day 3").stdout)
    assert set(said["labels"]) == {"good", "bad", "so so"}
    assert read_manifest(pack).skills[-1].label_temperature == fitted.temperature


@pytest.mark.parametrize("true", [0.3, 1.0, 2.5, 8.0])
def test_the_fit_finds_the_temperature_that_the_rows_were_drawn_with(true: float) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    rows = []
    for _ in range(1500):
        logits = rng.normal(0, 3, 5).astype(np.float32)
        odds = np.exp((logits - logits.max()) / true)
        rows.append([Branch(logits, int(rng.choice(5, p=odds / odds.sum())))])
    found = fit_temperature(rows)
    assert found == pytest.approx(true, rel=0.2)
    assert loss(rows, found) <= min(loss(rows, found * 1.05), loss(rows, found / 1.05))
