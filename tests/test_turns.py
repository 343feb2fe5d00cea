"""Which mix decodes next."""

from __future__ import annotations

import itertools

from loramix.models.mixing import Mix
from loramix.runtime.mix_turns import MAX_WAIT, SLICE, Turns

A, B, C = (Mix.of({name: 1.0}) for name in "abc")


def played(sizes: dict[Mix, int], tokens: int) -> list[Mix]:
    turns, found = Turns(), list[Mix]()
    for _ in range(tokens):
        found.append(turns.next(sizes, found[-1] if found else None))
    return found


def test_one_mix_keeps_the_turn() -> None:
    assert set(played({A: 3}, 5 * SLICE)) == {A}


def test_two_take_turns_whatever_their_sizes() -> None:
    found = played({A: 1, B: 7}, 6 * SLICE)
    assert [(mix, len(list(run))) for mix, run in itertools.groupby(found)] == [(B, SLICE), (A, SLICE)] * 3


def test_the_larger_ones_first_but_none_waits_for_ever() -> None:
    found = played({A: 1, B: 2, C: 3}, 40 * SLICE)
    shares = {mix: found.count(mix) for mix in (A, B, C)}
    assert shares[C] > shares[B] > shares[A] > 0
    waits = [len(list(run)) for is_a, run in itertools.groupby(found, A.__eq__) if not is_a]
    assert MAX_WAIT < max(waits) <= MAX_WAIT + 2 * SLICE


def test_a_turn_ends_with_its_last_answer() -> None:
    turns = Turns()
    assert turns.next({A: 2, B: 1}, None) == A
    assert turns.next({B: 1, C: 1}, A) in (B, C)


def test_what_has_gone_and_comes_again_waits_anew() -> None:
    turns = Turns()
    last = turns.next({A: 1}, None)
    for _ in range(3 * MAX_WAIT):
        last = turns.next({B: 2, C: 3}, last)
    seen = [last := turns.next({A: 1, B: 2, C: 3}, last) for _ in range(2 * SLICE)]
    assert A not in seen, "it was not waiting all that time"
