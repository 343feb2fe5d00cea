"""Golden outputs of the default pack: route, first tokens and text of fixed prompts, greedy.

    LORAMIX_UPDATE_GOLDEN=1 python -m pytest tests/test_golden.py     writes tests/golden.json anew

Kernels for other instruction sets, and other splits of the same tokens into batches, round differently, which
can turn a near tie. The file keeps by how much each token won: up to the first narrow win all must agree, on
every CPU; on the kind that wrote the file, everything must.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from loramix.runtime.cpu import cpu_flags
from loramix.runtime.sampling import Sampler

pytestmark = pytest.mark.base
GOLDEN = Path(__file__).parent / "golden.json"
KERNELS = sorted(cpu_flags() & {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd"})
NEAR_TIE = 0.5  # logits; other kernels and batches were seen to move a margin by up to 0.2
SCALE_TOLERANCE = 0.1
PROMPTS = {
    "positive": ("Is this review positive or negative? A tender, funny film that I will watch again.", {}),
    "negative": ("Sentiment: the plot is thin and the jokes are older than the actors", {}),
    "after": ("The battery died after two days and nobody answers the phone.\n\nDid the buyer like it?", {}),
    "summary": (
        "Summarize in one sentence: The museum on the harbour opened a new wing on Friday. It shows sixty "
        "ships in bottles, all made by sailors of the town, and children may try to build one themselves.",
        {},
    ),
    "oneline": (
        "Describe this package in one line:\nThis program shows which files take the most room on a disk. It "
        "reads a directory, adds up the sizes of what is below it, and draws the result as nested boxes.",
        {},
    ),
    "none": ("What is the capital of Portugal?", {"max_tokens": 24}),
    "greeting": ("hello there", {"max_tokens": 24}),
    "blend": (
        "Summarize the emotional tone of this review: The actors try hard, but the story drags on.",
        {"policy": "blend", "max_tokens": 24},
    ),
    "fixed mix": ("The soup was cold.", {"mix": "sentiment=0.7,summarize=0.3", "max_tokens": 16}),
    "bare base": ("Is this review positive or negative? A joy.", {"policy": "base", "max_tokens": 24}),
}


def outcome(engine: Any, name: str) -> dict[str, Any]:
    """Mix, first tokens, by how many logits each won over the next, and the text."""
    prompt, options = PROMPTS[name]
    margins: list[float] = []
    pick = Sampler.pick

    def noting(sampler: Sampler, logits: Any, recent: list[int]) -> int:
        second, first = np.partition(logits, -2)[-2:]
        margins.append(round(float(first - second), 2))
        return pick(sampler, logits, recent)

    with patch.object(Sampler, "pick", noting):
        answer = engine.generate(prompt, **options)
    tokens = answer.tokens[:8]
    return {"mix": answer.route.mix, "tokens": tokens, "margins": margins[: len(tokens)], "text": answer.text}


def firm(found: dict[str, Any]) -> list[int]:
    """Tokens up to the first that won by little."""
    narrow = [i for i, margin in enumerate(found["margins"]) if margin < NEAR_TIE]
    return list(found["tokens"][: narrow[0] if narrow else None])


def assert_agree(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Equal but for rounding: the same skills at about the same scales, the same tokens up to a near tie."""
    assert found["mix"] == pytest.approx(wanted["mix"], abs=SCALE_TOLERANCE)
    sure = firm(wanted)
    assert found["tokens"][: len(sure)] == sure


@pytest.fixture(scope="module")
def golden(default_engine: Any) -> dict[str, Any]:
    if os.environ.get("LORAMIX_UPDATE_GOLDEN"):
        found = {"kernels": KERNELS, "outputs": {name: outcome(default_engine, name) for name in PROMPTS}}
        GOLDEN.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    read: dict[str, Any] = json.loads(GOLDEN.read_text())
    return read


@pytest.mark.parametrize("name", PROMPTS)
def test_output_is_as_recorded(name: str, default_engine: Any, golden: dict[str, Any]) -> None:
    found, wanted = outcome(default_engine, name), golden["outputs"][name]
    if golden["kernels"] == KERNELS:
        assert found == wanted
    else:
        assert_agree(found, wanted)


def test_the_recorded_outputs_say_something(golden: dict[str, Any]) -> None:
    sure = {name: len(firm(wanted)) for name, wanted in golden["outputs"].items()}
    assert sum(map(bool, sure.values())) >= 7, sure
    assert sum(sure.values()) >= 15, sure


def test_a_second_time_gives_the_same(default_engine: Any) -> None:
    """The second time a prompt's beginning comes from the cache, and only its end is read: other batches."""
    first = {name: outcome(default_engine, name) for name in PROMPTS}
    for name in reversed(PROMPTS):
        assert_agree(outcome(default_engine, name), first[name])


def test_no_skill_fits_equals_never_having_adapters(default_engine: Any) -> None:
    for name in ("none", "greeting"):
        prompt, options = PROMPTS[name]
        routed = default_engine.generate(prompt, **options)
        assert routed.route.mix == {}, routed.route
        assert default_engine.generate(prompt, policy="base", **options).tokens == routed.tokens
