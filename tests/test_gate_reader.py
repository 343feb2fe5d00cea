"""Routing with the gate that reads low layers: what it reads, how much, and what it leaves alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import N_LAYER, random_gate, random_head, write_base, write_pack

from loramix import Engine
from loramix.errors import InvalidArtifact, NativeError
from loramix.models.early_head import EarlyHead
from loramix.models.gate_window import READ_TOKENS, window
from loramix.models.mixing import Mix
from loramix.pack.edit import set_gate
from loramix.pack.pack import Pack
from loramix.runtime.gate_reader import REREAD_TOKENS
from loramix.runtime.llama.context import Context
from loramix.runtime.llama.early_pass import EarlyPass
from loramix.runtime.scheduler import Scheduler

SKILLS = ["sentiment", "summarize"]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Summarize this: a long day at sea."},
    {"role": "assistant", "content": "A day at sea."},
    {"role": "user", "content": "shorter, please"},
]


def digest(pack: Path) -> str:
    return Pack.load(pack).manifest.base.sha256


def test_the_route_is_the_heads_decision_on_the_states(tiny_engine: Any) -> None:
    prompt = "Is it good? The cat sat on the mat."
    head = tiny_engine.router.gate
    ids = tiny_engine.model.chat([{"role": "user", "content": prompt}])
    full = Context(tiny_engine.model, n_ctx=256, n_threads=1, taps=head.info.layers)
    full.decode(ids)
    wanted = head.probabilities(head(full.states(1)).logits)
    full.close()
    route = tiny_engine.route(prompt)
    assert list(route.probabilities.values()) == pytest.approx(wanted, abs=1e-4)
    assert route.timings.keys() == {"features", "gate"} and min(route.timings.values()) > 0
    said = {"Is", "it", "good", "The", "cat", "sat", "on", "the", "mat"}
    assert route.words and {word for word, _ in route.words} <= said


@pytest.mark.parametrize("policy", ["top1", "each", "blend", "token"])
def test_routing_touches_no_context_of_the_answers(tiny_engine: Any, policy: str) -> None:
    """No whole pass: after a route no context of answers has read anything."""
    route = tiny_engine.route("a dog", policy=policy)
    assert tiny_engine.decoder.pool.mixes == []
    assert tiny_engine.routing.reader.n_tokens_read == len(tiny_engine.prepare("a dog").routed)
    answer = tiny_engine.generate("a dog", policy=policy, max_tokens=3)
    assert answer.route.probabilities == route.probabilities
    assert Mix.EMPTY not in tiny_engine.decoder.pool.mixes or not route.mix


def test_answers_contexts_keep_no_states(tiny_engine: Any) -> None:
    tiny_engine.generate("a dog", mix="base", max_tokens=2)
    assert tiny_engine.decoder.pool.get(Mix.EMPTY).taps == ()


@pytest.mark.parametrize("words", [1, 30, 80, 900])
def test_a_long_prompt_costs_no_more_tokens(tiny_pack: Path, words: int) -> None:
    text = "dog " * words
    with Engine.open(tiny_pack, n_ctx=512, n_threads=1) as engine:
        engine.n_ctx = 20_000  # longer than the tiny base's context: only the gate reads here
        n_tokens = len(engine.model.chat([{"role": "user", "content": text}]))
        engine.route(text)
        assert engine.routing.reader.n_tokens_read == min(n_tokens, READ_TOKENS)
        engine.route([*TALK, {"role": "assistant", "content": text}, {"role": "user", "content": text}])
        assert engine.routing.reader.n_tokens_read <= min(n_tokens, READ_TOKENS) + READ_TOKENS


def test_a_follow_up_is_routed_by_the_last_turns(tiny_engine: Any) -> None:
    read: list[list[int]] = []
    states = EarlyPass.states

    def noted(self: EarlyPass, tokens: list[int]) -> Any:
        read.append(list(tokens))
        return states(self, tokens)

    alone = tiny_engine.route(TALK[-1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EarlyPass, "states", noted)
        together = tiny_engine.route(TALK)
    (ids,) = read
    assert ids == tiny_engine.model.chat(TALK[1:])  # without the system message
    assert together.probabilities != alone.probabilities
    assert (
        "Summarize" in tiny_engine.model.chat_text(ids) if hasattr(tiny_engine.model, "chat_text") else True
    )


@pytest.mark.parametrize("turns", [3, 8, 40])
def test_old_turns_are_not_read(tiny_engine: Any, turns: int) -> None:
    tiny_engine.n_ctx = 5000
    talk = [
        {"role": role, "content": f"{i}{mark}"}
        for i in range(turns)
        for role, mark in (("user", "?"), ("assistant", "!"))
    ]
    talk.append({"role": "user", "content": "why?"})
    prepared = tiny_engine.prepare(talk)
    assert prepared.contents == tuple(message["content"] for message in window(talk))
    assert prepared.routed == tiny_engine.model.chat(talk[-5:]) and len(prepared.tokens) >= len(
        prepared.routed
    )


def test_a_growing_answer_is_read_every_few_tokens(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EarlyHead, "probabilities", lambda self, logits: np.array([0.45, 0.45, 0.1]))
    prompt = "a dog " * 20
    lengths: list[int] = []
    states = EarlyPass.states

    def noted(self: EarlyPass, tokens: list[int]) -> Any:
        lengths.append(len(tokens))
        return states(self, tokens)

    monkeypatch.setattr(EarlyPass, "states", noted)
    answer = tiny_engine.generate(prompt, policy="token", max_tokens=3 * REREAD_TOKENS)
    n = answer.usage["prompt_tokens"]
    assert len(answer.tokens) == 3 * REREAD_TOKENS
    assert lengths == [min(READ_TOKENS, n + REREAD_TOKENS * i) for i in range(4)]


def test_threads_route_at_once(tiny_engine: Any) -> None:
    prompts = [f"{'dog ' * i} number {i}" for i in range(8)]
    wanted = [tiny_engine.route(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(tiny_engine.route, prompts * 4))
    assert found == wanted * 4


class Silent:
    def __init__(self) -> None:
        self.errors: dict[int, Exception] = {}
        self.begun: list[int] = []

    def started(self, number: int, stream: Any) -> None:
        self.begun.append(number)

    def text_added(self, number: int, stream: Any, text: str) -> None: ...

    def ended(self, number: int, stream: Any) -> None: ...

    def failed(self, number: int, error: Exception) -> None:
        self.errors[number] = error


def test_a_route_can_be_cancelled_and_the_next_is_right(tiny_engine: Any) -> None:
    wanted = tiny_engine.route("a cat").probabilities
    heard = Silent()
    scheduler = Scheduler(tiny_engine, heard, parallel=4)
    tiny_engine.model.interrupt.stop(1)
    scheduler.add(1, lambda: tiny_engine.stream("a dog"))
    assert len(scheduler) == 1 and heard.begun == []
    scheduler.cancel(1)
    assert len(scheduler) == 0 and heard.errors == {}
    assert tiny_engine.route("a cat").probabilities == wanted


def test_routing_takes_no_context_from_a_running_answer(tiny_engine: Any) -> None:
    """The bare base's answer stays where it is while others are routed."""
    scheduler = Scheduler(tiny_engine, Silent(), parallel=4)
    scheduler.add(1, lambda: tiny_engine.stream("a dog", mix="base", max_tokens=20))
    scheduler.step()
    assert scheduler._jobs[1].in_context
    scheduler.add(2, lambda: tiny_engine.stream("a cat", max_tokens=4))
    assert scheduler._jobs[1].in_context
    scheduler.close()


def test_a_closed_engine_says_so_and_frees_the_gate(tiny_pack: Path) -> None:
    engine = Engine.open(tiny_pack, n_ctx=64, n_threads=1)
    engine.route("a dog")
    assert len(engine.model.contexts) == 1
    done = threading.Thread(target=engine.close)
    done.start()
    done.join()
    with pytest.raises(Exception, match="closed"):
        engine.route("a dog")
    assert not engine.model.contexts


def test_a_reload_reads_with_the_new_gate(pack: Path) -> None:
    with Engine.open(pack, n_ctx=256, n_threads=1) as engine:
        before = engine.route("a dog")
        prepared = engine.prepare("a dog")
        set_gate(pack, random_head(SKILLS, digest(pack), layers=(0, 2), seed=9))
        assert engine.reload()
        after = engine.route("a dog")
        assert after.probabilities != before.probabilities
        assert engine.route(prepared) == after
        set_gate(pack, random_gate(SKILLS, digest(pack)))
        assert engine.reload() and engine.route("a dog").words == ()
        set_gate(pack, random_head(SKILLS, digest(pack)))
        assert engine.reload() and engine.route("a dog") == before


@pytest.mark.parametrize("info", [{"layers": (N_LAYER,)}, {"layers": (0, 7)}, {"width": 32}])
def test_a_gate_that_does_not_fit_the_base_is_refused(pack: Path, info: dict[str, Any]) -> None:
    set_gate(pack, random_head(SKILLS, digest(pack), **info))
    with pytest.raises(InvalidArtifact, match="loramix train gate tiny"):
        Engine.open(pack)


def test_a_head_of_the_embeddings_alone_runs_no_layer(pack: Path) -> None:
    set_gate(pack, random_head(SKILLS, digest(pack), layers=(0,)))
    with Engine.open(pack, n_ctx=256, n_threads=1) as engine:
        route = engine.route("a dog")
        head = engine.router.gate
        assert isinstance(head, EarlyHead)
        ids = engine.prepare("a dog").routed
        one = EarlyPass(engine.model, [0], n_threads=1)
        states = np.concatenate([one.states([token]) for token in ids])
        wanted = head.probabilities(head(states).logits)
        assert list(route.probabilities.values()) == pytest.approx(wanted, abs=1e-5)


def test_a_damaged_base_is_an_error_of_the_route(tmp_path: Path) -> None:
    import gguf

    base = write_base(tmp_path / "tiny.gguf")
    reader = gguf.GGUFReader(base, "r+")
    next(t for t in reader.tensors if t.name == "blk.0.ffn_down.weight").data[3] = np.nan
    reader.data.flush()
    engine = Engine.open(write_pack(tmp_path / "tiny", base), n_ctx=64, n_threads=1)
    with engine, pytest.raises(NativeError, match="not finite"):
        engine.route("a dog")
