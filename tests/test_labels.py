"""Label skills answer with one of their labels, with probabilities: single, in streams, in batches, after a reload."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from test_scheduler import Heard
from tiny import random_gate

from loramix import Engine
from loramix.errors import InvalidPrompt
from loramix.models import bases
from loramix.models.mixing import Mix
from loramix.pack.edit import set_gate
from loramix.pack.manifest import read_manifest, write_manifest
from loramix.runtime import labels as labels_module
from loramix.runtime.batch import run_batch
from loramix.runtime.decoder import DecodeRequest
from loramix.runtime.scheduler import Scheduler

SETS: dict[str, tuple[str, ...]] = {
    "two": ("positive", "negative"),
    "one beginning": ("tone: up", "tone: down"),
    "shared beginnings": ("fear", "fury", "joy", "joyful", "join", "neutral"),
    "one begins another": ("card", "card lost", "card lost or stolen", "pin"),
    "other scripts": ("ja", "nein", "vielleicht", "häufig", "да", "да, но", "いいえ"),
    "many": tuple(
        f"topic {a}{b} of {c}" for a, b, c in itertools.product("ab", "xyz", ("us", "them", "theme"))
    ),
}
PROMPTS = [
    "Is it good?",
    "the quick brown fox",
    "why is it positive? say more",
    "x",
    "a much longer text " * 5,
]


def set_labels(
    pack: Path, labels: Sequence[str], temperature: float | None = None, skill: str = "sentiment"
) -> Path:
    """Give a skill of a pack labels."""
    manifest = read_manifest(pack)
    skills = tuple(
        msgspec.structs.replace(entry, labels=tuple(labels), label_temperature=temperature)
        if entry.name == skill
        else entry
        for entry in manifest.skills
    )
    write_manifest(pack, msgspec.structs.replace(manifest, skills=skills))
    return pack


@pytest.fixture
def labelled(pack: Path) -> Path:
    """The tiny pack, whose skill sentiment has six labels."""
    return set_labels(pack, SETS["shared beginnings"], 2.0)


@pytest.fixture
def engine(labelled: Path) -> Iterator[Engine]:
    with Engine.open(labelled, n_ctx=256, n_threads=1) as opened:
        yield opened


def brute_force(
    engine: Engine, prompt: str, labels: Sequence[str], temperature: float, mix: str
) -> dict[str, float]:
    """Score each label alone: at each token the softmax over the tokens with which a label can go on."""
    ids = engine.prepare(prompt).tokens
    paths = {label: [*engine.model.tokenize(label), engine.model.eot] for label in labels}
    found = {}
    for label, path in paths.items():
        total = 0.0
        for i, token in enumerate(path):
            rivals = sorted(
                {other[i] for other in paths.values() if other[:i] == path[:i] and len(other) > i}
            )
            logits = engine.decode(DecodeRequest(Mix.parse(mix), ids + path[:i], len(ids))).logits
            odds = np.exp((logits[rivals].astype(np.float64) - logits[token]) / temperature)
            total -= math.log(odds.sum())
        found[label] = math.exp(total)
    return found


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("temperature", [1.0, 0.4, 3.0])
def test_probabilities_are_those_of_scoring_every_label(pack: Path, name: str, temperature: float) -> None:
    labels = SETS[name]
    set_labels(pack, labels, temperature)
    with Engine.open(pack, n_ctx=256, n_threads=1) as engine:
        for prompt, mix in itertools.product(PROMPTS[:3], ("sentiment", "sentiment=0.25")):
            answer = engine.generate(prompt, mix=mix)
            wanted = brute_force(engine, prompt, labels, temperature, mix)
            assert sum(wanted.values()) == pytest.approx(1)
            assert {label: wanted[label] for label in answer.labels} == pytest.approx(
                answer.labels, rel=0.02, abs=1e-4
            )
            assert list(answer.labels.values()) == sorted(answer.labels.values(), reverse=True)
            assert answer.text == next(iter(answer.labels)) and answer.finish_reason == "stop"
            assert answer.labels[answer.text] == pytest.approx(max(wanted.values()), rel=0.02)
            missing = [label for label in labels if label not in answer.labels]
            assert all(wanted[label] < labels_module.LISTED for label in missing)
            if len(labels) <= labels_module.ALL_LABELS:
                assert not missing and sum(answer.labels.values()) == pytest.approx(1)


def test_an_answer_that_is_no_label_cannot_happen(pack: Path) -> None:
    """Random weights, all label sets, greedy and hot, any limit: without labels the same requests say other things."""
    asked: list[dict[str, Any]] = [
        {"mix": "sentiment", **options}
        for options in (
            {}, {"max_tokens": 1}, {"temperature": 5.0, "seed": 1}, {"temperature": 1.0, "top_k": 1, "seed": 2},
            {"temperature": 0.7, "top_p": 0.3, "seed": 3}, {"repeat_penalty": 100.0}, {"presence_penalty": 2.0},
            {"temperature": 100.0, "min_p": 1.0, "seed": 4}, {"stop": ["zzz", "\n"]}, {"top_logprobs": 3},
        )
    ]  # fmt: skip
    for labels in SETS.values():
        set_labels(pack, labels)
        with Engine.open(pack, n_ctx=256, n_threads=1) as engine:
            for prompt, options in itertools.product(PROMPTS, asked):
                answer = engine.generate(prompt, **options)
                assert answer.text in labels and answer.finish_reason == "stop"
                assert answer.usage["completion_tokens"] == len(answer.tokens) == len(answer.mixes)
                assert engine.model.tokenize(answer.text) == answer.tokens
                free = engine.generate(prompt, labels=False, **{**options, "max_tokens": 8})
                assert free.text not in labels and free.labels == {}


def test_an_old_pack_and_other_mixes_are_unchanged(labelled: Path, tiny_pack: Path) -> None:
    mixes = ["base", "summarize", "sentiment=0.5,summarize=0.5", "summarize=2"]
    with (
        Engine.open(tiny_pack, n_ctx=256, n_threads=1) as old,
        Engine.open(labelled, n_ctx=256, n_threads=1) as new,
    ):
        for prompt, mix in itertools.product(PROMPTS, mixes):
            before, after = (engine.generate(prompt, mix=mix, max_tokens=6) for engine in (old, new))
            assert before.tokens == after.tokens and before.labels == after.labels == {}
        for prompt in PROMPTS:
            before = old.generate(prompt, mix="sentiment", max_tokens=6)
            after = new.generate(prompt, mix="sentiment", max_tokens=6, labels=False)
            assert before.tokens == after.tokens and after.labels == {}


def test_temperature_flattens_and_keeps_the_order(pack: Path) -> None:
    found = {}
    for temperature in (0.5, 1.0, 4.0):
        set_labels(pack, SETS["two"], temperature)
        with Engine.open(pack, n_ctx=256, n_threads=1) as engine:
            found[temperature] = [engine.generate(prompt, mix="sentiment").labels for prompt in PROMPTS]
    for sharp, plain, flat in zip(*found.values(), strict=True):
        assert list(sharp) == list(plain) == list(flat)
        (a, b), (c, d), (e, f) = (tuple(map(math.log, row.values())) for row in (sharp, plain, flat))
        assert a - b == pytest.approx(2 * (c - d), rel=1e-3) and e - f == pytest.approx((c - d) / 4, rel=1e-3)


def test_draws_follow_the_probabilities_and_the_seed(engine: Engine) -> None:
    sure = engine.generate(PROMPTS[0], mix="sentiment").labels
    drawn = [engine.generate(PROMPTS[0], mix="sentiment", temperature=1.0, seed=i).text for i in range(400)]
    for label, p in sure.items():
        assert abs(drawn.count(label) / 400 - p) < 4 * math.sqrt(p * (1 - p) / 400) + 1e-3, label
    assert len(set(drawn)) > 1
    again = [engine.generate(PROMPTS[0], mix="sentiment", temperature=1.0, seed=i).text for i in range(20)]
    assert again == drawn[:20]
    answer = engine.generate(PROMPTS[0], mix="sentiment", temperature=1.0, seed=0)
    assert answer.labels == pytest.approx(sure)


@pytest.mark.parametrize("name", SETS)
def test_streams_and_batches_give_what_a_single_request_gives(pack: Path, name: str, tmp_path: Path) -> None:
    set_labels(pack, SETS[name], 1.5)
    prompts = [f"{text} {i}" for i in range(4) for text in PROMPTS]
    with Engine.open(pack, n_ctx=256, n_threads=1) as engine:
        alone = [engine.generate(prompt, mix="sentiment") for prompt in prompts]
        for prompt, answer in zip(prompts, alone, strict=True):
            stream = engine.stream(prompt, mix="sentiment")
            assert "".join(stream) == answer.text and stream.answer is not None
            assert stream.answer.labels == answer.labels
        source = tmp_path / "in.jsonl"
        source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        run_batch(engine, source, tmp_path / "out.jsonl", mix="sentiment", parallel=6)
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [row["text"] for row in rows] == [answer.text for answer in alone]


@pytest.mark.parametrize("name", ["shared beginnings", "many"])
def test_side_by_side_with_other_answers(pack: Path, name: str) -> None:
    """Labels of the same mix as answers in free text, other mixes and draws: each is what it is alone."""
    set_labels(pack, SETS[name], 1.5)
    options: list[dict[str, Any]] = [
        {"mix": "sentiment"}, {"mix": "summarize"}, {"mix": "sentiment", "labels": False},
        {"mix": "sentiment", "temperature": 1.0, "seed": 7}, {"mix": "base"}, {"mix": "sentiment=0.5"},
    ]  # fmt: skip
    asked = [(f"{PROMPTS[i % 5]} {i}", {**options[i % len(options)], "max_tokens": 9}) for i in range(24)]
    with Engine.open(pack, n_ctx=256, n_threads=1) as engine:
        alone = [engine.generate(prompt, **given) for prompt, given in asked]
        heard = Heard()
        scheduler = Scheduler(engine, heard, parallel=5, n_cells=256)
        for number, (prompt, given) in enumerate(asked):
            scheduler.add(number, partial(engine.stream, prompt, **given))
        while len(scheduler):
            scheduler.step()
        scheduler.close()
        assert not heard.errors
        for number, answer in enumerate(alone):
            assert heard.texts[number] == heard.answers[number].text == answer.text
            assert heard.answers[number].labels == pytest.approx(answer.labels)


def test_in_turn_each_label_skill_says_its_label(labelled: Path, tiny_base: Path) -> None:
    set_labels(labelled, SETS["two"], skill="summarize")
    set_gate(labelled, random_gate(["sentiment", "summarize"], bases.digest(tiny_base)))
    seen = set()
    with Engine.open(labelled, n_ctx=256, n_threads=1) as engine:
        for prompt in (f"{text} {i}" for text in PROMPTS for i in range(12)):
            answer = engine.generate(prompt)
            names = [next(iter(step.scales), "base") for step in answer.route.steps]
            seen.add(tuple(names))
            if "base" in names:
                assert answer.labels == {}
                continue
            sets = {"sentiment": SETS["shared beginnings"], "summarize": SETS["two"]}
            lines = answer.text.split("\n")
            assert len(lines) == len(names) == len(answer.step_labels)
            for line, name, found in zip(lines, names, answer.step_labels, strict=True):
                assert line in sets[name] and set(found) == set(sets[name]) and line == next(iter(found))
            assert answer.labels == answer.step_labels[0]
    assert {len(names) for names in seen} == {1, 2} and any(names != ("base",) for names in seen)


def test_the_constraint_of_the_request_wins(engine: Engine) -> None:
    for limit in ({"grammar": 'root ::= "yes" | "no"'}, {"json_schema": {"enum": [1, 2]}}):
        answer = engine.generate(PROMPTS[0], mix="sentiment", max_tokens=8, **limit)
        assert answer.text in ("yes", "no", "1", "2") and answer.labels == {}


def test_stop_strings_cut_the_text_and_leave_the_probabilities(engine: Engine) -> None:
    whole = engine.generate(PROMPTS[0], mix="sentiment")
    cut = engine.generate(PROMPTS[0], mix="sentiment", stop=[whole.text[1:]])
    assert cut.text == whole.text[:1] and cut.labels == whole.labels
    assert engine.generate(PROMPTS[0], mix="sentiment", stop="never said").text == whole.text


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 5}])
def test_log_probabilities_of_the_tokens_multiply_to_that_of_the_label(
    pack: Path, options: dict[str, Any]
) -> None:
    set_labels(pack, SETS["shared beginnings"], 2.0)
    with Engine.open(pack, n_ctx=256, n_threads=1) as engine:
        for prompt in PROMPTS:
            stream = engine.stream(prompt, mix="sentiment", top_logprobs=2, **options)
            text = "".join(stream)
            answer = stream.answer
            assert answer is not None and [row.token for row in answer.scores] == answer.tokens
            total = math.exp(sum(row.log_probability for row in answer.scores))
            ends = (
                1.0
                if text != "joy"
                else answer.labels["joy"] / (answer.labels["joy"] + answer.labels["joyful"])
            )
            assert total * ends == pytest.approx(answer.labels[text])
            assert all(1 <= len(row.top) <= 2 for row in answer.scores)
            assert b"".join(row[0] for row in stream.scored(0, len(answer.tokens))).decode() == text


@pytest.mark.parametrize("labels", [("xa", "xb"), SETS["one beginning"], SETS["many"]])
def test_what_was_asked_before_changes_no_bit(pack: Path, labels: tuple[str, ...]) -> None:
    set_labels(pack, labels)
    with Engine.open(pack, n_ctx=256, n_threads=1) as engine:
        first = [engine.generate(prompt, mix="sentiment").labels for prompt in PROMPTS]
        for options in ({}, {"labels": False, "max_tokens": 3}, {"temperature": 9.0, "seed": 3}):
            for prompt, wanted in zip(PROMPTS, first, strict=True):
                engine.generate(prompt, mix="sentiment", **options)
                assert engine.generate(prompt, mix="sentiment").labels == wanted


def test_labels_need_room_in_the_context(pack: Path) -> None:
    set_labels(pack, SETS["one begins another"])
    with Engine.open(pack, n_ctx=64, n_threads=1) as engine:
        room = 64 - len(engine.prepare("x").tokens) + 1
        depth = engine.labels_of(Mix.parse("sentiment")).depth  # type: ignore[union-attr]
        assert depth > 5
        assert engine.generate("x" * (room - depth), mix="sentiment").text in SETS["one begins another"]
        with pytest.raises(InvalidPrompt, match="labels need"):
            engine.generate("x" * (room - depth + 1), mix="sentiment")
