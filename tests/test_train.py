"""Training on a tiny base: the base stays frozen, only answers are learned, kills lose nothing."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_base, write_moods

pytest.importorskip("torch")
import torch
import transformers
from safetensors.torch import load_file

from loramix.cli import main
from loramix.convert.adapter import convert_adapter
from loramix.convert.base_model import autocast_dtype, digest, load_base
from loramix.convert.selfcheck import parity
from loramix.errors import Busy, InvalidRecipe, LoramixError, UsageError
from loramix.formats.gguf_reader import read_gguf
from loramix.train import checkpoint
from loramix.train import recipe as recipes
from loramix.train.data import Example, batches, micro_batches, read_rows
from loramix.train.examples import common_prefix, cut
from loramix.train.forward import collate, hidden_states
from loramix.train.lora import train_skill
from loramix.train.peft_model import attach
from loramix.train.recipe import load_recipe

pytestmark = pytest.mark.train

RECIPE = """
name = "mood"
description = "good or bad"
metrics = ["accuracy"]
[data]
license = "none"
how = "by hand"
[lora]
r = 2
lora_alpha = 4
lora_dropout = 0.1
[training]
epochs = 2
batch_size = 4
evaluate_every = 4
save_every = 2
dev_rows = 6
learning_rate = 1e-2
[instructions]
any = ["mood of {input}?", "{input} good or bad"]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mood.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_moods(tmp_path / "mood.jsonl")


def train(recipe: Path, data: Path, base: Path, out: Path, **options: Any) -> Any:
    return train_skill(load_recipe(str(recipe)), read_rows(data), base, out, **options)


def weights(directory: Path) -> bytes:
    return (directory / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # sums in one order, so that runs can be compared bit by bit


def test_the_base_stays_frozen_and_the_adapter_learns(
    recipe: Path, data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    before = tiny_base.read_bytes()
    plain = digest(load_base(tiny_base, autocast_dtype()))
    lines: list[Any] = []
    result = train(recipe, data, tiny_base, tmp_path / "out", report=lines.append)
    assert tiny_base.read_bytes() == before
    assert result.base_digest == plain
    assert lines[-1].step == lines[-1].steps == 24
    assert np.mean([p.loss for p in lines[-4:]]) < np.mean([p.loss for p in lines[:4]])
    changed = load_base(tiny_base, autocast_dtype())
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert digest(changed) != plain
    written = json.loads((tmp_path / "out" / "adapter" / "loramix.json").read_text())
    assert written["skill"] == "mood" and len(written["base"]["sha256"]) == 64


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_rounds_once_what_autocast_would_round(tied: bool, tmp_path: Path) -> None:
    path = write_base(tmp_path / "base.gguf", tied=tied)
    full, rounded = load_base(path), load_base(path, torch.bfloat16)
    assert rounded.lm_head.weight.dtype == (torch.float32 if tied else torch.bfloat16)
    assert rounded.model.embed_tokens.weight.dtype == rounded.model.norm.weight.dtype == torch.float32
    assert rounded.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    ids = torch.randint(3, 250, (2, 30))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(full(ids).logits, rounded(ids).logits)


def test_the_lowest_layers_can_stay_bare(recipe: Path, data: Path, tiny_base: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.replace("lora_alpha", "skip_lowest = 0.34\nlora_alpha"))
    train(recipe, data, tiny_base, tmp_path / "out", max_steps=4)
    convert_adapter(tmp_path / "out" / "adapter", tiny_base, tmp_path / "mood.gguf", outtype="f32")
    layers = {int(name.split(".")[1]) for name in gguf_names(tmp_path / "mood.gguf")}
    assert layers == {1, 2}  # of three
    assert parity(tiny_base, [(tmp_path / "mood.gguf", tmp_path / "out" / "adapter", 1.0)]).mean_kl < 1e-4


@pytest.mark.parametrize("free", [10**12, 10**4])
def test_activations_are_computed_again_where_memory_is_short(
    free: int, recipe: Path, data: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramix.train.lora.common_prefix", lambda examples: 0)  # it is a pass of its own
    train(recipe, data, tiny_base, tmp_path / "kept", max_steps=3, checkpointing=False)
    calls: list[bool] = []
    mlp = transformers.models.llama.modeling_llama.LlamaMLP
    plain = mlp.forward

    def counted(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(self.training)
        return plain(self, x)

    monkeypatch.setattr(mlp, "forward", counted)
    monkeypatch.setattr("loramix.train.memory.memory_bytes", lambda: (10**12, free))
    train(recipe, data, tiny_base, tmp_path / "memory", max_steps=3)
    passes = 2 if free < 10**6 else 1
    assert sum(calls) == 3 * 3 * passes  # steps, layers
    assert weights(tmp_path / "memory") == weights(tmp_path / "kept")


def gguf_names(path: Path) -> list[str]:
    return list(read_gguf(path.read_bytes(), path.name).tensors)


def test_only_answers_are_learned() -> None:
    parts = [Example(np.arange(10, 17, dtype=np.int32), 2), Example(np.arange(20, 25, dtype=np.int32), 3)]
    ids, mask, answer = collate(parts)
    assert ids.shape == mask.shape == (2, 7)
    assert ids[:, 1:][answer].tolist() == [15, 16, 22, 23, 24]
    assert mask.sum(1).tolist() == [7, 5]
    assert cut(Example(np.arange(20, dtype=np.int32), 4), 12).ids[-4:].tolist() == [16, 17, 18, 19]
    assert len(cut(Example(np.arange(20, dtype=np.int32), 4), 12).ids) == 12


def test_a_shared_prefix_changes_nothing(recipe: Path, tiny_base: Path) -> None:
    model = attach(load_base(tiny_base), load_recipe(str(recipe)).lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.eval()  # no dropout: it would draw other numbers
    ids = torch.randint(3, 250, (5, 30))
    ids[:, :12] = ids[:1, :12]
    mask = torch.ones_like(ids)
    mask[2, 24:] = 0
    found = []
    for prefix in (0, 12):
        model.zero_grad()
        hidden = hidden_states(model.get_base_model().model, ids, mask, prefix)[:, -18:-8]
        hidden.square().sum().backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((hidden.detach(), grads))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-3, rtol=1e-4)
    examples = [Example(row.numpy().astype(np.int32), 3) for row in ids]
    assert common_prefix(examples) == 12


@settings(max_examples=60)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=200), st.integers(1, 17), st.integers(0, 5))
def test_batches_cover_each_row_once(lengths: list[int], size: int, seed: int) -> None:
    found = batches(lengths, size, np.random.default_rng(seed))
    again = batches(lengths, size, np.random.default_rng(seed))
    assert all((a == b).all() for a, b in zip(found, again, strict=True))
    assert sorted(np.concatenate(found).tolist()) == list(range(len(lengths)))
    for batch in found:
        parts = micro_batches(batch, lengths, 100)
        assert sorted(np.concatenate(parts).tolist()) == sorted(batch.tolist())
        assert all(len(part) * max(lengths[i] for i in part) <= 100 for part in parts)


def command(recipe: Path, data: Path, base: Path, out: Path, *more: str) -> list[str]:
    words = ["train", "skill", str(recipe), "--data", str(data), "--base", str(base), "--out", str(out)]
    return [*words, *more]


# dies at the n-th step, or inside the n-th checkpoint: before its rename, when all but that is done
KILLER = """
import os, signal, sys
import loramix.train.lora as lora, loramix.train.checkpoint as checkpoint
import torch; torch.set_num_threads(1)
where, count = sys.argv[1], int(sys.argv[2]); sys.argv = ['loramix', *sys.argv[3:]]
owner, name = (lora._Run, '_step') if where == 'step' else (checkpoint.os, 'replace')
real = getattr(owner, name)
def dying(*words):
    global count
    if where == 'step' or '.partial' in str(words[0]):
        count -= 1
        if count == 0: os.kill(os.getpid(), signal.SIGKILL)
    return real(*words)
setattr(owner, name, dying)
from loramix.cli import main; main()
"""


def test_killed_and_resumed_equals_unbroken(
    recipe: Path, data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(recipe, data, tiny_base, whole)
    for where, count in (("step", 4), ("save", 2), ("step", 7)):
        words = command(recipe, data, tiny_base, broken, "--resume")
        child = forked.run([sys.executable, "-c", KILLER, where, str(count), *words])
        assert child.returncode == -signal.SIGKILL, child.stderr
        assert "Warning" not in child.stderr and "it/s" not in child.stderr  # the libraries' own talk
        assert not (broken / "adapter").exists()
    found = checkpoint.latest(broken / "checkpoints")
    assert found is not None and found.step >= 6
    with pytest.raises(UsageError, match="--resume"):
        train(recipe, data, tiny_base, broken)
    train(recipe, data, tiny_base, broken, resume=True)
    assert weights(broken) == weights(whole)


def test_a_round_begins_as_a_run_does(recipe: Path, data: Path, tiny_base: Path, tmp_path: Path) -> None:
    def losses(out: Path) -> list[float]:
        return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]

    def stop(progress: Any) -> None:
        if progress.step == half + 1:
            raise InterruptedError

    once, twice = tmp_path / "once", tmp_path / "twice"
    recipe.write_text(RECIPE.replace("epochs = 2", "epochs = 1"))
    train(recipe, data, tiny_base, once)
    half = len(losses(once))
    rounds = RECIPE.replace("epochs = 2", "epochs = 2\nrounds = 2").replace(
        "save_every = 2", "save_every = 1"
    )
    recipe.write_text(rounds)
    with pytest.raises(InterruptedError):
        train(recipe, data, tiny_base, twice, report=stop)
    assert losses(twice)[:half] == losses(once)
    before, after = (load_file(d / "adapter.safetensors") for d in sorted((twice / "checkpoints").glob("s*")))
    moved = torch.cat([(after[name] - before[name]).abs().flatten() for name in before])
    # AdamW's first step is the rate itself in each weight, only without moments of the steps before
    assert moved[moved > 0].median().item() == pytest.approx(1e-2, rel=1e-3)


def test_resuming_another_run_is_refused(recipe: Path, data: Path, tiny_base: Path, tmp_path: Path) -> None:
    train(recipe, data, tiny_base, tmp_path / "out", max_steps=2)
    recipe.write_text(RECIPE.replace("1e-2", "1e-3"))
    with pytest.raises(UsageError, match="another recipe"):
        train(recipe, data, tiny_base, tmp_path / "out", resume=True)


def test_two_trainers_in_one_directory(recipe: Path, data: Path, tiny_base: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"), pytest.raises(Busy, match="another process"):
        train(recipe, data, tiny_base, out)


def state(step: int) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    return {"adapter": {"a": torch.full((3,), float(step))}, "optimizer": {"m": torch.zeros(2)}}, {
        "best": step
    }


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json", "COMPLETE"])
@pytest.mark.parametrize("harm", ["truncate", "delete", "zero"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, name: str, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, *state(step))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000003"]
    path = tmp_path / "step-00000003" / name
    content = path.read_bytes()
    if harm == "delete":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if harm == "truncate" else bytes(len(content)))
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 2
    assert torch.equal(found.tensors["adapter"]["a"], torch.full((3,), 2.0))
    assert "damaged" in capsys.readouterr().err


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, *state(1))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loramix.paths.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 2, *state(2))
    monkeypatch.undo()
    found = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 1
    checkpoint.save(tmp_path, 2, *state(2))
    assert checkpoint.latest(tmp_path).step == 2  # type: ignore[union-attr]


def refused(words: list[str], says: str) -> None:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("error: ") and says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "old, new, says",
    [
        ('name = "mood"', 'name = "mood"\ncolour = 1', "colour"),
        ('name = "mood"', 'name = "../mood"', "../mood"),
        ("r = 2", 'r = "two"', "int"),
        ("r = 2", "r = 0", ">= 1"),
        ("epochs = 2", "epochs = -1", "epochs"),
        ("{input} good", "good", "{input}"),
        ('metrics = ["accuracy"]', 'metrics = ["vibes"]', "vibes"),
        ("[lora]", "[lora", "line"),
    ],
)
def test_recipes_that_cannot_be_used(
    recipe: Path, data: Path, tiny_base: Path, tmp_path: Path, old: str, new: str, says: str
) -> None:
    recipe.write_text(RECIPE.replace(old, new))
    with pytest.raises(InvalidRecipe):
        load_recipe(str(recipe))
    refused(command(recipe, data, tiny_base, tmp_path / "out"), says)
    assert not (tmp_path / "out").exists()


GOOD = '{"split": "train", "input": "x", "target": "y"}\n'


@pytest.mark.parametrize(
    "content, says",
    [
        (GOOD + "{nonsense\n", "line 2"),
        (GOOD + "[1]\n", "line 2"),
        (GOOD + '{"split": "train", "input": "x"}\n', "'target'"),
        (GOOD + '{"split": "train", "input": "x", "target": " "}\n', "'target'"),
        (GOOD + '{"split": "train", "input": 5, "target": "y"}\n', "'input'"),
        (GOOD + '{"split": "train", "input": "z", "target": "y", "references": 4}\n', "'references'"),
        (GOOD + "\xff", "UTF-8"),
        ("", "no rows"),
        (GOOD, "no rows of split 'dev'"),
    ],
)
def test_data_that_cannot_be_used(
    recipe: Path, tiny_base: Path, tmp_path: Path, content: str, says: str
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content.encode("latin-1"))
    refused(command(recipe, path, tiny_base, tmp_path / "out"), says)


def test_data_files_that_are_none(recipe: Path, tiny_base: Path, tmp_path: Path) -> None:
    refused(command(recipe, tmp_path / "absent.jsonl", tiny_base, tmp_path / "out"), "no data file")
    broken = tmp_path / "d.jsonl.gz"
    broken.write_bytes(b"\x1f\x8b\x08\0nonsense")
    refused(command(recipe, broken, tiny_base, tmp_path / "out"), "gzip")


def test_repeated_rows_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(GOOD * 3 + GOOD.replace('"x"', '"w"') + GOOD.replace('"train"', '"test"'))
    assert [(row.split, row.input) for row in read_rows(path)] == [("train", "x"), ("train", "w")]


def test_several_targets_of_an_input(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    other = GOOD.replace('"y"', '"z"')
    moved = [line.replace('"train"', '"test"').replace('"x"', '"v"') for line in (GOOD, other)]
    path.write_text("".join([GOOD, other, *moved]))
    rows = read_rows(path)
    assert [(row.split, row.target) for row in rows] == [("train", "y"), ("train", "z"), ("test", "y")]
    assert rows[-1].references == ("y", "z")


SHIPPED = sorted(
    p.stem for p in (Path(recipes.__file__).parent / "recipes").glob("*.toml") if p.stem != "gate"
)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_vary_their_wording(name: str) -> None:
    recipe = load_recipe(name)
    templates = [template for group in recipe.instructions.values() for template in group]
    assert len(set(templates)) == len(templates) >= 20
    assert recipe.name == name and recipe.data.how and recipe.data.license


def test_recipes_change_with_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in recipes.shipped():
        own, large = load_recipe(name), recipes.recipe_for(name, "tinyllama-1.1b:Q4_0")
        assert recipes.recipe_for(name, "smollm2-135m") == recipes.recipe_for(name, "../x.gguf") == own
        assert large.instructions == own.instructions and large.training.epochs == own.training.epochs
        assert large.training.learning_rate < own.training.learning_rate
        assert large.fingerprint() != own.fingerprint()
    mine = tmp_path / "mine.toml"
    mine.write_text(RECIPE)
    assert recipes.recipe_for(str(mine), "tinyllama-1.1b") == load_recipe(str(mine))
    monkeypatch.setattr(recipes, "RECIPES", tmp_path)
    (tmp_path / "bases").mkdir()
    for line, says in (
        ("lora = {r = 0}", "lora.r"),
        ("lora = {r = 4}\nsize = 3", "size"),
        ("lora = {k = 4}", "k"),
    ):
        (tmp_path / "bases" / "odd.toml").write_text(f'description = "x"\n{line}\n')
        with pytest.raises(InvalidRecipe, match=says):
            (tmp_path / "spam.toml").write_text(RECIPE)
            recipes.recipe_for("spam", "odd")


def test_unknown_recipe() -> None:
    with pytest.raises(LoramixError, match="sentiment"):
        load_recipe("nosuch")


def test_a_module_that_no_base_has_is_refused_with_the_recipe(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("[lora]", '[lora]\ntarget_modules = ["query"]'))
    with pytest.raises(InvalidRecipe, match=r"'query'.*target_modules"):
        load_recipe(str(recipe))
