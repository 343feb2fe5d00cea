"""KV by mix: whatever was asked before, an answer is what a fresh context gives."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from loramix.errors import InvalidPrompt, NativeError
from loramix.models.mixing import Mix
from loramix.runtime.kv_cache import MIN_SAVED_TOKENS, ContextPool, SavedContexts, reuse
from loramix.runtime.llama.context import Context
from loramix.runtime.llama.model import C

MIXES = [Mix.parse(text) for text in ("base", "sentiment", "summarize", "sentiment=0.5,summarize=0.5")]


@pytest.fixture
def pool(tiny_engine: Any) -> ContextPool:
    return pool_of(tiny_engine)  # the engine's model frees its contexts


def pool_of(engine: Any, **options: Any) -> ContextPool:
    given = {"n_ctx": 256, "n_threads": 1, "taps": (1, 2), "size": 2, **options}
    return ContextPool(engine.model, engine.decoder.adapters.get, **given)


def greedy(context: Context, prompt: list[int], kept: int, count: int = 3) -> list[int]:
    logits = context.decode(prompt[kept:])
    found = [int(logits.argmax())]
    while len(found) < count:
        found.append(int(context.decode([found[-1]]).argmax()))
    return found


def test_a_thousand_switches_answer_as_a_fresh_context_does(tiny_engine: Any) -> None:
    rng = random.Random(0)
    stems = [[rng.randrange(3, 250) for _ in range(rng.randrange(20, 200))] for _ in range(6)]
    prompts = [
        stem[: rng.randrange(8, len(stem))] + [rng.randrange(3, 250) for _ in range(4)]
        for stem in stems
        for _ in range(3)
    ]
    fresh: dict[tuple[Mix, int], list[int]] = {}
    for mix in MIXES:
        context = Context(tiny_engine.model, tiny_engine.decoder.adapters.get(mix), n_ctx=256, n_threads=1)
        for i, prompt in enumerate(prompts):
            context.truncate(0)
            fresh[mix, i] = greedy(context, prompt, 0)
        context.close()
    pool = pool_of(tiny_engine, saved_bytes=1_000_000)
    again = 0
    for _ in range(1000):
        mix, i = rng.choice(MIXES), rng.randrange(len(prompts))
        context, kept, _ = pool.prepare(mix, prompts[i])
        again += kept > MIN_SAVED_TOKENS
        assert greedy(context, prompts[i], kept) == fresh[mix, i], (mix, i, kept)
        assert pool.saved.nbytes <= 1_000_000 and len(pool.mixes) <= 2
    assert again > 200, "much is found again"


@pytest.mark.parametrize("length", [2, 40, 100])  # llama.cpp attends to fewer than 64 by another kernel
@pytest.mark.parametrize("mix", MIXES)
def test_a_prompt_asked_again_is_not_read_again(pool: ContextPool, mix: Mix, length: int) -> None:
    prompt, other = list(range(3, 3 + length)), list(range(120, 220))

    def ask() -> tuple[list[int], list[float], list[float]]:
        context, start, _ = pool.prepare(mix, prompt)
        logits = context.decode(prompt[start:])
        states = context.states(2)[-1].tolist()
        starts.append(start)
        said = [int(logits.argmax())]
        said.append(int(context.decode(said).argmax()))  # what is behind the prompt now
        return said, logits.tolist(), states

    starts: list[int] = []
    first = ask()
    assert ask() == first and ask() == first
    context = pool.prepare(mix, other).context
    context.decode(other)
    assert ask() == first
    assert starts == [0, length, length, length if length >= MIN_SAVED_TOKENS else 0]


def test_a_conversation_is_found_again_after_others(pool: ContextPool) -> None:
    first, second = list(range(3, 103)), list(range(103, 203))
    for mix in MIXES:
        for prompt in (first, second):
            context, kept, _ = pool.prepare(mix, prompt)
            assert kept == 0
            context.decode(prompt)
    for mix in MIXES:
        for prompt in (first, second):
            context, kept, _ = pool.prepare(mix, [*prompt, 7])
            assert kept == 100, f"{mix}: nothing is decoded twice"
            context.decode([7])


def test_taps_come_back_with_the_kv(pool: ContextPool) -> None:
    first, second = list(range(3, 103)), list(range(103, 203))
    context = pool.prepare(Mix.EMPTY, first).context
    context.decode(first)
    before = {layer: context.states(layer).copy() for layer in (1, 2)}
    pool.prepare(Mix.EMPTY, second).context.decode(second)
    context, kept, _ = pool.prepare(Mix.EMPTY, [*first, 9])
    assert kept == 100
    assert all(np.array_equal(context.states(layer), before[layer]) for layer in (1, 2))


def test_what_no_longer_acts_is_forgotten(pool: ContextPool) -> None:
    prompt = list(range(3, 103))
    for mix in MIXES:
        pool.prepare(mix, prompt).context.decode(prompt)
        pool.prepare(mix, [200])
    assert len(pool.saved) == 4
    pool.drop({"summarize"}, taps=(1, 2))
    assert len(pool.saved) == 2 and all("summarize" not in mix.scales for mix in pool.mixes)
    assert pool.prepare(MIXES[2], prompt).start == 0
    pool.drop(set(), taps=(0,))
    assert pool.prepare(Mix.EMPTY, prompt).start == 0, "saved without the layers that are tapped now"


def test_the_oldest_goes_first_and_prefixes_of_another_are_not_kept(tiny_engine: Any) -> None:
    context = Context(tiny_engine.model, n_ctx=256, n_threads=1)
    context.decode(list(range(3, 53)))
    short = context.save()
    context.decode(list(range(53, 103)))
    long = context.save()
    context.truncate(10)
    context.decode(list(range(203, 243)))
    other = context.save()
    context.close()
    store = SavedContexts(long.nbytes + other.nbytes)
    store.put(Mix.EMPTY, short)
    store.put(Mix.EMPTY, long)
    assert len(store) == 1, "the longer one serves all that the shorter one did"
    store.put(MIXES[1], other)
    assert store.longest_prefix(Mix.EMPTY, [*range(3, 63), 0])[0] == 60
    store.put(MIXES[2], other)
    assert store.longest_prefix(MIXES[1], list(other.tokens)) == (0, None), "used longest ago"
    assert store.nbytes == long.nbytes + other.nbytes


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts begin with memory for few tokens; llama.cpp makes that 256."""
    monkeypatch.setattr(Context, "INITIAL_CTX", 64)
    monkeypatch.setattr(Context, "N_BATCH", 64)


def test_a_context_grows_and_computes_what_a_wide_one_does(
    tiny_engine: Any, narrow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix, tokens = (
        tiny_engine.decoder.adapters.get(Mix.parse("sentiment=0.5")),
        [3 + i % 240 for i in range(700)],
    )
    grown = Context(tiny_engine.model, mix, n_ctx=1024, n_threads=1, taps=[1])
    found = [grown.decode(tokens[i : i + 50]) for i in range(0, 700, 50)]
    assert grown.capacity >= 700 > 4 * Context.INITIAL_CTX
    monkeypatch.setattr(Context, "INITIAL_CTX", 1024)
    wide = Context(tiny_engine.model, mix, n_ctx=1024, n_threads=1, taps=[1])
    for i, logits in enumerate(found):
        assert (wide.decode(tokens[50 * i : 50 * i + 50]) == logits).all(), i
    assert wide.capacity == 1024
    assert grown.tokens == wide.tokens and (grown.states(1) == wide.states(1)).all()

    monkeypatch.setattr(Context, "INITIAL_CTX", 64)
    other = Context(tiny_engine.model, mix, n_ctx=1024, n_threads=1, taps=[1])
    other.restore(wide.save())
    assert (other.decode([9]) == wide.decode([9])).all()
    bare = Context(tiny_engine.model, n_ctx=1024, n_threads=1, history=False, taps=[1])
    bare.load_prefix(wide, 300)
    assert bare.tokens == tokens[:300] and bare.capacity >= 300
    with pytest.raises(InvalidPrompt, match="holds 1024"):
        wide.decode(tokens)


def test_memory_is_given_back_after_a_swap_alone(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr("loramix.runtime.kv_cache.trim_heap", lambda: given.append("back"))
    for mix in ("sentiment", "sentiment", "summarize", "summarize=0.5", "summarize"):
        tiny_engine.generate("Good?", mix=mix, max_tokens=2)
    assert len(given) == 3, "the second and the last found their contexts"


def test_without_memory_to_grow_what_is_held_stays(
    tiny_engine: Any, narrow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = Context(tiny_engine.model, n_ctx=1024, n_threads=1)
    before = context.decode(list(range(3, 63)))
    with monkeypatch.context() as patch:
        patch.setattr(C, "llama_init_from_model", lambda *_: None)
        with pytest.raises(NativeError, match="cannot make a context of 128 tokens"):
            context.decode(list(range(3, 63)))
    context.truncate(59)
    assert np.abs(context.decode([62]) - before).max() < 1e-4
    assert len(context.decode(list(range(3, 63)))) and context.capacity == 128


def test_damaged_kv_is_noticed(tiny_engine: Any) -> None:
    context = Context(tiny_engine.model, n_ctx=256, n_threads=1)
    context.decode(list(range(3, 53)))
    saved = context.save()
    saved.kv[:] = 255
    with pytest.raises(NativeError, match="restore"):
        context.restore(saved)
    assert context.tokens == []
    assert reuse(context, list(range(3, 53))) == 0
    context.decode(list(range(3, 53)))
    assert reuse(context, list(range(3, 60))) == 50
    context.close()
