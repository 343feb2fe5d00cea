"""Golden outputs of the default pack: route, first tokens and text of fixed prompts, greedy.

    LORAMIX_UPDATE_GOLDEN=1 python -m pytest tests/test_golden.py     writes tests/golden.json anew

Kernels for other instruction sets round differently, which can turn a near tie: on another kind of CPU
than the one that wrote the file, route and first token must agree, and the text need not.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from loramix.runtime.cpu import cpu_flags

pytestmark = pytest.mark.base
GOLDEN = Path(__file__).parent / "golden.json"
KERNELS = sorted(cpu_flags() & {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd"})
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
    prompt, options = PROMPTS[name]
    answer = engine.generate(prompt, **options)
    return {"mix": answer.route.mix, "tokens": answer.tokens[:8], "text": answer.text}


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
        assert found["mix"].keys() == wanted["mix"].keys()
        assert found["tokens"][:1] == wanted["tokens"][:1]


def test_a_second_time_gives_the_same(default_engine: Any) -> None:
    first = [outcome(default_engine, name) for name in PROMPTS]
    assert [outcome(default_engine, name) for name in reversed(PROMPTS)] == first[::-1]


def test_no_skill_fits_equals_never_having_adapters(default_engine: Any) -> None:
    for name in ("none", "greeting"):
        prompt, options = PROMPTS[name]
        routed = default_engine.generate(prompt, **options)
        assert routed.route.mix == {}, routed.route
        assert default_engine.generate(prompt, policy="base", **options).tokens == routed.tokens
