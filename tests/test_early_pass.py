"""The pass over the lowest layers: the same states as the full pass, and no harm to any other context."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
from test_architectures import BASES
from tiny import N_EMBD, N_LAYER, write_base

from loramix.errors import Interrupted, InvalidPrompt, NativeError
from loramix.models.gate_window import READ_TOKENS, cut_tokens
from loramix.runtime.llama.context import Context
from loramix.runtime.llama.early_pass import EarlyPass
from loramix.runtime.llama.model import Model

TEXT = "Is it good? The cat sat on the mat, and then on the hat. " * 5
LAYERS = [(0,), (1,), (2,), (0, 2), (2, 1)]


@pytest.fixture(scope="module", params=BASES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    options = {"architecture": request.param.split()[0], **BASES[request.param]}
    path = write_base(tmp_path_factory.mktemp("bases") / f"{request.param}.gguf", **options)
    with Model(path, use_extra_bufts=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def tiny(tiny_base: Path) -> Iterator[Model]:
    with Model(tiny_base, use_extra_bufts=False) as opened:
        yield opened


def ids_of(model: Model, length: int) -> list[int]:
    return model.chat([{"role": "user", "content": TEXT}])[:length]


@pytest.mark.parametrize("layers", LAYERS, ids=str)
def test_it_reads_the_states_of_the_full_pass(model: Model, layers: tuple[int, ...]) -> None:
    full = Context(model, n_ctx=256, n_threads=1, taps=sorted(set(layers)))
    early = EarlyPass(model, layers, n_threads=1)
    for length in (1, 2, 33, READ_TOKENS):
        ids = ids_of(model, length)
        full.truncate(0)
        full.decode(ids)
        found = early.states(ids)
        assert found.shape == (length, N_EMBD * len(layers)) and found.dtype == np.float32
        expected = np.concatenate([full.states(layer) for layer in layers], axis=1)
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    full.close()
    early.close()


def test_a_pass_changes_nothing_for_answers_and_later_passes(model: Model) -> None:
    ids, other = ids_of(model, 90), ids_of(model, 150)[60:]
    alone = Context(model, n_ctx=256, n_threads=1)
    logits, following = alone.decode(ids), alone.decode([5])
    alone.close()
    context, early = Context(model, n_ctx=256, n_threads=1), EarlyPass(model, [1], n_threads=1)
    first = early.states(ids)
    np.testing.assert_array_equal(context.decode(ids), logits)
    assert not np.array_equal(early.states(other), first)
    np.testing.assert_array_equal(context.decode([5]), following)
    np.testing.assert_array_equal(early.states(ids), first)
    context.close()
    early.close()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_no_layer_above_runs(tiny: Model, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph's nodes that llama.cpp asks for end at the layer's input."""
    from loramix.runtime.llama.hidden_states import NodeTaps

    seen: list[str] = []
    inner = NodeTaps._on_node

    def watched(self: NodeTaps, node: int, ask: bool, user: object) -> bool:
        seen.append(self._name(node).decode())
        return inner(self, node, ask, user)

    monkeypatch.setattr(NodeTaps, "_on_node", watched)
    early = EarlyPass(tiny, [layer], n_threads=1)
    early.states(ids_of(tiny, 20))
    assert seen[-1] == (f"l_out-{layer - 1}" if layer else "embd")
    assert not any(name.endswith(f"-{above}") for name in seen for above in range(layer, N_LAYER))
    early.close()


def test_it_says_what_it_cannot_read(tiny: Model) -> None:
    for layers in ([N_LAYER], [-1], []):
        with pytest.raises(NativeError, match="layer"):
            EarlyPass(tiny, layers, n_threads=1)
    early = EarlyPass(tiny, [1], n_threads=1)
    for tokens in ([], [1] * (READ_TOKENS + 1), [tiny.n_vocab], [-1]):
        with pytest.raises(InvalidPrompt):
            early.states(tokens)
    assert early.n_tokens_read == 0 and len(early.states([1])) == 1
    early.close()


def test_states_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """A damaged base is an error, not a decision."""
    base = write_base(tmp_path / "damaged.gguf")
    reader = gguf.GGUFReader(base, "r+")
    next(t for t in reader.tensors if t.name == "blk.1.ffn_down.weight").data[3] = np.nan
    reader.data.flush()
    with Model(base, use_extra_bufts=False) as model:
        early = EarlyPass(model, [2], n_threads=1)
        with pytest.raises(NativeError, match="not finite"):
            early.states(ids_of(model, 20))


def test_a_stopped_answer_stops_the_pass_too(tiny: Model) -> None:
    early = EarlyPass(tiny, [2], n_threads=1)
    ids = ids_of(tiny, 60)
    expected = early.states(ids)
    tiny.interrupt.stop(7)
    with tiny.interrupt.running(7), pytest.raises(Interrupted):
        early.states(ids)
    tiny.interrupt.clear(7)
    with tiny.interrupt.running(8):
        np.testing.assert_array_equal(early.states(ids), expected)
    early.close()


def test_threads_may_share_it(tiny: Model) -> None:
    early = EarlyPass(tiny, [1], n_threads=1)
    prompts = [ids_of(tiny, length) for length in (3, 40, 90, 17, 150, 8)]
    expected = [early.states(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(early.states, prompts * 5))
    for states, wanted in zip(found, expected * 5, strict=True):
        np.testing.assert_array_equal(states, wanted)
    early.close()


def test_a_long_prompt_is_cut_to_its_first_and_last_tokens() -> None:
    assert cut_tokens(range(192)) == list(range(192))
    assert cut_tokens(range(193)) == [*range(112), *range(113, 193)]
    assert cut_tokens(range(4000)) == [*range(112), *range(3920, 4000)]
    assert cut_tokens(range(9), 2, 1) == [0, 1, 8]
