"""What was asked before changes no bit of an answer: where prompts are cut behind a cached prefix."""

from __future__ import annotations

import random
from typing import Any

import pytest
from test_session import MIXES, pool_of

from loramix.models.mixing import Mix
from loramix.runtime.llama.context import Context
from loramix.runtime.llama.prefill_chunks import TILE, chunks, resume_position


def kinds(start: int, end: int, size: int) -> dict[int, str]:
    """By position, what decides how a token is rounded: its chunk's kernels, and its place among the rows."""
    found, position = {}, start
    for chunk in chunks(start, list(range(start, end)), size):
        tiled = "alone" if len(chunk) == 1 else "tiled" if len(chunk) >= TILE else "some"
        whole_fours = len(chunk) - len(chunk) % 4
        for i in range(len(chunk)):
            found[position + i] = f"{tiled}, {'of four' if i < whole_fours else 'of the rest'}"
        position += len(chunk)
    return found


@pytest.mark.parametrize("size", [256, 100])
def test_behind_a_cached_prefix_every_token_meets_the_kernels_of_a_whole_prompt(size: int) -> None:
    rng = random.Random(0)
    used = 0
    for _ in range(4000):
        whole, n_tokens = rng.randrange(1, 700), rng.randrange(1, 700)
        same = rng.randrange(0, min(whole, n_tokens - 1) + 1)
        start = resume_position(same, whole, n_tokens, size)
        assert 0 <= start <= same and start < n_tokens
        wanted = kinds(0, n_tokens, size)
        held = kinds(0, whole, size)
        assert {i: held[i] for i in range(start)} == {i: wanted[i] for i in range(start)}
        assert kinds(start, n_tokens, size) == {i: wanted[i] for i in range(start, n_tokens)}
        used += start
    assert used > 4000 * 80


@pytest.mark.parametrize(
    ("same", "whole", "n_tokens", "start"),
    [
        (150, 160, 300, 148),  # whole fours stay
        (150, 160, 170, 104),  # what is left is a tile at least
        (30, 40, 50, 28),  # both are less than a tile
        (30, 40, 90, 0),  # read without tiles, which the longer prompt is read in
        (300, 300, 320, 256),  # a chunk that ends elsewhere now goes whole; the one before stays
        (260, 700, 700, 260),
        (400, 200, 700, 192),  # what is behind the prompt was written, not read
        (256, 257, 257, 256),  # a token alone comes last in both
    ],
)
def test_what_stays(same: int, whole: int, n_tokens: int, start: int) -> None:
    assert resume_position(same, whole, n_tokens, 256) == start


@pytest.mark.parametrize("mix", MIXES)
def test_a_prompt_gets_the_bits_of_a_fresh_context_whatever_was_asked_before(
    tiny_engine: Any, monkeypatch: pytest.MonkeyPatch, mix: Mix
) -> None:
    monkeypatch.setattr(Context, "N_BATCH", 128)
    rng = random.Random(1)
    pool = pool_of(tiny_engine, n_ctx=512)
    fresh = Context(
        tiny_engine.model, tiny_engine.decoder.adapters.get(mix), n_ctx=512, n_threads=1, taps=(1, 2)
    )
    prompt = [rng.randrange(3, 250) for _ in range(300)]
    found_again = 0
    for _ in range(60):
        same, length = rng.randrange(1, len(prompt)), rng.randrange(20, 400)
        prompt = prompt[: min(same, length - 1)]
        prompt += [rng.randrange(3, 250) for _ in range(length - len(prompt))]
        context, start, _ = pool.prepare(mix, prompt)
        found_again += start
        logits = context.decode(prompt[start:])
        fresh.truncate(0)
        assert (fresh.decode(prompt) == logits).all(), (start, length)
        assert (fresh.states(2)[-1] == context.states(2)[-1]).all()
        context.decode([int(logits.argmax())])  # an answer, which is no part of the next prompt
    assert found_again > 60 * 30


def test_a_conversation_goes_on_behind_its_answer(tiny_engine: Any) -> None:
    pool = pool_of(tiny_engine)
    mix, prompt = MIXES[1], list(range(3, 103))
    context, start, _ = pool.prepare(mix, prompt)
    context.decode(prompt[start:])
    for token in (7, 8, 9):
        context.decode([token])
    longer = [*prompt, 7, 8, 9, 20, 21, 22, 23]
    assert pool.prepare(mix, longer)[1] == 103, "nothing is read again"
    context.decode(longer[103:])
    context.decode([5])
    assert pool.prepare(mix, [*longer, 5, 30, 31])[1] == 108
    other = [*prompt[:90], *range(150, 200)]
    assert pool.prepare(mix, other)[1] == 76, "of the first prompt, up to the last tile"
