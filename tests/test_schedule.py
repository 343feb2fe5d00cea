"""The learning rate by step: rounds are what runs of their own would be."""

from __future__ import annotations

import msgspec
import pytest

from loramix.train.recipe import Training
from loramix.train.schedule import Schedule


def rates(settings: Training, steps: int) -> list[float]:
    schedule = Schedule(settings, steps, steps)
    return [schedule.rate(step) for step in range(steps)]


@pytest.mark.parametrize(
    ("rounds", "lengths"),
    [(1, [600]), (3, [200, 200, 200]), ((2, 1), [400, 200]), ((1, 4, 1), [100, 400, 100])],
)
def test_each_round_is_a_run_of_its_own(rounds: int | tuple[int, ...], lengths: list[int]) -> None:
    settings = Training(rounds=rounds)
    alone = [rate for length in lengths for rate in rates(Training(), length)]
    assert rates(settings, 600) == alone
    schedule = Schedule(settings, 600, 600)
    starts = [step for step in range(600) if schedule.is_start(step)]
    assert starts == [sum(lengths[:i]) for i in range(len(lengths))]


def test_fewer_steps_than_rounds() -> None:
    assert rates(Training(rounds=(1, 2, 3)), 2) == [1e-3, 1e-3]
    assert len(rates(Training(rounds=(1, 9)), 3)) == 3


@pytest.mark.parametrize("rounds", [0, [], [2, 0], "2", [1.5]])
def test_what_is_no_number_of_rounds(rounds: object) -> None:
    with pytest.raises(msgspec.ValidationError, match="rounds"):
        msgspec.convert({"rounds": rounds}, Training)
