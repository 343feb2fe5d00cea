"""Answers side by side: each is what it would be alone, whatever the others do."""

from __future__ import annotations

import itertools
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import random_gate

from loramix import Engine
from loramix.errors import InvalidPrompt, LoramixError, UnknownSkill
from loramix.models import bases
from loramix.models.early_head import EarlyHead
from loramix.pack.edit import remove_skill, set_gate
from loramix.runtime.llama.batch_context import BatchContext
from loramix.runtime.llama.context import Context
from loramix.runtime.mix_turns import MAX_WAIT, SLICE
from loramix.runtime.scheduler import Scheduler
from loramix.runtime.stream import Stream

MIXES: list[dict[str, Any]] = [
    {"mix": "base"},
    {"mix": "sentiment"},
    {"mix": "summarize"},
    {"mix": "sentiment=0.5,summarize=0.5"},
    {"policy": "each"},
    {"policy": "token"},
]


class Heard:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.answers: dict[int, Any] = {}
        self.errors: dict[int, LoramixError] = {}

    def started(self, number: int, stream: Stream) -> None:
        self.texts[number] = ""

    def text_added(self, number: int, stream: Stream, text: str) -> None:
        self.texts[number] += text

    def ended(self, number: int, stream: Stream) -> None:
        self.answers[number] = stream.answer

    def failed(self, number: int, error: LoramixError) -> None:
        self.errors[number] = error


def requests(count: int) -> list[tuple[str, dict[str, Any]]]:
    rng = random.Random(1)
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "seven",
        "wizards",
        "box",
    ]
    found = []
    for i in range(count):
        options = {**MIXES[i % len(MIXES)], "max_tokens": rng.randrange(1, 40)}
        if i % 5 == 0:
            options |= {"temperature": 1.0, "seed": i}
        found.append((" ".join(rng.choices(words, k=rng.randrange(1, 12))), options))
    return found


def run(engine: Any, asked: list[tuple[str, dict[str, Any]]], **options: Any) -> Heard:
    heard = Heard()
    scheduler = Scheduler(engine, heard, **options)
    waiting = list(enumerate(asked))
    while waiting or len(scheduler):
        while waiting and len(scheduler) < options["parallel"]:
            number, (prompt, how) = waiting.pop(0)
            scheduler.add(number, lambda prompt=prompt, how=how: engine.stream(prompt, **how))
        scheduler.step()
    assert not heard.errors
    return heard


@pytest.mark.parametrize("n_cells", [4096, 256])
def test_answers_side_by_side_are_those_of_one_at_a_time(tiny_engine: Any, n_cells: int) -> None:
    """With little room answers give their place up and come back."""
    asked = [(prompt, {**how, "top_logprobs": 2}) for prompt, how in requests(18)]
    alone = [tiny_engine.generate(prompt, **how) for prompt, how in asked]
    heard = run(tiny_engine, asked, parallel=6, n_cells=n_cells)
    for number, answer in enumerate(alone):
        found = heard.answers[number]
        assert (found.text, found.tokens, found.mixes) == (answer.text, answer.tokens, answer.mixes)
        ours, theirs = ([s.log_probability for s in a.scores] for a in (found, answer))
        assert ours == pytest.approx(theirs, abs=0.1)  # float32 weights: kernels differ by batch size
        assert found.usage["completion_tokens"] == len(answer.tokens)
        assert heard.texts[number] == answer.text


def test_prompts_that_fill_the_batch_alone(tiny_engine: Any) -> None:
    asked = [("dog " * 45 + str(i), {"mix": MIXES[i % 3]["mix"], "max_tokens": 30}) for i in range(5)]
    alone = [tiny_engine.generate(prompt, **how).tokens for prompt, how in asked]
    heard = run(tiny_engine, [*asked, ("dog", {"mix": "base", "max_tokens": 9})], parallel=8, n_cells=256)
    assert [heard.answers[number].tokens for number in range(5)] == alone


def test_answers_of_one_mix_are_decoded_in_one_batch(tiny_engine: Any, batch_sizes: list[int]) -> None:
    run(tiny_engine, [(f"dog {i}", {"mix": "sentiment", "max_tokens": 30}) for i in range(8)], parallel=8)
    assert max(batch_sizes) == 8 and len(batch_sizes) < 60  # one by one it would be 240


@pytest.mark.parametrize("how", [{}, {"policy": "blend"}, {"mix": "summarize"}, {"policy": "base"}])
def test_a_long_prompt_is_read_between_the_tokens_of_others(
    tiny_pack: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    monkeypatch.setattr(Context, "N_BATCH", 32)
    # another skill than the running answer's, so that both begin with an empty cache
    monkeypatch.setattr(EarlyHead, "probabilities", lambda self, logits: np.array([0.05, 0.9, 0.05]))
    heard, long, short = Heard(), "dog " * 45 + "fox", {"mix": "sentiment", "max_tokens": 60}
    with Engine.open(tiny_pack, n_ctx=256, n_threads=1) as engine:
        scheduler = Scheduler(engine, heard, parallel=4)
        scheduler.add(1, lambda: engine.stream("a dog", **short))
        before = partial(engine.routing_request, long, **{k: v for k, v in how.items() if k != "max_tokens"})
        scheduler.add(2, lambda: engine.stream(long, max_tokens=6, **how), before)
        said = [len(heard.texts[1])]
        while 2 not in heard.texts or not heard.texts[2]:
            scheduler.step()
            said.append(len(heard.texts[1]))
        while len(scheduler):
            scheduler.step()
    n_prompt = heard.answers[2].usage["prompt_tokens"]
    assert n_prompt > 5 * 32 and len(set(said)) >= n_prompt // 32, "somebody had to wait for all of it"
    with Engine.open(tiny_pack, n_ctx=256, n_threads=1) as engine:
        alone = engine.generate(long, max_tokens=6, **how)
    found = heard.answers[2]
    assert (found.tokens, found.mixes, found.usage) == (alone.tokens, alone.mixes, alone.usage)
    assert found.route.probabilities == alone.route.probabilities
    assert found.timings["first_token"] > 0


def test_a_long_prompt_can_be_given_up_while_it_is_read(
    tiny_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "N_BATCH", 32)
    heard, long = Heard(), "dog " * 45
    scheduler = Scheduler(tiny_engine, heard, parallel=4)
    for number, how in ((1, {}), (2, {"mix": "sentiment"})):
        before = partial(tiny_engine.routing_request, long, **how)
        scheduler.add(number, lambda how=how: tiny_engine.stream(long, **how), before)
        scheduler.step()
        assert len(scheduler) == 1
        scheduler.cancel(number)
        assert len(scheduler) == 0
    scheduler.add(3, lambda: tiny_engine.stream(long), partial(tiny_engine.routing_request, "dog " * 999))
    assert isinstance(heard.errors[3], InvalidPrompt) and len(scheduler) == 0
    assert heard.answers == {} and tiny_engine.generate(long, max_tokens=3).tokens


def test_an_answer_that_shares_its_mix_with_none_keeps_a_context_of_its_own(
    tiny_engine: Any, batch_sizes: list[int]
) -> None:
    asked = [("a dog", {"mix": mix, "max_tokens": 30}) for mix in ("base", "sentiment", "summarize")]
    alone = [tiny_engine.generate(prompt, **how).tokens for prompt, how in asked]
    heard = run(tiny_engine, asked, parallel=8)
    assert [heard.answers[number].tokens for number in range(3)] == alone
    assert batch_sizes == []


def test_the_last_of_a_mix_goes_back_to_that_context(tiny_engine: Any, batch_sizes: list[int]) -> None:
    asked = [("a dog " * n, {"mix": "sentiment", "max_tokens": limit}) for n, limit in ((2, 60), (20, 9))]
    alone = [tiny_engine.generate(prompt, **how).tokens for prompt, how in asked]
    heard = run(tiny_engine, [*asked, ("the fox", {"mix": "summarize", "max_tokens": 50})], parallel=8)
    assert [heard.answers[number].tokens for number in range(2)] == alone
    assert set(batch_sizes) == {2} and len(batch_sizes) < 10


def test_the_mix_of_most_answers_goes_first_and_none_starves(
    tiny_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []
    real = BatchContext.decode

    def noted(self: BatchContext, tokens: Any) -> Any:
        turns.append(str(self.mix))
        return real(self, tokens)

    monkeypatch.setattr(BatchContext, "decode", noted)
    rare = "sentiment=0.5,summarize=0.5"
    mixes = ["sentiment"] * 4 + ["summarize"] * 3 + [rare] * 2
    heard = run(
        tiny_engine, [(f"dog {i}", {"mix": m, "max_tokens": 200}) for i, m in enumerate(mixes)], parallel=9
    )
    all_three = turns[turns.index(rare) :][:200]
    kinds = [mix for mix, _ in itertools.groupby(all_three)]
    assert kinds.count("sentiment=1") > kinds.count("summarize=1") > 1 < kinds.count(rare)
    waits = [len(list(rest)) for mix, rest in itertools.groupby(all_three, rare.__eq__) if not mix]
    assert SLICE < max(waits) <= MAX_WAIT + 2 * SLICE
    assert len(heard.answers) == 9


def test_one_that_is_cancelled_or_fails_leaves_the_others(tiny_engine: Any) -> None:
    asked = requests(6)
    alone = [tiny_engine.generate(prompt, **how).tokens for prompt, how in asked]
    heard = Heard()
    scheduler = Scheduler(tiny_engine, heard, parallel=8)
    for number, (prompt, how) in enumerate(asked):
        scheduler.add(number, lambda prompt=prompt, how=how: tiny_engine.stream(prompt, **how))
    long = {"mix": "sentiment", "max_tokens": 100}
    scheduler.add(77, lambda: tiny_engine.stream("a dog", **long))
    scheduler.add(88, lambda: tiny_engine.stream("a dog", mix="nobody"))
    for _ in range(12):
        scheduler.step()
    scheduler.cancel(77)
    while len(scheduler):
        scheduler.step()
    assert isinstance(heard.errors[88], UnknownSkill)
    assert 77 not in heard.answers and len(heard.texts[77]) > 0
    assert [heard.answers[number].tokens for number in range(6)] == alone


def test_a_pack_that_changes_while_answers_run(pack: Path, tiny_base: Path) -> None:
    with Engine.open(pack, n_ctx=256, n_threads=1) as engine:
        asked = [("a lazy dog", {"mix": mix, "max_tokens": 40}) for mix in ("sentiment", "summarize") * 2]
        alone = engine.generate("a lazy dog", mix="sentiment", max_tokens=40).tokens
        heard = Heard()
        scheduler = Scheduler(engine, heard, parallel=4)
        for number, (prompt, how) in enumerate(asked):
            scheduler.add(number, lambda prompt=prompt, how=how: engine.stream(prompt, **how))
        for _ in range(20):
            scheduler.step()
        remove_skill(pack, "summarize")
        set_gate(pack, random_gate(["sentiment"], bases.digest(tiny_base)))
        assert scheduler.reload() is True
        while len(scheduler):
            scheduler.step()
        assert sorted(heard.errors) == [1, 3] and isinstance(heard.errors[1], UnknownSkill)
        assert [heard.answers[number].tokens for number in (0, 2)] == [alone, alone]
