"""A running engine takes up a pack that changed on disk, and keeps the old one where the new cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import random_gate, write_peft

from loramix import Engine
from loramix.convert.adapter import convert_adapter
from loramix.errors import InvalidArtifact, UnknownSkill
from loramix.models import bases
from loramix.models.mixing import Mix
from loramix.pack.edit import add_skill, remove_skill, set_gate
from loramix.pack.pack import Pack
from loramix.runtime.contributions import contributions

PROMPT = "the quick brown fox"


@pytest.fixture
def engine(pack: Path) -> Iterator[Any]:
    with Engine.open(pack, n_ctx=256, n_threads=1) as engine:
        yield engine


def put(pack: Path, base: Path, name: str, seed: int, *, layers: tuple[int, ...] = (1, 2)) -> None:
    """Add or replace a random skill, and give the pack a gate for all of them."""
    digest = bases.digest(base)
    peft = write_peft(pack.parent / f"{name}-{seed}", seed=seed)
    out = pack.parent / f"{name}-{seed}.gguf"
    convert_adapter(peft, base, out, name=name, base_name="tiny", base_sha256=digest)
    change = add_skill(pack, name, out, description=name, max_tokens=12, replace_existing=True)
    set_gate(pack, random_gate([skill.name for skill in change.pack.skills], digest, layers=layers))


def tokens(engine: Any, mix: str) -> list[int]:
    found: list[int] = engine.generate(PROMPT, mix=mix, max_tokens=6).tokens
    return found


def test_nothing_new(engine: Any) -> None:
    assert engine.reload() is False


def test_a_skill_is_added_and_another_replaced(engine: Any, pack: Path, tiny_base: Path) -> None:
    before = {mix: tokens(engine, mix) for mix in ("sentiment", "summarize", "base")}
    put(pack, tiny_base, "third", 7)
    put(pack, tiny_base, "summarize", 8, layers=(0, 2))
    with pytest.raises(UnknownSkill):
        tokens(engine, "third")
    assert engine.reload() is True
    after = {mix: tokens(engine, mix) for mix in ("sentiment", "summarize", "third", "base")}
    with Engine.open(pack, n_ctx=256, n_threads=1) as fresh:
        assert after == {mix: tokens(fresh, mix) for mix in after}
        assert engine.route(PROMPT).probabilities == fresh.route(PROMPT).probabilities
    assert after["sentiment"] == before["sentiment"] and after["base"] == before["base"]
    assert after["summarize"] != before["summarize"] != after["third"]


def test_a_skill_is_removed_while_it_answers(engine: Any, pack: Path, tiny_base: Path) -> None:
    going = engine.stream(PROMPT, mix="summarize", max_tokens=20)
    other = engine.stream(PROMPT, mix="sentiment", max_tokens=8)
    next(going), next(other)
    remove_skill(pack, "summarize")
    set_gate(pack, random_gate(["sentiment"], bases.digest(tiny_base)))
    assert engine.reload() is True
    with pytest.raises(UnknownSkill, match="summarize"):
        list(going)
    list(other)
    with Engine.open(pack, n_ctx=256, n_threads=1) as fresh:
        assert other.answer.tokens == fresh.generate(PROMPT, mix="sentiment", max_tokens=8).tokens


def test_a_skill_is_removed_before_its_answer_is_measured(engine: Any, pack: Path) -> None:
    answer = engine.generate(PROMPT, mix="summarize", max_tokens=4)
    remove_skill(pack, "summarize")
    assert engine.reload() is True
    with pytest.raises(UnknownSkill, match="summarize"):
        contributions(engine, answer)


@pytest.mark.parametrize("gated", [False, True])
def test_the_gate_goes_while_it_moves_an_answer(
    engine: Any, pack: Path, tiny_base: Path, gated: bool
) -> None:
    blend = engine.router.fixed(Mix.of({"sentiment": 1.0, "summarize": 0.0625}))  # the one alone at first
    moving = engine.stream(PROMPT, route=replace(blend, policy="token"), max_tokens=8)
    next(moving)
    remove_skill(pack, "summarize")
    if gated:
        set_gate(pack, random_gate(["sentiment"], bases.digest(tiny_base)))
    assert engine.reload() is True
    list(moving)
    assert moving.answer.mixes == [Mix.of({"sentiment": 1.0})] * len(moving.answer.tokens)
    assert moving.answer.finish_reason == "length"


def test_a_pack_that_cannot_be_used_changes_nothing(engine: Any, pack: Path, tiny_base: Path) -> None:
    before = tokens(engine, "summarize")
    put(pack, tiny_base, "summarize", 9)
    file = Pack.load(pack).adapter_path("summarize")
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(InvalidArtifact, match="SHA-256"):
        engine.reload()
    put(pack, tiny_base, "summarize", 9, layers=(1, 9))
    with pytest.raises(InvalidArtifact, match="layers"):
        engine.reload()
    assert tokens(engine, "summarize") == before
    assert engine.route(PROMPT).probabilities
