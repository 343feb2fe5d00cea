"""Late adapters: the prompt is read by the bare base, the adapter acts from the answer's header on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from test_labels import SETS, brute_force, set_labels
from tiny import random_gate, write_moods, write_peft

pytest.importorskip("torch")
import torch
from peft import LoraConfig, get_peft_model

from loramix import Engine
from loramix.convert.adapter import convert_adapter
from loramix.convert.base_model import load_base
from loramix.convert.selfcheck import check
from loramix.errors import InvalidArtifact
from loramix.eval.torch_answers import torch_answers
from loramix.formats.validate import check_adapter, read_base
from loramix.models import bases
from loramix.models.mixing import Mix
from loramix.pack.edit import add_skill, set_gate
from loramix.pack.pack import Pack
from loramix.runtime.batch import run_batch
from loramix.runtime.children import tokenize_rows
from loramix.runtime.detokenize import detokenize
from loramix.train.activated_lora import late_states
from loramix.train.data import Example, read_rows
from loramix.train.examples import header
from loramix.train.lora import train_skill
from loramix.train.recipe import load_recipe

pytestmark = pytest.mark.train

HEADER = [5, 6, 7]
RECIPE = """
name = "mood"
description = "good or bad"
metrics = ["accuracy"]
max_tokens = 6
activation = "answer"
[data]
license = "none"
how = "by hand"
[lora]
r = 4
target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
[training]
epochs = 4
batch_size = 8
evaluate_every = 8
dev_rows = 6
learning_rate = 1e-2
[instructions]
any = ["mood of {input}?", "{input} good or bad"]
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def model_of(base: Path, **options: Any) -> Any:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM", **options)
    torch.manual_seed(0)
    model = get_peft_model(load_base(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def examples(prefix: int) -> list[Example]:
    rng = np.random.default_rng(0)
    start = rng.integers(10, 250, prefix)
    rows = []
    for n_text, n_answer in ((9, 3), (14, 1), (5, 6)):
        ids = [*start, *rng.integers(10, 250, n_text), *HEADER, *rng.integers(10, 250, n_answer)]
        rows.append(Example(np.asarray(ids, np.int32), n_answer))
    return rows


@pytest.mark.parametrize("prefix", [0, 8])
def test_as_peft_computes_it(prefix: int, tiny_base: Path) -> None:
    part = examples(prefix)
    ours = model_of(tiny_base)
    hidden, ids, answer = late_states(ours, part, len(HEADER), prefix)
    logits = ours.get_base_model().lm_head(hidden[:, :-1][answer])
    labels = ids[:, 1:][answer]
    assert labels.tolist() == [token for e in part for token in e.ids[-e.n_answer :]]
    theirs = model_of(tiny_base, alora_invocation_tokens=HEADER)
    with torch.no_grad():
        rows = [theirs(input_ids=torch.tensor(e.ids[None].astype(np.int64))).logits[0] for e in part]
    wanted = torch.cat([row[-e.n_answer - 1 : -1] for row, e in zip(rows, part, strict=True)])
    assert torch.allclose(logits, wanted, atol=1e-4)
    always = model_of(tiny_base)
    with torch.no_grad():
        row = always(input_ids=torch.tensor(part[0].ids[None].astype(np.int64))).logits[0]
    assert not torch.allclose(row[-4:-1], wanted[:3], atol=1e-2), "acting on the prompt too is another thing"


def test_gradients_reach_every_matrix(tiny_base: Path) -> None:
    model = model_of(tiny_base)
    hidden, _, _ = late_states(model, examples(8), len(HEADER), 8)
    hidden.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == 3 * 3 * 2 and all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_the_header_is_what_prompts_end_with() -> None:
    assert header([1, 2, 8, 5, 6], [1, 2, 9, 5, 6]) == [5, 6]


def test_a_late_adapter_learns_and_says_what_it_is(tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "mood.toml"
    path.write_text(RECIPE)
    data = write_moods(tmp_path / "mood.jsonl")
    losses: list[float] = []
    train_skill(
        load_recipe(str(path)),
        read_rows(data),
        tiny_base,
        tmp_path / "run",
        report=lambda p: losses.append(p.loss),
    )
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"][0] == 2, "from the end of the user's turn on"


def pack_of(tiny_pack: Path, base: Path, directory: Path, *, invocation: list[int]) -> Path:
    """The tiny pack with two late skills, random and strong."""
    pack = Path(shutil.copytree(tiny_pack, directory / "late"))
    for seed, name in enumerate(("first", "second"), 11):
        peft = write_peft(directory / name, seed=seed, alora_invocation_tokens=invocation)
        out = directory / f"{name}.gguf"
        digest = bases.digest(base)
        convert_adapter(peft, base, out, name=name, base_sha256=digest, outtype="f32")
        add_skill(pack, name, out, description=name, max_tokens=12)
    names = ["sentiment", "summarize", "first", "second"]
    set_gate(pack, random_gate(names, bases.digest(base)))
    return pack


@pytest.fixture
def pack(tiny_pack: Path, tiny_base: Path, tmp_path: Path) -> Path:
    (ids, _), (other, _) = tokenize_rows(tiny_base, [{"prompt": "a"}, {"prompt": "b"}])[0]
    return pack_of(tiny_pack, tiny_base, tmp_path, invocation=header(ids.tolist(), other.tolist()))


@pytest.fixture
def engine(pack: Path) -> Iterator[Any]:
    with Engine.open(pack, n_ctx=512, n_threads=1) as engine:
        yield engine


def test_it_answers_as_peft_does(engine: Any, tmp_path: Path) -> None:
    """The same texts as PEFT's, up to the first token that another kernel could choose otherwise."""
    prompts = [f"the quick brown fox {i} " * 4 for i in range(4)]
    sure = 0
    for name in ("first", "second"):
        theirs = torch_answers(engine, tmp_path / name, prompts, 8, tmp_path)
        texts = set()
        for prompt, text in zip(prompts, theirs, strict=True):
            answer = engine.generate(prompt, mix=name, max_tokens=8, top_logprobs=2)
            margins = [top[0][1] - top[1][1] for _, _, top in answer.scores]
            certain = next((i for i, margin in enumerate(margins) if margin < 0.5), len(margins))
            assert text.startswith(detokenize(engine.model, answer.tokens[:certain]))
            sure += certain
            texts.add(answer.text)
        assert len(texts) > 1
    assert sure >= 8, "too few of 64 tokens to tell"


def test_the_gates_pass_is_the_prefill(engine: Any) -> None:
    prompt = "the quick brown fox jumps over the lazy dog"
    engine.route(prompt)
    answer = engine.generate(prompt, mix="first", max_tokens=4)
    header_length = len(engine.decoder.adapters.invocation(Mix.parse("first")))
    assert answer.usage["cached_tokens"] == answer.usage["prompt_tokens"] - header_length
    again = engine.generate(prompt, mix="second", max_tokens=4)
    assert again.usage["cached_tokens"] == again.usage["prompt_tokens"] - header_length
    plain = engine.generate(prompt, mix="sentiment", max_tokens=4)
    assert plain.usage["cached_tokens"] == 0


def test_switches_in_a_conversation_answer_as_fresh_engines_do(engine: Any, pack: Path) -> None:
    messages: list[dict[str, str]] = []
    for turn, mix in enumerate(("first", "second", "sentiment", "first=0.5,second=0.5", "base", "first")):
        messages.append({"role": "user", "content": f"turn {turn}: what now?"})
        answer = engine.generate(messages, mix=mix, max_tokens=5)
        with Engine.open(pack, n_ctx=512, n_threads=1) as fresh:
            assert fresh.generate(messages, mix=mix, max_tokens=5).tokens == answer.tokens, mix
        if turn in (1, 5):
            assert answer.usage["cached_tokens"] > 10, "the history is the bare base's, whoever answered"
        messages.append({"role": "assistant", "content": answer.text})


def test_two_answers_at_once_under_one_mix(engine: Any) -> None:
    prompts = ("the quick brown fox", "a lazy dog sleeps all day long")
    alone = [engine.generate(prompt, mix="first", max_tokens=10).tokens for prompt in prompts]
    streams = [engine.stream(prompt, mix="first", max_tokens=10) for prompt in prompts]
    going = list(streams)
    while going:
        for stream in list(going):
            if next(stream, None) is None:
                going.remove(stream)
    assert [stream.answer.tokens for stream in streams] == alone


def test_a_header_that_prompts_lack_is_refused(tiny_pack: Path, tiny_base: Path, tmp_path: Path) -> None:
    pack = pack_of(tiny_pack, tiny_base, tmp_path, invocation=[9, 9, 9])
    with Engine.open(pack, n_ctx=512, n_threads=1) as engine:
        with pytest.raises(InvalidArtifact, match="do not end with"):
            engine.generate("x", mix="first", max_tokens=1)
        assert engine.generate("x", mix="sentiment", max_tokens=1).tokens


def test_conversion_keeps_the_header_and_the_matrices(tiny_base: Path, tmp_path: Path) -> None:
    peft = write_peft(tmp_path / "peft", alora_invocation_tokens=[2, 201, 1])
    convert_adapter(peft, tiny_base, tmp_path / "a.gguf", outtype="f32")
    _, shape = read_base(tiny_base)
    assert check_adapter((tmp_path / "a.gguf").read_bytes(), shape, "a").invocation == (2, 201, 1)
    field = gguf.GGUFReader(tmp_path / "a.gguf").fields["adapter.alora.invocation_tokens"]
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32], "as llama.cpp wants it"
    assert check(tiny_base, tmp_path / "a.gguf", peft, exact=True).max_difference < 1e-3


@pytest.mark.parametrize("tokens", [[10**6], [0] * 65, ["x"], 7])
def test_headers_that_are_none(tokens: Any, tiny_base: Path, tmp_path: Path) -> None:
    peft = write_peft(tmp_path / "peft", alora_invocation_tokens=tokens)
    with pytest.raises(InvalidArtifact, match="alora"):
        convert_adapter(peft, tiny_base, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_a_refused_reload_leaves_late_adapters_late(engine: Any, pack: Path) -> None:
    plain = Pack.load(pack).adapter_path("sentiment").read_bytes()
    for name in ("first", "second"):
        add_skill(pack, name, plain, description=name, max_tokens=12, replace_existing=True)
    file = Pack.load(pack).adapter_path("second")
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(InvalidArtifact, match="SHA-256"):
        engine.reload()
    prompt = "the quick brown fox jumps over the lazy dog"
    engine.route(prompt)
    for name in ("first", "second"):
        assert engine.generate(prompt, mix=name, max_tokens=1).usage["cached_tokens"] > 0, (
            "by the gate's pass"
        )


@pytest.mark.parametrize("name", ["shared beginnings", "many"])
def test_labels_of_a_late_skill(pack: Path, name: str, tmp_path: Path) -> None:
    """Probabilities are those of scoring each label; batches and streams give the same labels."""
    labels = SETS[name]
    set_labels(pack, labels, 1.5, skill="first")
    prompts = [f"{text} {i}" for i in range(3) for text in ("Is it good?", "x", "the quick brown fox")]
    with Engine.open(pack, n_ctx=512, n_threads=1) as engine:
        alone = [engine.generate(prompt, mix="first") for prompt in prompts]
        assert all(answer.text in labels for answer in alone)
        wanted = brute_force(engine, prompts[0], labels, 1.5, "first")
        assert alone[0].labels == pytest.approx(
            {label: wanted[label] for label in alone[0].labels}, rel=0.02, abs=1e-4
        )
        assert "".join(engine.stream(prompts[1], mix="first")) == alone[1].text
        source = tmp_path / "in.jsonl"
        source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        run_batch(engine, source, tmp_path / "out.jsonl", mix="first", parallel=4)
        rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [row["text"] for row in rows] == [answer.text for answer in alone]
