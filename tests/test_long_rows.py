"""Rows that are longer than ``max_length``: an answer is never learned or measured in part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hf_tiny import write_checkpoint, write_sentencepiece, write_settings
from tiny import write_moods

pytest.importorskip("torch")
import test_train

from loramix.errors import InvalidData
from loramix.train.data import read_rows, take
from loramix.train.examples import common_prefix, header_of, prepare
from loramix.train.lora import train_skill
from loramix.train.recipe import Recipe, load_recipe

pytestmark = pytest.mark.train
recipe, data = test_train.recipe, test_train.data


def long_rows(path: Path, answers: dict[int, int], split: str = "train") -> Path:
    """Moods, some with answers of so many characters (a token each), by the number of their row in the split."""
    rows = [json.loads(line) for line in write_moods(path).read_text().splitlines()]
    of_split = [row for row in rows if row["split"] == split]
    for number, length in answers.items():
        of_split[number]["target"] = "x" * length
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shorter(recipe: Path, max_length: int) -> Recipe:
    text = recipe.read_text().replace("[training]", f"[training]\nmax_length = {max_length}")
    recipe.write_text(text)
    return load_recipe(str(recipe))


@pytest.mark.parametrize("length", [190, 199, 201, 240, 900])
@pytest.mark.parametrize("split", ["train", "dev"])
def test_an_answer_that_does_not_fit_is_left_out_and_named(
    length: int, split: str, recipe: Path, tiny_base: Path, tmp_path: Path
) -> None:
    rows = read_rows(long_rows(tmp_path / "long.jsonl", {3: length}, split))
    train_rows, dev_rows = take(rows, "train"), take(rows, "dev")
    long = next(row for row in rows if len(row.target) == length)
    said: list[str] = []
    *passes, dev = prepare(shorter(recipe, 200), train_rows, dev_rows, tiny_base, said.append)
    assert [len(part) for part in passes] == [len(train_rows) - (split == "train")] * 2
    assert len(dev) == len(dev_rows) - (split == "dev")
    assert all(
        len(example.ids) <= 200 and example.n_answer < 10 for part in [*passes, dev] for example in part
    )
    assert said[0].startswith(f"line {long.line} is dropped: its answer of {length + 1} tokens")
    assert said[-1] == "1 rows are dropped, too long for max_length = 200; raise it to keep them"


def test_a_long_input_is_cut_inside_of_itself(recipe: Path, tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    rows = [json.loads(line) for line in write_moods(path).read_text().splitlines()]
    row = next(row for row in rows if row["split"] == "train")
    row["input"] = "<" + "y" * 400 + ">"
    row["target"] = "z" * 60
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_rows(path)
    said: list[str] = []
    *passes, _ = prepare(shorter(recipe, 120), take(read, "train"), take(read, "dev"), tiny_base, said.append)
    found = [e for part in passes for e in part if e.n_answer == 61]
    assert len(found) == 2 and not said
    for example in found:
        assert len(example.ids) == 120
        whole = next(e for e in passes[0] if e.n_answer < 10)
        prompt = example.ids[:-61].tolist()
        before = common_prefix([example, whole])
        assert prompt[:before] == whole.ids[:before].tolist() and before > 0, "the template's beginning stays"
        header = header_of(tiny_base)
        assert prompt[-len(header) :] == header, "and its end"


def test_too_many_long_rows_are_refused_by_their_lines(recipe: Path, tiny_base: Path, tmp_path: Path) -> None:
    path = long_rows(tmp_path / "long.jsonl", dict.fromkeys(range(12), 300))
    rows = read_rows(path)
    with pytest.raises(
        InvalidData, match=r"24 of \d+ rows are longer than max_length = 200 tokens \(lines \d+, "
    ):
        prepare(shorter(recipe, 200), take(rows, "train"), take(rows, "dev"), tiny_base, print)


def test_one_long_answer_does_not_stop_a_training(recipe: Path, tiny_base: Path, tmp_path: Path) -> None:
    rows = read_rows(long_rows(tmp_path / "long.jsonl", {0: 240}))
    said: list[str] = []
    result = train_skill(
        shorter(recipe, 200), rows, tiny_base, tmp_path / "run", max_steps=1, say=said.append
    )
    assert result.directory.is_dir() and len(said) == 2


def test_a_directory_with_a_sentencepiece_model_alone_is_trained_on(
    recipe: Path, data: Path, tmp_path: Path
) -> None:
    base = write_checkpoint(tmp_path / "hf", vocab_size=500)
    write_sentencepiece(base)
    template = "{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}"
    write_settings(base, bos_token="<s>", eos_token="</s>", chat_template=template)
    assert test_train.train(recipe, data, base, tmp_path / "run", max_steps=1).directory.is_dir()
