"""Late adapters: the prompt is read by the bare base, the adapter acts from the answer's header on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
import torch
from peft import LoraConfig, get_peft_model

from loramix.train.data import Example, read_rows
from loramix.train.frozen import load_base
from loramix.train.late import header, late_states
from loramix.train.lora import train_skill
from loramix.train.recipe import Recipe, load_recipe

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
    assert header([[1, 2, 8, 5, 6], [1, 2, 9, 5, 6]]) == [5, 6]


def recipe_and_data(directory: Path) -> tuple[Recipe, Path]:
    path, data = directory / "mood.toml", directory / "mood.jsonl"
    path.write_text(RECIPE)
    rows = [
        {"split": "dev" if i % 5 == 0 else "train", "input": f"{word} day {i}", "target": mood}
        for i in range(30)
        for word, mood in (("sunny", "good"), ("rainy", "bad"))
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_recipe(str(path)), data


def test_a_late_adapter_learns_and_says_what_it_is(tiny_base: Path, tmp_path: Path) -> None:
    recipe, data = recipe_and_data(tmp_path)
    losses: list[float] = []
    train_skill(recipe, read_rows(data), tiny_base, tmp_path / "run", report=lambda p: losses.append(p.loss))
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"][0] == 2, "from the end of the user's turn on"
