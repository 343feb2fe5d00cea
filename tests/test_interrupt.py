"""What nobody wants any more ends in the middle of the graph, and what was known before stays."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_scheduler import Heard

from loramix import Engine
from loramix.errors import Interrupted
from loramix.models.mixing import Mix
from loramix.runtime.llama.context import Context
from loramix.runtime.llama.model import C
from loramix.runtime.scheduler import Scheduler

PROMPT = list(range(3, 203))


@pytest.mark.parametrize("mix", ["base", "sentiment"])
def test_a_graph_ends_in_its_middle_and_the_context_goes_on(tiny_engine: Any, mix: str) -> None:
    interrupt, seen = tiny_engine.model.interrupt, 0

    @C.ggml_backend_sched_eval_callback
    def watch(_node: int, ask: bool, _user: Any) -> bool:
        nonlocal seen
        seen += not ask
        if seen == 20 and not ask:
            interrupt.stop(7)
        return True

    adapters = tiny_engine.decoder.adapters.get(Mix.parse(mix))
    context = Context(tiny_engine.model, adapters, n_ctx=512, n_threads=2, taps=[1], observe=watch)
    fresh = Context(tiny_engine.model, adapters, n_ctx=512, n_threads=2, taps=[1])
    seen = 1000
    context.decode(PROMPT[:100])
    seen = 0
    with interrupt.running(7), pytest.raises(Interrupted):
        context.decode(PROMPT[100:])
    assert 20 <= seen < 30, "the rest of the graph was not computed"
    assert context.tokens == PROMPT[:100]
    interrupt.clear(7)
    fresh.decode(PROMPT[:100])
    with interrupt.running(7):
        assert (context.decode(PROMPT[100:]) == fresh.decode(PROMPT[100:])).all()
    assert (context.states(1) == fresh.states(1)).all()


def test_only_the_answer_that_was_stopped_ends(tiny_engine: Any) -> None:
    interrupt = tiny_engine.model.interrupt
    context = Context(tiny_engine.model, n_ctx=512, n_threads=1)
    interrupt.stop(7)
    with interrupt.running(8):
        context.decode(PROMPT[:50])
    context.decode(PROMPT[50:60])
    with interrupt.running(7), pytest.raises(Interrupted):
        context.decode(PROMPT[60:])
    interrupt.stop(8)  # it is not being decoded now
    context.decode(PROMPT[60:])
    assert context.tokens == PROMPT


@pytest.mark.parametrize("how", [{"mix": "sentiment"}, {"policy": "top1"}, {"policy": "each"}])
def test_a_prompt_that_is_read_for_nobody_is_left_where_it_is(
    tiny_pack: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    monkeypatch.setattr(Context, "N_BATCH", 64)
    heard, long, short = Heard(), "dog " * 60, {"mix": "summarize", "max_tokens": 12}
    with Engine.open(tiny_pack, n_ctx=512, n_threads=1) as engine:
        alone = engine.generate("a dog", **short), engine.generate(long, max_tokens=5, **how)
    with Engine.open(tiny_pack, n_ctx=512, n_threads=1) as engine:
        scheduler = Scheduler(engine, heard, parallel=4)
        scheduler.add(1, lambda: engine.stream("a dog", **short))
        before = partial(engine.routing_request, long, **how)
        scheduler.add(2, lambda: engine.stream(long, **how), before)
        scheduler.step()
        engine.model.interrupt.stop(2)  # another thread has read the message
        for _ in range(4):
            scheduler.step()
        assert 2 not in heard.errors and not heard.texts.get(2)
        scheduler.cancel(2)  # and now it is handled
        scheduler.add(3, lambda: engine.stream(long, max_tokens=5, **how), before)
        while len(scheduler):
            scheduler.step()
    assert not heard.errors and heard.answers.keys() == {1, 3}
    assert heard.answers[1].tokens == alone[0].tokens and heard.answers[3].tokens == alone[1].tokens
