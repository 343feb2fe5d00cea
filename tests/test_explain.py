"""What each skill added: against NumPy where the input is known, and as terminal lines, page and figure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFReader
from gguf.quants import dequantize
from tiny import write_peft

from loramix import Engine
from loramix.cli import main
from loramix.convert.adapter import convert_adapter
from loramix.pack.edit import add_skill
from loramix.pack.pack import Pack
from loramix.runtime.contributions import contributions

PROMPT = "the quick brown fox"


@pytest.fixture
def engine(pack: Path, tiny_base: Path, tmp_path: Path) -> Iterator[Any]:
    """The tiny pack with a third skill that adapts q_proj alone."""
    peft = write_peft(tmp_path / "query", seed=5, modules=("q_proj",))
    convert_adapter(
        peft, tiny_base, tmp_path / "query.gguf", base_sha256=Pack.load(pack).manifest.base.sha256
    )
    add_skill(pack, "query", tmp_path / "query.gguf", description="query", max_tokens=8)
    with Engine.open(pack, n_ctx=256, n_threads=1) as engine:
        yield engine


def tensors(content: Path) -> dict[str, np.ndarray]:
    return {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(content).tensors}


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_the_lowest_layer_is_what_numpy_computes(
    engine: Any, tiny_base: Path, tmp_path: Path, scale: float
) -> None:
    answer = engine.generate(PROMPT, mix={"query": scale}, max_tokens=5)
    found = contributions(engine, answer)
    base, adapter = tensors(tiny_base), tensors(tmp_path / "query.gguf")
    last = engine.model.chat([{"role": "user", "content": PROMPT}])[-1]
    for place, token in enumerate([last, *answer.tokens[:-1]]):
        x = base["token_embd.weight"][token]
        x = x / np.sqrt(np.mean(x**2) + 1e-5) * base["blk.0.attn_norm.weight"]
        a, b = (adapter[f"blk.0.attn_q.weight.lora_{half}"] for half in "ab")
        ratio = np.linalg.norm(scale * 8 / 4 * (b @ (a @ x))) / np.linalg.norm(
            base["blk.0.attn_q.weight"] @ x
        )
        assert found.values[0, 0, place] == pytest.approx(ratio, rel=1e-3)
    assert found.skills == ["query"] and set(found.strongest) == {"query"}


def test_skills_of_a_blend_are_told_apart(engine: Any) -> None:
    answer = engine.generate(PROMPT, mix="query=0.0625,sentiment=1,summarize=0.5", max_tokens=4)
    found = contributions(engine, answer)
    assert found.skills == ["query", "sentiment", "summarize"]
    assert found.values.shape == (3, engine.model.n_layer, len(answer.tokens))
    assert (found.values > 0).all()
    totals = found.values.sum(axis=(1, 2))
    assert totals[1] > totals[2] > totals[0]
    assert "".join(found.pieces) == answer.text


def test_in_turn_each_mix_is_measured_on_what_it_said(engine: Any) -> None:
    from dataclasses import replace

    one = engine.generate(PROMPT, mix="sentiment", max_tokens=4)
    two = engine.generate(PROMPT, mix="summarize", max_tokens=3)
    route = replace(one.route, then=(two.route.mix,))
    both = replace(
        one,
        route=route,
        tokens=one.tokens + two.tokens,
        mixes=one.mixes + two.mixes,
        prompts=one.prompts + two.prompts,
    )
    found = contributions(engine, both)
    n = len(one.tokens)
    np.testing.assert_array_equal(found.values[0, :, :n], contributions(engine, one).values[0])
    np.testing.assert_array_equal(found.values[1, :, n:], contributions(engine, two).values[0])
    assert not found.values[0, :, n:].any() and not found.values[1, :, :n].any()


def test_where_no_skill_acts_nothing_is_added(engine: Any) -> None:
    answer = engine.generate(PROMPT, mix="base", max_tokens=3)
    found = contributions(engine, answer)
    assert found.skills == [] and found.strongest == [None] * len(answer.tokens)


def test_measuring_leaves_the_engine_as_it_was(engine: Any) -> None:
    before = engine.generate(PROMPT, mix="query=1,sentiment=0.5", max_tokens=6)
    contributions(engine, before)
    assert engine.generate(PROMPT, mix="query=1,sentiment=0.5", max_tokens=6).tokens == before.tokens
    assert len(engine.model.adapters) <= engine.decoder.adapters._size


def test_the_command_shows_and_writes(tiny_pack: Path, tmp_path: Path) -> None:
    page, figure = tmp_path / "a.html", tmp_path / "a.png"
    options = ["--pack", str(tiny_pack), "--mix", "sentiment=1,summarize=0.5", "-n", "5"]
    result = CliRunner().invoke(
        main, ["explain", "a <b>", *options, "--html", str(page), "--png", str(figure)]
    )
    assert result.exit_code == 0, result.output
    assert "mix: sentiment=1,summarize=0.5" in result.output and "█" in result.output
    text = page.read_text(encoding="utf-8")
    assert "a &lt;b&gt;" in text and text.count("<svg") == 2 and "<script" not in text and "http" not in text
    assert figure.read_bytes().startswith(b"\x89PNG")
    told = json.loads(CliRunner().invoke(main, ["explain", "a", *options, "--json"]).stdout)
    values = told["contributions"]["values"]
    assert set(values) == {"sentiment", "summarize"}
    assert (
        len(values["sentiment"][0])
        == len(told["contributions"]["tokens"])
        == told["usage"]["completion_tokens"]
    )
