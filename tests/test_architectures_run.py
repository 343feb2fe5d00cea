"""Every architecture at run time: routing, blends, batches, the token policy, embeddings, contributions, export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_architectures import BASES
from tiny import write_base, write_pack

from loramix import Engine, Mix
from loramix.architectures import ARCHITECTURES
from loramix.diagnose.memory_plan import make_plan
from loramix.runtime.llama.context import Context
from loramix.runtime.llama.model import Model

PROMPT = "Is it good? The cat sat on the mat."


@pytest.fixture(scope="module", params=[name for name in BASES if name != "llama"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"architecture": request.param.split()[0], **BASES[request.param]}
    return write_base(tmp_path_factory.mktemp("bases") / f"{request.param}.gguf", **options)


@pytest.fixture(scope="module")
def pack(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packs") / "tiny"
    return write_pack(directory, base, head=BASES[base.stem].get("head", 16), size=0.2)


@pytest.fixture(scope="module")
def engine(pack: Path) -> Iterator[Engine]:
    with Engine.open(pack, n_ctx=256, n_threads=1) as engine:
        yield engine


def test_a_mix_decodes_as_its_adapters_do_apart(engine: Engine) -> None:
    """The fused blend that answers gives the logits of the two adapters side by side."""
    ids = engine.model.chat([{"role": "user", "content": PROMPT}])
    mix = Mix.parse("sentiment=0.5,summarize=0.25")
    apart = [(a, mix.scales[name]) for name, a in engine.decoder.adapters.unfused(mix).items()]
    options: dict[str, Any] = {"n_ctx": 256, "n_threads": 1}
    side_by_side = Context(engine.model, apart, **options)
    fused = Context(engine.model, engine.decoder.adapters.get(mix), **options)
    bare = Context(engine.model, **options)
    a, b, none = (context.decode(ids) for context in (side_by_side, fused, bare))
    for context in (side_by_side, fused, bare):
        context.close()
    assert np.abs(a - b).max() < 0.02 * np.abs(a - none).max()


@pytest.mark.parametrize("policy", ["each", "top1", "blend", "token", "base"])
def test_every_policy_answers(policy: str, engine: Engine) -> None:
    first = engine.generate(PROMPT, policy=policy, max_tokens=6)
    assert first.tokens and first.route.policy == policy
    assert engine.generate(PROMPT, policy=policy, max_tokens=6).tokens == first.tokens


def test_the_gate_reads_the_same_states_in_pieces(engine: Engine) -> None:
    """Tapped states do not depend on how many tokens are decoded at once."""
    ids = engine.model.chat([{"role": "user", "content": PROMPT}])
    whole = Context(engine.model, n_ctx=256, n_threads=1, taps=(0, 1, 2))
    pieces = Context(engine.model, n_ctx=256, n_threads=1, taps=(0, 1, 2))
    whole.decode(ids)
    for start in range(0, len(ids), 5):
        pieces.decode(ids[start : start + 5])
    for layer in (0, 1, 2):
        assert whole.states(layer).shape == (len(ids), engine.model.n_embd)
        assert np.abs(whole.states(layer)).max() > 0
        np.testing.assert_allclose(whole.states(layer), pieces.states(layer), rtol=1e-3, atol=1e-3)
    whole.close()
    pieces.close()


def test_contributions_name_both_skills(engine: Engine) -> None:
    from loramix.runtime.contributions import contributions

    answer = engine.generate(PROMPT, mix={"sentiment": 0.5, "summarize": 0.5}, max_tokens=4)
    found = contributions(engine, answer)
    assert found.skills == ["sentiment", "summarize"]
    assert found.values.shape == (2, engine.model.n_layer, len(answer.tokens)) and (found.values > 0).all()


def test_embeddings_are_unit_vectors(engine: Engine) -> None:
    (vector,), _ = engine.embed([PROMPT])
    assert abs(float(np.linalg.norm(vector)) - 1) < 1e-3


def test_a_plan_can_be_made(base: Path, pack: Path) -> None:
    from loramix.pack.pack import Pack

    assert make_plan(base, pack=Pack.load(str(pack))).memory_bytes > 40e6


def test_a_merged_base_is_the_running_mix(pack: Path, tmp_path: Path) -> None:
    from loramix.convert.export import choose, export_gguf

    found = export_gguf(choose(str(pack), "sentiment=1"), tmp_path / "merged.gguf")
    assert found.mean_kl < found.bare_kl / 20


def test_node_taps_read_what_llama_cpp_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an architecture that has both, the callback's states are those of llama.cpp's own taps."""
    ids = list(range(3, 40))
    with Model(write_base(tmp_path / "l.gguf")) as model:
        kept = Context(model, n_ctx=64, n_threads=1, taps=(1, 2))
        kept.decode(ids)
        without = type(ARCHITECTURES["llama"])(
            **{
                name: getattr(ARCHITECTURES["llama"], name)
                for name in ARCHITECTURES["llama"].__slots__
                if name != "taps_layer_inputs"
            }
        )
        monkeypatch.setattr(model, "architecture", without)
        read = Context(model, n_ctx=64, n_threads=1, taps=(1, 2))
        read.decode(ids)
        for layer in (1, 2):
            np.testing.assert_array_equal(kept.states(layer), read.states(layer))
        kept.close()
        read.close()
