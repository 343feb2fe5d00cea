"""Mixes as values, and the maths from probabilities to scales."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from loramix.errors import InvalidMix
from loramix.models.mixing import MAX_ACTIVE, MAX_SCALE, STEPS, Mix, blend, blend_rows, decide, each, top1

thousand = settings(max_examples=1000)
NAMES = [f"s{i}" for i in range(12)]
SKILLS = ["sentiment", "summarize", "title"]

names = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,12}", fullmatch=True).filter(
    lambda name: name not in {"base", "top1", "blend", "each", "token", "none", "con", "prn", "aux", "nul"}
    and not name.startswith(("com", "lpt"))
)
mappings = st.dictionaries(names, st.floats(0, MAX_SCALE), max_size=MAX_ACTIVE)


@st.composite
def batches(draw: st.DrawFn, min_rows: int = 1) -> np.ndarray:
    """Probabilities (B, K+1): softmax of random logits, K from 1 to 11."""
    shape = draw(st.tuples(st.integers(min_rows, 5), st.integers(2, 12)))
    logits = draw(hnp.arrays(np.float64, shape, elements=st.floats(-8, 8)))
    odds = np.exp(logits)
    return odds / odds.sum(axis=1, keepdims=True)


knobs = st.fixed_dictionaries(
    {"threshold": st.floats(0, 1), "floor": st.floats(0, 0.6), "top_k": st.integers(1, 12)}
)


# --- Mix -------------------------------------------------------------------------------------------------


@thousand
@given(mappings)
def test_text_and_back(scales: dict[str, float]) -> None:
    mix = Mix.of(scales)
    assert Mix.parse(str(mix)) == mix
    assert Mix.of(mix.to_json()) == mix
    assert bool(mix) == any(scale * STEPS > 0.5 for scale in scales.values())
    for name, scale in mix.items():
        assert abs(scale - scales[name]) <= 0.5 / STEPS
        assert scale * STEPS == int(scale * STEPS) > 0


@thousand
@given(mappings, st.randoms(use_true_random=False))
def test_order_does_not_matter(scales: dict[str, float], random: object) -> None:
    pairs = list(scales.items())
    random.shuffle(pairs)  # type: ignore[attr-defined]
    one, other = Mix.of(scales), Mix(tuple(pairs))
    assert one == other and hash(one) == hash(other) and str(one) == str(other)
    assert list(one.scales) == sorted(one.scales)


@thousand
@given(names, st.one_of(st.floats(max_value=-1e-9), st.floats(min_value=4.001), st.just(math.nan)))
def test_scales_out_of_range_are_refused(name: str, scale: float) -> None:
    with pytest.raises(InvalidMix, match="from 0 to 4"):
        Mix.of({name: scale})
    with pytest.raises(InvalidMix):
        Mix.parse(f"{name}={scale}")


@pytest.mark.parametrize(
    ("text", "scales"),
    [
        ("", {}),
        (" base ", {}),
        ("sentiment", {"sentiment": 1.0}),
        ("sentiment=0.7,summarize=0.3", {"sentiment": 45 / 64, "summarize": 19 / 64}),
        (" b = 1 , a=.5", {"a": 0.5, "b": 1.0}),
        ("a=0,b=2e0", {"b": 2.0}),
        ("a=-0.0", {}),
    ],
)
def test_parse(text: str, scales: dict[str, float]) -> None:
    assert Mix.parse(text).scales == scales


@pytest.mark.parametrize(
    "text",
    [
        "a=1,a=1",
        "a=0,a=1",
        "a,",
        ",",
        "=1",
        "a=",
        "a==1",
        "a=1=2",
        "a=nan",
        "a=inf",
        "a=-1",
        "a=4.1",
        "a=1e400",
        "a=1_0",
        "a=١",
        "a=" + "9" * 5000,
        "../x=1",
        "A=1",
        "base=1",
        "base,a",
        "none",
        "a\0=1",
        "x" * 65,
        ",".join(f"s{i}" for i in range(9)),
    ],
)
def test_unreadable_text_is_one_sentence(text: str) -> None:
    with pytest.raises(InvalidMix) as caught:
        Mix.parse(text)
    assert str(caught.value).endswith(".") and len(str(caught.value)) < 300


@pytest.mark.parametrize("scale", [True, "1", None, 10**400, [1], 1j])
def test_scales_that_are_no_numbers_are_refused(scale: object) -> None:
    with pytest.raises(InvalidMix):
        Mix.of({"a": scale})  # type: ignore[dict-item]


def test_empty_mix_is_the_base() -> None:
    assert Mix.EMPTY == Mix.base() == Mix.of({}) == Mix.of({"a": 0}) == Mix.of({"a": 0.001})
    assert not Mix.EMPTY and str(Mix.EMPTY) == "base" and Mix.EMPTY.to_json() == {}
    assert Mix.of(dict.fromkeys(NAMES, 0.0)) == Mix.EMPTY  # only active skills count
    assert str(Mix.of({"sentiment": 1})) == "sentiment=1"


def test_a_mix_cannot_be_changed() -> None:
    mix = Mix.of({"a": 1})
    with pytest.raises(AttributeError):
        mix.entries = ()  # type: ignore[misc]
    mix.scales["a"] = 3.0
    assert mix.scales == {"a": 1.0}


# --- policies --------------------------------------------------------------------------------------------


def reference(row: list[float], threshold: float, floor: float, top_k: int) -> list[float]:
    """Blend of one row in plain Python."""
    skills = row[:-1]
    if np.asarray(skills).sum() < threshold or not max(skills):
        return [0.0] * len(skills)
    best = sorted(range(len(skills)), key=lambda i: (-skills[i], i))[:top_k]
    kept = {i: skills[i] for i in best if skills[i] >= floor or i == best[0]}
    total = sum(kept.values())
    return [kept.get(i, 0.0) / total if total else 0.0 for i in range(len(skills))]


@thousand
@given(batches(min_rows=2), knobs)
def test_each_row_sums_to_one_by_itself(probabilities: np.ndarray, knob: dict[str, float]) -> None:
    scales = blend_rows(probabilities, **knob)
    assert scales.shape == (len(probabilities), probabilities.shape[1] - 1)
    assert (scales >= 0).all()
    assert ((scales > 0).sum(axis=1) <= knob["top_k"]).all()
    for row, expected in zip(scales, probabilities.tolist(), strict=True):
        assert row.sum() == pytest.approx(1) or not row.any()
        np.testing.assert_allclose(row, reference(expected, **knob), atol=1e-12)


@thousand
@given(batches(), knobs)
def test_a_row_alone_is_the_row_in_a_batch(probabilities: np.ndarray, knob: dict[str, float]) -> None:
    together = blend_rows(probabilities, **knob)
    chosen = decide(probabilities, threshold=knob["threshold"])
    for i in range(len(probabilities)):
        alone = blend_rows(probabilities[i : i + 1], **knob)
        assert (alone == together[i]).all()
        assert decide(probabilities[i : i + 1], threshold=knob["threshold"]) == chosen[i]


@thousand
@given(batches(), knobs, st.randoms(use_true_random=False))
def test_skills_may_come_in_any_order(
    probabilities: np.ndarray, knob: dict[str, float], random: object
) -> None:
    n_skills = probabilities.shape[1] - 1
    # distinct values: between equal ones the lowest index wins, by definition
    probabilities = probabilities + np.linspace(0, 1e-6, n_skills + 1)
    order = list(range(n_skills))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = probabilities[:, [*order, n_skills]]
    if any(len(set(row)) < len(row) for row in probabilities.tolist()):
        return
    np.testing.assert_allclose(
        blend_rows(shuffled, **knob), blend_rows(probabilities, **knob)[:, order], atol=1e-12
    )
    before = [top1(row, NAMES[:n_skills], knob["threshold"]) for row in probabilities]
    after = [top1(row, [NAMES[i] for i in order], knob["threshold"]) for row in shuffled]
    assert before == after


@thousand
@given(batches())
def test_keeping_all_is_dense(probabilities: np.ndarray) -> None:
    n_skills = probabilities.shape[1] - 1
    scales = blend_rows(probabilities, threshold=0.0, floor=0.0, top_k=n_skills)
    skills = probabilities[:, :-1]
    routed = decide(probabilities, threshold=0.0) < n_skills
    dense = skills / skills.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(scales, dense * routed[:, None], atol=1e-12)


@thousand
@given(batches(), st.floats(0, 1))
def test_blend_of_one_row_goes_through_the_batch_form(probabilities: np.ndarray, threshold: float) -> None:
    skills = NAMES[: probabilities.shape[1] - 1]
    for row, scales in zip(probabilities, blend_rows(probabilities, threshold=threshold), strict=True):
        mix = blend(row, skills, threshold=threshold)
        assert mix == Mix.of(dict(zip(skills, scales.tolist(), strict=True)))
        assert not mix or abs(sum(mix.scales.values()) - 1) <= 4 * 0.5 / STEPS


@pytest.mark.parametrize(
    ("row", "threshold", "winner"),
    [
        ([0.6, 0.2, 0.1, 0.1], 0.5, "sentiment"),
        ([0.6, 0.2, 0.1, 0.1], 0.91, None),  # together they do not reach it
        ([0.5, 0.2, 0.2, 0.1], 0.5, "sentiment"),  # the threshold itself is enough
        ([0.2, 0.2, 0.2, 0.4], 0.61, None),
        ([0.2, 0.3, 0.2, 0.3], 0.5, "summarize"),  # asked for together: not for none
        ([0.1, 0.4, 0.1, 0.4], 0.0, "summarize"),  # ties: lowest index
        ([0.1, 0.4, 0.4, 0.1], 0.0, "summarize"),
    ],
)
def test_none_of_these(row: list[float], threshold: float, winner: str | None) -> None:
    expected = Mix.of({winner: 1.0}) if winner else Mix.EMPTY
    assert top1(row, SKILLS, threshold) == expected
    assert bool(blend(row, SKILLS, threshold=threshold)) == bool(winner)


def test_blend_by_hand() -> None:
    assert blend([0.6, 0.2, 0.1, 0.1], SKILLS, threshold=0.5).scales == {"sentiment": 0.75, "summarize": 0.25}
    # none reaches the floor: the likeliest alone acts
    assert blend([0.12, 0.11, 0.1, 0.0], SKILLS, threshold=0.1).scales == {"sentiment": 1.0}
    assert top1([1.0], [], 0.0) == blend([1.0], [], threshold=0.0) == Mix.EMPTY  # a pack without skills


def test_each_by_hand() -> None:
    def names(row: list[float], threshold: float = 0.5) -> list[str]:
        return [str(mix) for mix in each(row, SKILLS, threshold=threshold)]

    assert names([0.3, 0.6, 0.05, 0.05]) == ["summarize=1", "sentiment=1"]
    assert names([0.29, 0.6, 0.05, 0.06]) == ["summarize=1"]
    assert names([0.7, 0.1, 0.1, 0.1]) == ["sentiment=1"]
    assert names([0.3, 0.1, 0.1, 0.5], 0.6) == ["base"]


@pytest.mark.parametrize(
    "row", [[0.5, 0.5], [math.nan, 0.2, 0.3, 0.5], [math.inf, 0, 0, 0], [-0.1, 0.6, 0.3, 0.2]]
)
def test_broken_probabilities_are_a_bug_not_a_route(row: list[float]) -> None:
    with pytest.raises(ValueError):
        top1(row, SKILLS, 0.5)
    with pytest.raises(ValueError):
        blend(row, SKILLS, threshold=0.5)


def test_top_k_of_zero_is_refused() -> None:
    with pytest.raises(ValueError):
        blend_rows([[0.5, 0.5]], threshold=0.5, top_k=0)
