"""One engine, several threads: each gets what it would get alone, and none reaches into what is freed."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_engine import LONG, MIXES, fresh, tokens

from loramix import Engine
from loramix.errors import UsageError


def test_threads_give_the_serial_answers(tiny_engine: Any, tiny_pack: Path) -> None:
    wanted = {mix: fresh(tiny_pack, LONG, mix) for mix in MIXES[:4]}
    wrong: list[str] = []

    def work(mix: str) -> None:
        for _ in range(5):
            if tokens(tiny_engine, LONG, mix) != wanted[mix]:
                wrong.append(mix)

    threads = [threading.Thread(target=work, args=(mix,)) for mix in MIXES[:4]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_closed_while_another_thread_waits_for_it(tiny_pack: Path) -> None:
    engine = Engine.open(tiny_pack, n_ctx=256, n_threads=1)
    refused: list[str] = []

    def ask() -> None:
        try:
            engine.generate("x", mix="sentiment", max_tokens=1)
        except UsageError as error:
            refused.append(str(error))

    waiting = threading.Thread(target=ask)
    with engine.exclusive():
        waiting.start()
        time.sleep(0.2)  # long enough to have seen an open engine
        engine.close()
    waiting.join()
    assert len(refused) == 1 and "closed" in refused[0]


def test_the_gate_reads_an_answers_own_token(tiny_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a token and what the gate reads in it no other thread decodes in the same context."""
    gate = type(tiny_engine.router.gate)
    monkeypatch.setattr(gate, "probabilities", lambda self, features: np.array([0.45, 0.45, 0.1]))
    others: list[threading.Thread] = []
    kept_out: list[bool] = []
    read = Engine.reread

    def reread(self: Engine, prompt: Any, answer: Any, mix: Any) -> Any:
        other = threading.Thread(target=lambda: tokens(self, "another prompt", str(mix), 1))
        other.start()
        other.join(0.2)
        kept_out.append(other.is_alive())
        others.append(other)
        return read(self, prompt, answer, mix)

    monkeypatch.setattr(Engine, "reread", reread)
    tiny_engine.generate(LONG, policy="token", max_tokens=2)
    for other in others:
        other.join()
    assert kept_out == [True, True]
