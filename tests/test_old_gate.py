"""Packs with a gate of the old format: they route as before, and say how to train the new one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import random_gate

from loramix import Engine
from loramix.errors import InvalidArtifact, Unsupported
from loramix.models.mixing import Mix
from loramix.models.old_gate import GateInfo, NumpyGate
from loramix.pack.edit import set_gate
from loramix.pack.pack import Pack

SKILLS = ["sentiment", "summarize"]
LONG = "dog " * 45 + "fox"


@pytest.fixture
def old_pack(pack: Path) -> Path:
    set_gate(pack, random_gate(SKILLS, Pack.load(pack).manifest.base.sha256))
    return pack


@pytest.fixture
def engine(old_pack: Path) -> Iterator[Engine]:
    with Engine.open(old_pack, n_ctx=256, n_threads=1) as engine:
        yield engine


def test_it_warns_in_one_sentence(old_pack: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Engine.open(old_pack, n_ctx=64, n_threads=1):
        pass
    (message,) = caplog.messages
    assert message.endswith("run 'loramix train gate tiny'.") and message.count(".") == 1


def test_a_current_gate_warns_of_nothing(tiny_pack: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Engine.open(tiny_pack, n_ctx=64, n_threads=1):
        assert caplog.messages == []


def test_it_reads_the_last_message_in_the_bases_context(engine: Engine) -> None:
    talk = [
        {"role": "user", "content": "Summarize this."},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "a dog"},
    ]
    alone, together = engine.route("a dog"), engine.route(talk)
    assert alone == together and alone.words == ()
    context = engine.decoder.pool.get(Mix.EMPTY)
    assert context.tokens == engine.model.chat(talk[-1:]) and context.taps == (1, 2)
    gate = engine.router.gate
    assert isinstance(gate, NumpyGate)
    states = np.concatenate([context.states(layer)[-1] for layer in (1, 2)])
    assert list(alone.probabilities.values()) == pytest.approx(gate.probabilities(states), abs=1e-6)


def test_a_long_prompt_is_read_in_chunks(engine: Engine) -> None:
    request = engine.routing_request(LONG)
    assert request is not None and request.tokens == engine.prepare(LONG).routed
    assert engine.routing_request(LONG, mix="base") is None


def test_each_token_of_an_answer_is_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[Any] = []

    def noted(self: NumpyGate, features: Any) -> Any:
        readings.append(features)
        return np.array([0.45, 0.45, 0.1])

    monkeypatch.setattr(NumpyGate, "probabilities", noted)
    answer = engine.generate("a dog", policy="token", max_tokens=5)
    assert len(answer.tokens) == 5 and len(readings) == 6


def gate_of(sha: str, **info: Any) -> bytes:
    described = GateInfo(skills=SKILLS, threshold=0.5, base_sha256=sha, hidden=[4], **info)
    width = 64 * len(described.layers)
    return NumpyGate(
        described, {k: np.ones(s, np.float32) for k, s in described.shapes(width).items()}
    ).to_bytes()


def test_token_wise_routing_needs_the_last_token(pack: Path) -> None:
    set_gate(pack, gate_of(Pack.load(pack).manifest.base.sha256, layers=[1], pooling="mean"))
    with Engine.open(pack, n_ctx=64, n_threads=1) as engine:
        assert engine.route("a dog").probabilities
        with pytest.raises(Unsupported, match="another policy"):
            engine.route("a dog", policy="token")


def test_layers_that_the_base_lacks_are_refused(pack: Path) -> None:
    set_gate(pack, gate_of(Pack.load(pack).manifest.base.sha256, layers=[1, 9], pooling="last"))
    with pytest.raises(InvalidArtifact, match="loramix train gate tiny"):
        Engine.open(pack)
