"""The mix that follows the gate's readings."""

from __future__ import annotations

from loramix.models.mixing import Mix
from loramix.runtime.token_mixer import TokenMixer

BLEND = Mix.of({"a": 0.6, "b": 0.4})


def follow(mixer: TokenMixer, a: float, b: float, count: int) -> list[str]:
    return [str(mixer.follow({"a": a, "b": b, "c": 0.0})) for _ in range(count)]


def test_it_begins_with_the_nearest_level() -> None:
    assert str(TokenMixer(BLEND).mix) == "a=0.5,b=0.5"
    assert str(TokenMixer(Mix.of({"a": 0.1, "b": 0.9})).mix) == "b=1"


def test_it_moves_as_far_as_the_gate_is_sure() -> None:
    # share 0.6, then 0.72, 0.804, 0.8628: more than 0.35 from the level 0.5 at the third reading
    assert follow(TokenMixer(BLEND), 1.0, 0.0, 3) == ["a=0.5,b=0.5", "a=0.5,b=0.5", "a=1"]
    assert follow(TokenMixer(BLEND), 0.01, 0.0, 20)[-1] == "a=0.5,b=0.5"


def test_other_skills_leave_it_alone() -> None:
    assert set(follow(TokenMixer(BLEND), 0.0, 0.0, 50)) == {"a=0.5,b=0.5"}


def test_it_does_not_flutter() -> None:
    mixer = TokenMixer(BLEND)
    seen = [str(mixer.follow({"a": float(i % 2), "b": float(1 - i % 2)})) for i in range(100)]
    assert len(set(seen)) == 1


def test_only_the_two_strongest_take_part() -> None:
    mixer = TokenMixer(Mix.of({"a": 0.2, "b": 0.5, "c": 0.3}))
    assert set(mixer.mix.scales) == {"b", "c"}
