"""Joint training in benchmarks/joint: as PEFT trains, each adapter as if alone, finished results are kept."""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tiny import write_base, write_peft

pytest.importorskip("torch")
import torch

sys.path.append(str(Path(__file__).parent.parent))  # benchmarks is not installed
from benchmarks.joint import JointError, results, training
from benchmarks.joint import export as exporting
from benchmarks.joint import prepare as preparing
from benchmarks.joint import train as command
from benchmarks.joint.evaluate import evaluate, label_figures
from benchmarks.joint.model import MATRICES, Base
from benchmarks.joint.rows import Rows, SkillRows, collate, pack, read_skill, training_sequences
from benchmarks.joint.slots import Layout, Slot, read_slots
from benchmarks.joint.training import Run, SlotTraining
from loramix.convert.adapter import convert_adapter, to_gguf
from loramix.convert.base_model import load_base
from loramix.convert.peft_reader import PeftAdapter
from loramix.formats.gguf_reader import read_gguf
from loramix.formats.validate import check_adapter, read_base
from loramix.train import forward
from loramix.train.data import Example
from loramix.train.peft_model import attach
from loramix.train.recipe import Lora, load_recipe

pytestmark = pytest.mark.train
ROOT = Path(__file__).parent.parent
LIMIT = 48
CPU = torch.device("cpu")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("joint")
    kinds: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {"tied": False}}
    return {
        kind: write_base(directory / f"{kind}.gguf", architecture=kind, spread=0.1, **options)
        for kind, options in kinds.items()
    }


def random_rows(count: int, seed: int, n_labels: int = 2) -> dict[str, Any]:
    """Arrays of random rows whose answer, a label's token and an end, follows from their first token."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, 24, count).astype(np.int32)
    rows = [rng.integers(10, 200, length) for length in lengths]
    labels = np.array([row[0] % n_labels for row in rows], np.int32)
    for row, label in zip(rows, labels, strict=True):
        row[-2:] = 210 + label, 2
    ids = np.concatenate(rows).astype(np.int32)
    return {"ids": ids, "lengths": lengths, "answers": np.full(count, 2, np.int32), "labels": labels}


def write_rows(path: Path, base: Path, *, count: int = 60, seed: int = 0, passes: int = 2) -> None:
    """A file of prepared rows."""
    parts = {f"pass{i}": random_rows(count, seed + i) for i in range(passes)}
    for split in ("dev", "test"):
        parts[split] = random_rows(10, seed + 50)
        parts[split] |= {"sources": np.arange(10, dtype=np.int32) % 2, "source_names": np.array(["a", "b"])}
    arrays = {f"{name}.{key}": array for name, part in parts.items() for key, array in part.items()}
    digest = hashlib.sha256(base.read_bytes()).hexdigest()
    arrays |= {"labels": np.array(["no", "yes"]), "label_tokens": np.array([210, 211], np.int32)}
    path.parent.mkdir(exist_ok=True)
    np.savez(path, base_sha256=np.array(digest), **arrays)


def write_slots(path: Path, *tables: str) -> Path:
    path.write_text("".join(f"[[slots]]\n{table}\n" for table in tables))
    return path


def joint(base: Path, run: Path, *more: str, code: int = 0) -> str:
    """Run ``joint.train`` on ``run/slots.toml`` and ``run/data``; return what it prints."""
    words = ["--base", str(base), "--data", str(run / "data"), "--config", str(run / "slots.toml")]
    words += [
        "--out",
        str(run / "out"),
        "--length",
        str(LIMIT),
        "--sequences",
        "2",
        "--dtype",
        "float32",
        *more,
    ]
    found = CliRunner().invoke(command.main, words)
    assert found.exit_code == code, found.output
    return found.output


def result(out: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    found = results.load(out, name)
    assert found is not None
    return found


def trained(run: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return result(run / "out", name)


@pytest.fixture
def run(bases: dict[str, Path], tmp_path: Path) -> Path:
    """A run of a short slot and a long one on llama."""
    write_rows(tmp_path / "data" / "first.npz", bases["llama"])
    write_rows(tmp_path / "data" / "second.npz", bases["llama"], seed=20)
    write_slots(
        tmp_path / "slots.toml",
        'name = "short"\nskill = "first"\nrate = 3e-2\nrank = 2',
        'name = "long"\nskill = "second"\nrate = 2e-2\nrank = 4\npasses = [0, 1]\nmatrices = ["attn_q", "ffn_down"]',
    )
    return tmp_path


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_losses_and_gradients_are_those_of_peft(kind: str, bases: dict[str, Path]) -> None:
    lora = Lora(r=4, lora_alpha=8, target_modules=MODULES, skip_lowest=0.34)
    model = attach(load_base(bases[kind]), lora)
    generator = torch.Generator().manual_seed(3)
    pairs: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1, generator=generator)
            pairs.setdefault(name.removeprefix("base_model.model.").split(".lora_")[0], []).append(parameter)
    part = random_rows(9, 1)
    rows = Rows(np.split(part["ids"], np.cumsum(part["lengths"])[:-1]), part["answers"])
    ids, mask, answer = forward.collate([Example(row, 2) for row in rows.ids])
    inner = model.get_base_model()
    logits = inner.lm_head(forward.hidden_states(inner.model, ids, mask, 0)[:, :-1][answer])
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:][answer])
    expected.backward()

    _, shape = read_base(bases[kind])

    def converted(arrays: dict[str, Any]) -> dict[str, Any]:
        return to_gguf(PeftAdapter(arrays, dict.fromkeys(arrays, 2.0), "x"), shape)[0]

    base = Base(bases[kind], CPU, torch.float32)
    start = converted({name: tuple(p.detach().numpy() for p in pair) for name, pair in pairs.items()})
    slot = Slot("x", "x", 0.1, rank=4, start_arrays=start)
    layout = Layout(base.shape, [slot], 1)
    skill = SkillRows((rows,), rows, None, (), np.zeros(0, np.int32), "", "")
    sequences = training_sequences(skill, (0,), LIMIT, 0)
    assert 2 < len(sequences) < 9, "several rows share a sequence"
    one = SlotTraining(slot, skill, sequences, 1, torch.nn.Parameter(layout.start(slot, 0)), {})
    loss = Run(base, layout, Path(), LIMIT, len(sequences)).losses([one], 0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    assert one.parameter.grad is not None
    found = layout.arrays(one.parameter.grad, slot)
    gradients = converted({name: tuple(p.grad.numpy() for p in pair) for name, pair in pairs.items()})
    assert found.keys() == gradients.keys() and len(found) == 2 * 2 * len(MATRICES)
    for name, gradient in gradients.items():
        assert np.abs(gradient).max() > 1e-3, "there is something to compare"
        np.testing.assert_allclose(found[name], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_no_row_sees_another(kind: str, bases: dict[str, Path]) -> None:
    base = Base(bases[kind], CPU, torch.float32)
    part = random_rows(3, 5)
    rows = Rows(np.split(part["ids"], np.cumsum(part["lengths"])[:-1]), part["answers"])
    batch = collate([(rows, [0, 1, 2])], 80, CPU)
    together = base.hidden(batch.ids, batch.positions, batch.segments)[0]
    begin = 0
    for number, row in enumerate(rows.ids):
        alone = collate([(rows, [number])], len(row), CPU)
        hidden = base.hidden(alone.ids, alone.positions, alone.segments)[0]
        torch.testing.assert_close(together[begin : begin + len(row)], hidden, atol=1e-5, rtol=1e-4)
        begin += len(row)
    changed = batch.ids.clone()
    changed[0, : len(rows.ids[0])] = 7
    other = base.hidden(changed, batch.positions, batch.segments)[0]
    assert torch.equal(other[len(rows.ids[0]) :], together[len(rows.ids[0]) :])
    assert not torch.equal(other[: len(rows.ids[0])], together[: len(rows.ids[0])])
    targets = batch.targets[0][batch.targets[0] >= 0].tolist()
    assert targets == [token for row in rows.ids for token in row[-2:].tolist()]


def test_packing_has_each_row_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 700).tolist()
    order = np.random.default_rng(1).permutation(700).tolist()
    found = pack(lengths, order, 100)
    assert sorted(row for rows in found for row in rows) == list(range(700))
    sizes = [sum(lengths[row] for row in rows) for rows in found]
    assert max(sizes) <= 100 and np.mean(sizes) > 90


def test_adapters_trained_together_are_as_if_alone(run: Path, bases: dict[str, Path]) -> None:
    said = joint(bases["llama"], run)
    assert "2 of 2 slots to train" in said
    rows = read_skill(run / "data" / "first.npz").passes[0]
    assert trained(run, "short")[1]["tokens"] >= sum(rows.lengths), "each row once, the first ones again"
    tables = (run / "slots.toml").read_text().split("[[slots]]\n")[1:]
    for name, table in zip(("short", "long"), tables, strict=True):
        together, record = trained(run, name)
        alone = run / f"alone-{name}"
        (alone / "data").parent.mkdir()
        (alone / "data").symlink_to(run / "data")
        write_slots(alone / "slots.toml", table)
        joint(bases["llama"], alone)
        arrays, own = trained(alone, name)
        assert arrays.keys() == together.keys()
        for key, array in arrays.items():
            np.testing.assert_allclose(array.astype(np.float32), together[key].astype(np.float32), atol=1e-3)
        for ours, theirs in zip(record["checks"], own["checks"], strict=True):
            assert ours["step"] == theirs["step"] and ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert record["finished"] and record["checks"][-1]["step"] == record["steps"]
        assert record["start"]["loss"] > record["checks"][-1]["loss"] + 0.5, "it learned"
    _, shape = read_base(bases["llama"])
    assert {key.split(".")[2] for key in trained(run, "long")[0]} == {"attn_q", "ffn_down"}
    assert trained(run, "short")[0]["blk.1.attn_k.weight.lora_a"].shape == (2, shape.n_embd)


def test_an_interrupted_run_keeps_finished_slots(
    run: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    joint(bases["llama"], run)
    whole = {name: trained(run, name) for name in ("short", "long")}
    n_short, n_long = (record["steps"] for _, record in whole.values())
    assert 4 < n_short < n_long - 2
    (run / "out").rename(run / "uninterrupted")
    losses = Run.losses

    def interrupted(self: Run, trainings: Any, step: int) -> torch.Tensor:
        if step == n_short + 1:
            raise KeyboardInterrupt
        return losses(self, trainings, step)

    monkeypatch.setattr(Run, "losses", interrupted)
    joint(bases["llama"], run, code=1)
    files = {path.name: path.stat().st_mtime_ns for path in (run / "out").iterdir()}
    assert trained(run, "short")[1]["finished"] and not trained(run, "long")[1]["finished"]
    monkeypatch.undo()
    said = joint(bases["llama"], run)
    assert "1 of 2 slots to train" in said
    assert (run / "out" / "short.0.npz").stat().st_mtime_ns == files["short.0.npz"]
    for name, (arrays, record) in whole.items():
        again, own = trained(run, name)
        assert own["finished"] and own["best_step"] == record["best_step"]
        for key, array in arrays.items():
            np.testing.assert_allclose(again[key].astype(np.float32), array.astype(np.float32), atol=1e-3)
    assert "0 of 2 slots to train" in joint(bases["llama"], run)
    assert "has slot 'short' with other settings or data" in joint(bases["llama"], run, "--seed", "2", code=1)


def test_a_deadline_and_limits(run: Path, bases: dict[str, Path]) -> None:
    said = joint(bases["llama"], run, "--dtype", "bfloat16", "--deadline", "0")
    assert "deadline at step 1: short, long not finished" in said
    _, record = trained(run, "long")
    assert not record["finished"] and record["best_step"] == 1 and len(record["checks"]) == 1
    joint(bases["llama"], run, "--dtype", "bfloat16", "--max-steps", "3", "--seconds", "1000")
    for name in ("short", "long"):
        _, record = trained(run, name)
        assert record["finished"] and record["steps"] == record["planned_steps"] == 3
        assert record["test"]["sources"]["a"]["rows"] == 5
    assert training.rate(1.0, 4, 100) == 1.0 and training.rate(1.0, 100, 100) == pytest.approx(0.1)
    assert training.rate(1.0, 2, 100) == 0.5 and training.rate(1.0, 52, 100) == pytest.approx(0.55)


def test_an_adapter_is_exported_and_continued(run: Path, bases: dict[str, Path]) -> None:
    joint(bases["llama"], run, "--max-steps", "12")
    words = [str(run / "out"), "--base", str(bases["llama"]), "--out", str(run / "adapters")]
    found = CliRunner().invoke(exporting.main, words)
    assert found.exit_code == 0 and "long.gguf: finished, dev loss" in found.output, found.output
    path = run / "adapters" / "long.gguf"
    _, shape = read_base(bases["llama"])
    digest = hashlib.sha256(bases["llama"].read_bytes()).hexdigest()
    info = check_adapter(path.read_bytes(), shape, "long", base_sha256=digest)
    assert info.alpha == 8.0 and set(info.ranks.values()) == {4}
    assert info.metadata["loramix.base.name"] == "llama.gguf" and info.metadata["general.name"] == "second"
    assert info.metadata["loramix.base.sha256"] == digest
    kinds = {name: tensor.type_name for name, tensor in read_gguf(path.read_bytes(), "").tensors.items()}
    assert all(kind == ("Q8_0" if name.endswith("a") else "F16") for name, kind in kinds.items())
    written = json.loads((run / "adapters" / "long.json").read_text())
    assert written["slot"]["rate"] == 2e-2 and written["run"]["seed"] == 1
    best = min(check["loss"] for check in written["checks"])
    # a larger rank and another matrix change nothing at the start
    (slot,) = read_slots(
        write_slots(
            run / "more.toml",
            'name = "more"\nskill = "second"\nrate = 1e-3\nrank = 6\nstart = "adapters/long.gguf"\n'
            'matrices = ["attn_q", "attn_v", "ffn_down"]',
        )
    )
    base = Base(bases["llama"], CPU, torch.float32)
    layout = Layout(base.shape, [slot], 1)
    skill = read_skill(run / "data" / "second.npz")
    adapters = layout.adapters(layout.start(slot, 1)[None])
    figures = evaluate(base, adapters, skill.dev, skill.label_tokens, LIMIT)
    assert figures["loss"] == pytest.approx(best, abs=0.02), "but the rounding of A"
    assert adapters["blk.1.attn_v.weight"][0].abs().max() > 0
    # alpha of a start from elsewhere is folded into B
    convert_adapter(write_peft(run / "peft", r=4, lora_alpha=4), bases["llama"], run / "peft.gguf")
    (other,) = read_slots(
        write_slots(run / "peft.toml", 'name = "x"\nskill = "x"\nrate = 0.1\nstart = "peft.gguf"')
    )
    assert other.matrices == MATRICES[:4]
    tensors = read_gguf((run / "peft.gguf").read_bytes(), "").tensors
    assert tensors.keys() == other.start_arrays.keys()
    with pytest.raises(JointError, match="lower --skip-lowest"):
        Layout(base.shape, [other], 1).start(other, 1)
    a, b = Layout(base.shape, [other], 0).adapters(Layout(base.shape, [other], 0).start(other, 1)[None])[
        "blk.0.attn_q.weight"
    ]
    stored = {
        half: np.array(other.start_arrays[f"blk.0.attn_q.weight.lora_{half}"], np.float32) for half in "ab"
    }
    np.testing.assert_allclose(2 * (b[0] @ a[0]).numpy(), 2 * stored["b"] @ stored["a"], atol=1e-6)
    assert a.shape == (1, 8, 64) and a[0, 4:].abs().max() > 0 and b[0, :, 4:].abs().max() == 0


def test_large_results_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "PART_BYTES", 5000)
    arrays = {f"blk.{i}": np.full((20, 50), i, np.float32) for i in range(7)}
    results.save(tmp_path, "x", arrays, {"finished": True})
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == [f"x.{i}.npz" for i in range(4)]
    found, record = result(tmp_path, "x")
    assert record == {"finished": True, "parts": 4} and found.keys() == arrays.keys()
    assert all((found[name] == array).all() for name, array in arrays.items())
    old = files[2].read_bytes()
    results.save(tmp_path, "x", arrays, {"finished": False})
    files[2].write_bytes(old)  # as after an interruption
    assert results.load(tmp_path, "x") is None
    files[2].write_bytes(old[:100])
    assert results.load(tmp_path, "x") is None and results.load(tmp_path, "y") is None


RECIPE = """
name = "mood"
description = "d"
metrics = ["accuracy"]
instructions = { any = ["Mood: {input}", "{input} good or bad?"] }
[data]
license = "CC0"
how = "h"
rows = 20
[[data.sources]]
file = "one"
[[data.sources]]
file = "two"
"""


def test_rows_of_a_recipe_are_prepared(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "mood.toml").write_text(RECIPE)
    splits = ["train"] * 12 + ["dev"] * 4 + ["test"] * 3 + ["test_other"] * 2
    for name in ("one", "two"):
        rows = [
            {"split": split, "input": f"{name} day {i}", "target": ("bad", "good")[i % 2]}
            for i, split in enumerate(splits)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--base", str(tiny_base), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    words += ["--skill", str(tmp_path / "mood.toml"), "--test-rows", "2"]
    found = CliRunner().invoke(preparing.main, words)
    assert found.exit_code == 0, found.output
    skill = read_skill(tmp_path / "out" / "mood.npz")
    assert skill.base_sha256 == hashlib.sha256(tiny_base.read_bytes()).hexdigest()
    assert len(skill.passes) == 2 and [len(rows.ids) for rows in skill.passes] == [20, 20]
    assert skill.labels == ("bad", "good") and skill.label_tokens.tolist() == [3 + ord("b"), 3 + ord("g")]
    assert skill.dev.source_names == ("one", "two") and len(skill.dev.ids) == 8
    assert skill.test is not None and skill.test.source_names == ("one", "one_other", "two", "two_other")
    assert skill.test.sources is not None and np.bincount(skill.test.sources).tolist() == [2, 2, 2, 2]
    for rows in (skill.dev, skill.test):
        assert rows.labels is not None
        firsts = [row[-n] for row, n in zip(rows.ids, rows.answers, strict=True)]
        assert firsts == [skill.label_tokens[label] for label in rows.labels]


def test_the_share_of_made_rows_is_chosen() -> None:
    recipe = load_recipe("broad/spam")
    for made in (0.2, 0.7):
        sources = preparing.shifted(recipe, 500, made).data.sources
        by_rule = sum(source.weight for source in sources if source.made)
        assert by_rule / sum(source.weight for source in sources) == pytest.approx(made)
        assert [one.weight for one in sources if not one.made] == [
            one.weight for one in recipe.data.sources if not one.made
        ]
    assert preparing.shifted(recipe, 500, None).data.rows == 500
    assert preparing.shifted(recipe, None, None) == recipe
    with pytest.raises(JointError, match="leave --made out"):
        preparing.shifted(load_recipe("broad/slots"), None, 0.5)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('name = "a/b"\nskill = "first"\nrate = 1e-3', "name needs 1 to 64"),
        ('name = "a"\nskill = "first"\nrate = 2', "rate needs a number"),
        ('name = "a"\nskill = "first"\nrate = 1e-3\nlr = 1', "unknown key 'lr'"),
        ('name = "a"\nskill = "first"\nrate = 1e-3\nrank = 0', "rank needs a number from 1"),
        ('name = "a"\nskill = "first"\nrate = 1e-3\nmatrices = ["q"]', "matrices needs some of attn_q"),
        ('name = "a"\nskill = "first"\nrate = 1e-3\npasses = [-1]', "passes needs a list"),
        ('name = "a"\nskill = "first"\nrate = 1e-3\npasses = [2]', "has passes 0 to 1"),
        ('name = "a"\nskill = "none"\nrate = 1e-3', "has no prepared rows"),
        ('name = "a"\nskill = "first"\nrate = 1e-3\nstart = "slots.toml"', "is not a GGUF LoRA"),
        ('name = "a"\nskill = "foreign"\nrate = 1e-3', "are for another base"),
    ],
)
def test_wrong_settings_are_named(table: str, message: str, run: Path, bases: dict[str, Path]) -> None:
    write_rows(run / "data" / "foreign.npz", bases["qwen2"])
    write_slots(run / "slots.toml", table)
    said = joint(bases["llama"], run, code=1)
    assert message in said and "Traceback" not in said and len(said.splitlines()) == 1


def test_other_bases_are_refused(tmp_path: Path, bases: dict[str, Path]) -> None:
    with pytest.raises(JointError, match="architecture 'qwen3'; needs one of llama, qwen2"):
        Base(write_base(tmp_path / "other.gguf", architecture="qwen3"), CPU, torch.float32)
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with pytest.raises(JointError, match="cannot be read as a GGUF"):
        Base(tmp_path / "no.gguf", CPU, torch.float32)
    scaled = write_base(tmp_path / "scaled.gguf", extra={"llama.rope.scaling.type": "linear"})
    with pytest.raises(JointError, match="scales RoPE by 'linear'"):
        Base(scaled, CPU, torch.float32)


def test_figures_of_labels() -> None:
    found = label_figures(np.array([0, 1, 1, -2]), np.array([0, 1, 0, 1]))
    assert found["accuracy"] == 0.5 and found["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_a_machine_without_loramix_can_train() -> None:
    allowed = sys.stdlib_module_names | {"torch", "numpy", "gguf", "click"}
    folder = ROOT / "benchmarks" / "joint"
    seen, todo = set(), ["train"]
    while todo:
        name = todo.pop()
        if name in seen or not (folder / f"{name}.py").is_file():
            continue
        seen.add(name)
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom):
                if node.level == 0:
                    assert (node.module or "").split(".")[0] in allowed, (name, node.module)
                todo += [node.module] if node.level and node.module else []
                todo += [alias.name for alias in node.names] if node.level and not node.module else []
    assert {"model", "rows", "slots", "training", "evaluate", "results"} <= seen
    assert not seen & {"prepare", "export"}
