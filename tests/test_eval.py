"""Evaluation: answers that survive a kill, test sets, prompts for the base, and the gate's figures by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree as ET

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from tiny import write_peft

from loramix.cli import main
from loramix.errors import InvalidData, InvalidRecipe, NotFound, UsageError
from loramix.eval.answers import AnswerStore, source
from loramix.eval.bare import tidy
from loramix.eval.composed import METHODS, part_score
from loramix.eval.composed_cases import Kind, cases, kinds_of
from loramix.eval.report import METHODS as METHOD_NAMES
from loramix.eval.report import read_report
from loramix.eval.routing import (
    Decisions,
    Question,
    by_group,
    decide_all,
    questions,
    read_held_out,
    summarize,
)
from loramix.eval.skills import end_task, evaluate_skill, parts_of, shots
from loramix.eval.tfidf_baseline import baseline_accuracy
from loramix.pack.edit import add_skill
from loramix.pack.pack import Pack
from loramix.train.data import Row
from loramix.train.gate_data import Prompt
from loramix.train.recipe import Recipe, Source, load_recipe

RECIPE = Recipe(
    name="sentiment",
    description="x",
    metrics=["accuracy"],
    data=Source(license="x", how="x"),
    instructions={"any": ["mood: {input}"], "short": ["short mood: {input}"]},
    labels=["good", "bad"],
    any_text=True,
    max_tokens=4,
)


class Counting:
    """An engine that counts what it is asked."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.asked, self.pack = engine, 0, engine.pack

    def generate(self, *args: Any, **options: Any) -> Any:
        self.asked += 1
        return self.engine.generate(*args, **options)


def test_answers_are_given_once(tiny_engine: Any, tmp_path: Path) -> None:
    engine: Any = Counting(tiny_engine)
    path = tmp_path / "out" / "answers.jsonl"
    prompts = ["one", "two", "one"]
    with AnswerStore(path) as store:
        first = store.answers(engine, prompts, mix="sentiment", max_tokens=4)
        store.answer(engine, "one", mix="base", max_tokens=4)
    assert engine.asked == 3 and first[0] == first[2]
    torn = path.read_bytes()[:-9]  # killed in the middle of the last line
    path.write_bytes(torn)
    with AnswerStore(path) as store:
        assert store.answers(engine, prompts, mix="sentiment", max_tokens=4) == first
        assert engine.asked == 3
        base = store.answer(engine, "one", mix="base", max_tokens=4)
        assert engine.asked == 4 and base.mix == {}
    with AnswerStore(path) as store:
        assert store.answer(engine, "one", mix="base", max_tokens=4) == base and engine.asked == 4
    path.write_bytes(b'{"pack": "p1"}\n')
    with pytest.raises(UsageError, match="of this version"):
        AnswerStore(path)


def test_answers_are_of_what_gave_them(pack: Path) -> None:
    old = Pack.load(pack)
    before = {mix: source(old, mix=mix) for mix in ("base", "sentiment=1", "summarize=0.5", None)}
    other = old.adapter_path("summarize").read_bytes()
    add_skill(pack, "sentiment", other, description="x", max_tokens=12, replace_existing=True)
    changed = Pack.load(pack)
    assert [mix for mix in before if source(changed, mix=mix) != before[mix]] == ["sentiment=1", None]
    assert source(old, policy="blend") == before[None]


def test_test_sets_are_by_split_and_source() -> None:
    rows = [
        Row(split, f"{split} {i}", "good", source)
        for i, (split, source) in enumerate(
            [("train", ""), ("test", "short"), ("test", "long"), ("test", "short"), ("test_other", "")]
        )
    ]
    found = {part.name: [row.input for row in part.rows] for part in parts_of(RECIPE, rows)}
    assert {name: sorted(texts) for name, texts in found.items()} == {
        "short": ["test 1", "test 3"],
        "test_other": ["test_other 4"],
    }
    assert [len(part.rows) for part in parts_of(RECIPE, rows, 1)] == [1, 1]


def test_shots_spread_the_labels() -> None:
    rows = [Row("train", f"t{i}", "good" if i < 30 else "bad") for i in range(40)] + [Row("test", "q", "bad")]
    messages: Any = shots(RECIPE, rows, rows[-1])
    assert [m["role"] for m in messages] == ["user", "assistant"] * 5 + ["user"]
    assert messages[-1]["content"] == "mood: q"
    answers = [m["content"] for m in messages[1::2]]
    assert answers == ["good", "bad", "good", "bad", "good"]
    assert not any("q" in m["content"] for m in messages[:-1])


def test_a_base_that_talks_is_understood() -> None:
    assert tidy("I would say it is Good, really.", RECIPE) == "good"
    assert tidy("good or bad?", RECIPE) == "good or bad?"
    free = msgspec.structs.replace(RECIPE, labels=[])
    assert tidy("\n  SELECT a\nbecause", free) == "SELECT a"
    fenced = "Here is the query:\n\n```sql\nSELECT a\n  FROM t;\n```\nIt reads column a."
    assert tidy(fenced, free) == "SELECT a\n  FROM t;"
    assert tidy("Run this:\n```\ndf -h", free) == "df -h"  # cut at the token limit
    assert tidy("```\n```\nnothing", free) == "```"
    names = msgspec.structs.replace(free, metrics=["entity_f1"])
    assert tidy("- person: Ada\n2. location: Rome\n", names) == "person: Ada; location: Rome"


def test_scores_of_a_skill(tiny_engine: Any, tmp_path: Path) -> None:
    rows = [Row("test", f"day {i}", "good", "", ("good",)) for i in range(6)]
    rows += [Row("train", f"other {i}", "good", "", ("good",)) for i in range(6)]
    engine: Any = tiny_engine
    ticks: list[int] = []
    with AnswerStore(tmp_path / "a.jsonl") as store:
        found = evaluate_skill(engine, store, RECIPE, rows, few=2, tick=lambda: ticks.append(1))["test"]
        pinned = [engine.generate(f"mood: day {i}", mix="sentiment").text for i in range(6)]
        routed = [engine.generate(f"mood: day {i}") for i in range(6)]
    hits = [text.strip().rstrip(".").casefold() == "good" for text in pinned]
    assert found["pinned"]["accuracy"]["value"] == pytest.approx(np.mean(hits))
    assert found["pinned"]["accuracy"]["rows"] == 6 and found["base"]["accuracy"]["rows"] == 2
    right = [a.route.mix == {"sentiment": 1} and not a.route.then for a in routed]
    assert found["routed_right"] == pytest.approx(np.mean(right))
    assert found["routed"]["accuracy"]["value"] == pytest.approx(
        np.mean([a.text.strip().rstrip(".").casefold() == "good" for a in routed])
    )
    assert len(ticks) == 6 + 6 + 2 + 2


def held(path: Path) -> Path:
    path.write_text(
        '[sentiment]\ntemplates = ["how so? {input}"]\nplain = ["hm: {input}"]\n'
        '[none]\ntemplates = ["count {input}"]\nprompts = ["hi", "why?"]\n'
        '[composed]\n"sentiment+summarize" = ["both of {input}?", "{input}: both"]\n'
    )
    return path


def test_questions_for_the_gate(tiny_engine: Any, tmp_path: Path) -> None:
    none = tmp_path / "out_of_scope.jsonl"
    none.write_text('{"split": "train", "text": "a"}\n{"split": "test", "text": "b"}\n')
    recipes = {"sentiment": RECIPE, "summarize": msgspec.structs.replace(RECIPE, name="summarize")}
    rows = {"sentiment": [Row("test", "own", "good")], "summarize": [Row("test", "other", "good")]}
    sets = questions(recipes, rows, read_held_out(held(tmp_path / "h.toml")), [none], per_template=2)
    assert {name: [(q.text, q.wanted) for q in group] for name, group in sets.items()} == {
        "sentiment": [("how so? own", "sentiment")] * 2,
        "sentiment, on other skills' texts": [("how so? other", "sentiment")] * 2,
        "sentiment, no telling words": [("hm: own", "sentiment")] * 2,
        "sentiment, no telling words, on other skills' texts": [("hm: other", "sentiment")] * 2,
        "none: out of scope": [("b", "base")],
        "none: everyday prompts and near misses": [("hi", "base"), ("why?", "base")],
        "none: other requests about texts": sets_of(sets),
    }
    with AnswerStore(tmp_path / "routes.jsonl") as store:
        found = decide_all(tiny_engine, store, sets)
    with AnswerStore(tmp_path / "routes.jsonl") as store:  # a second time the engine is not asked
        asleep: Any = SimpleNamespace(router=tiny_engine.router, pack=tiny_engine.pack)
        again = decide_all(asleep, store, sets)
    assert again.chosen == found.chosen
    route = tiny_engine.route("how so? own")
    assert found.chosen["sentiment"][0] == next(iter(route.mix), "base")
    assert found.probabilities["sentiment"][0] == pytest.approx(list(route.probabilities.values()))


def sets_of(sets: dict[str, list[Question]]) -> list[tuple[str, str]]:
    """What "count" is asked of, which chance decides."""
    texts = [q.text for q in sets["none: other requests about texts"]]
    assert len(texts) == 2 and set(texts) <= {"count own", "count other"}
    return [(text, "base") for text in texts]


def test_figures_of_the_gate_by_hand() -> None:
    group = [Question("a", "x", "a"), Question("b", "base", "b"), Question("c", "x", "c")]
    table = np.asarray([[0.9, 0.1], [0.9, 0.1], [0.31, 0.69]])
    chosen, doubled = ["x", "x", "base"], [True, False, False]
    found = Decisions(["x", "base"], {"s": group}, {"s": chosen}, {"s": doubled}, {"s": table})
    result = summarize(found)
    assert result["sets"]["s"]["value"] == pytest.approx(1 / 3)
    assert result["confusion"] == {"x": {"x": 1, "base": 1}, "base": {"x": 1, "base": 0}}
    # two at 0.9 of which one is right, one at 0.69 that is wrong
    assert result["calibration"]["error"] == pytest.approx((2 * 0.4 + 0.69) / 3)
    assert result["lost"] == 0.5
    assert result["doubled"] == pytest.approx(1 / 3)
    assert [row[1:] for row in result["errors"]] == [["x", "b"], ["base", "c"]]


def test_sets_of_a_kind_together() -> None:
    sets = {
        "a": {"value": 0.5, "rows": 4},
        "b": {"value": 1.0, "rows": 4},
        "a, on other skills' texts": {"value": 0.25, "rows": 4},
        "a, no telling words": {"value": 0.0, "rows": 2},
        "none: x": {"value": 1.0, "rows": 1},
    }
    found = {name: (group["value"], group["rows"]) for name, group in by_group(sets).items()}
    assert found == {
        "own texts": (0.75, 8),
        "other skills' texts": (0.25, 4),
        "own texts, no telling words": (0.0, 2),
        "no skill fits": (1.0, 1),
    }


def test_what_routing_costs() -> None:
    part = {
        kind: {"accuracy": {"value": value}, "f1": {"value": 9}}
        for kind, value in (("pinned", 0.8), ("routed", 0.6))
    }
    other = {
        kind: {"chrf": {"value": 50.0}} for kind in ("pinned", "routed", "pinned_unseen", "routed_unseen")
    }
    assert end_task({"a": {"test": part}, "b": {"test": other}}) == {
        "fixed": pytest.approx(0.875),
        "unseen": 1.0,
    }


def test_the_baseline_reads_words() -> None:
    prompts = [Prompt(f"mood of {i}", {"sentiment": 1.0}, "a") for i in range(20)]
    prompts += [Prompt(f"count {i}", {"base": 1.0}, "b") for i in range(20)]
    prompts += [Prompt("mood and count", {"sentiment": 0.5, "summarize": 0.5}, "c")]
    sets = {"a": [Question("the mood of this?", "sentiment", ""), Question("mood: x", "base", "")]}
    assert baseline_accuracy(prompts, sets)["a"]["value"] == 0.5, (
        "the second asks for a mood, whatever is wanted"
    )


def test_held_out_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_held_out(tmp_path / "none.toml")
    for content in ("[", "[sentiment]\ntemplates = 3", "sentiment = 3"):
        (tmp_path / "h.toml").write_text(content)
        with pytest.raises(InvalidRecipe):
            read_held_out(tmp_path / "h.toml")


def test_the_shipped_held_out_file_fits_the_recipes() -> None:
    found = read_held_out(Path(__file__).parent.parent / "benchmarks" / "heldout.toml")
    for name, groups in found.items():
        if name not in {"none", "composed"}:
            assert load_recipe(name).name == name
            assert len(groups["templates"]) >= 30 and len(groups["plain"]) >= 8
            assert all(text.count("{input}") == 1 for group in groups.values() for text in group)


def skill(name: str, **options: Any) -> Recipe:
    return msgspec.structs.replace(RECIPE, name=name, **options)


def test_parts_of_a_composed_answer_by_hand() -> None:
    mood = skill("sentiment", labels=["positive", "negative"])
    names = skill("entities", metrics=["entity_f1"], labels=[])
    gist = skill("summarize", metrics=["rouge_l"], labels=[])
    french = skill("translate_fr", metrics=["chrf"], labels=[])
    answer = "A boat.\nperson: Lena; location: Rome\nIt is positive."
    assert part_score(mood, answer, Row("test", "x", "positive")) == 1
    assert part_score(mood, answer + " Or negative?", Row("test", "x", "positive")) == 0, "it must decide"
    two_of_three = Row("test", "x", "person: Lena; location: Oslo; location: Rome")
    assert part_score(names, answer, two_of_three) == pytest.approx(2 * 2 / (2 + 3))
    assert part_score(gist, answer, Row("test", "x", "a boat", "", ("a boat",))) == 1
    assert part_score(french, "un bateau\npositive", Row("test", "x", "un bateau", "", ("un bateau",))) == 1


def test_composed_prompts_have_real_golds() -> None:
    recipes = {
        "emotion": skill("emotion", labels=["joy", "anger", "surprise"]),
        "sentiment": skill("sentiment", labels=["positive", "negative"]),
        "entities": skill("entities", metrics=["entity_f1"], labels=[]),
        "summarize": skill("summarize", metrics=["rouge_l"], labels=[]),
        "translate_fr": skill("translate_fr", metrics=["chrf"], labels=[]),
    }
    rows = {
        "emotion": [Row("test", "yay", "joy"), Row("test", "oh", "surprise"), Row("dev", "grr", "anger")],
        "sentiment": [Row("test", f"nice {i}", "positive") for i in range(9)],
        "entities": [Row("test", "hi all", "none"), Row("test", "hi Lena", "person: Lena")],
        "summarize": [
            Row("test", "long", "A tool"),
            Row("train", "dull", "A toy"),
            Row("dev", "old", "A toy"),
        ],
        "translate_fr": [Row("train", "a  tool!", "un outil"), Row("test", "A toy", "un jouet")],
    }

    def made(first: str, second: str, split: str = "test") -> list[tuple[str, dict[str, str | None]]]:
        ((kind, templates),) = kinds_of({f"{first}+{second}": ["do {input}"]}, list(recipes)).items()
        found = cases(kind, templates, recipes, rows, split, 9)
        assert all(case.prompt == f"do {case.text}" for case in found)
        return sorted((c.text, {s: row and row.target for s, row in c.wanted.items()}) for c in found)

    assert made("sentiment", "emotion") == [("yay", {"emotion": "joy", "sentiment": "positive"})]
    assert made("sentiment", "emotion", "dev") == [("grr", {"emotion": "anger", "sentiment": "negative"})]
    assert made("summarize", "entities") == [("hi Lena", {"entities": "person: Lena", "summarize": None})]
    reviews = made("summarize", "sentiment")
    assert [text for text, _ in reviews] == ["nice 0 nice 1 nice 2 nice 3", "nice 4 nice 5 nice 6 nice 7"]
    assert reviews[0][1] == {"sentiment": "positive", "summarize": None}
    # one half may have been trained on, but not as part of dev
    chained = [("dull", {"translate_fr": "un jouet"}), ("long", {"translate_fr": "un outil"})]
    assert made("translate_fr", "summarize") == chained
    assert kinds_of({"translate_fr+summarize": ["x"]}, list(recipes)) == {
        Kind("summarize", "translate_fr", chain=True): ["x"]
    }
    assert not kinds_of({"translate_fr+summarize": ["x"]}, ["summarize"])
    assert set(METHOD_NAMES) == {*METHODS, "gate_each"}


DATA = """
name = "{name}"
description = "what {name} is"
metrics = ["accuracy"]
any_text = true
labels = ["good", "bad"]
max_tokens = 4
[data]
license = "none"
how = "By hand."
[instructions]
any = ["{name} of {{input}}?"]
"""


@pytest.fixture
def eval_command(tiny_pack: Path, tmp_path: Path) -> list[str]:
    """`loramix eval` on the tiny pack, with data of both its skills."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("sentiment", "summarize"):
        (data / f"{name}.toml").write_text(DATA.format(name=name))
        rows = [
            {"split": split, "input": f"<b>{split} & {i}", "target": target}
            for split in ("train", "dev", "test")
            for i, target in enumerate(["good", "bad"] * 4)
        ]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--data-dir", str(data), "--held-out", str(held(tmp_path / "h.toml"))]
    return [
        "eval",
        str(tiny_pack),
        *files,
        "--few",
        "2",
        "--threads",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]


def test_a_pack_is_evaluated_and_the_page_says_so(eval_command: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(main, eval_command)
    assert done.exit_code == 0, done.output
    assert "sentiment: 24 of 24" in done.stderr and "gate: 17 of 17" in done.stderr
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    part = found["skills"]["summarize"]["test"]
    assert part["pinned"]["accuracy"]["rows"] == 8 and part["base"]["accuracy"]["rows"] == 2
    assert found["routing"]["sets"]["sentiment"]["rows"] == 3
    assert "routed_unseen" not in part, "the file has no phrasings for it"
    assert found["skills"]["sentiment"]["test"]["routed_unseen"]["accuracy"]["rows"] == 2
    assert found["routing"]["rival"].keys() == found["routing"]["sets"].keys()
    assert sum(sum(row.values()) for row in found["routing"]["confusion"].values()) == 17
    assert found["pack"]["skill_bytes"].keys() == {"sentiment", "summarize"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 5
    tables = (tmp_path / "out" / "report.md").read_text()
    widths = {line.count(" | ") for line in tables.split("## Gate")[0].splitlines() if line.startswith("| s")}
    assert widths == {10}, "each line of a table has its head's columns"
    assert found["routing"]["groups"]["own texts"]["rows"] == 3
    together = found["composed"]["kinds"]["sentiment + summarize"]
    assert together["top1"]["rows"] == 2, "four sentences make a review, and there are four of each label"
    assert together["oracle_mix"].keys() == {"sentiment", "summarize"} and len(together["surface"]) == 5
    assert "<b>" not in page, "texts of the data are escaped"
    assert "http-equiv" not in page and "<script" not in page
    for figure in ET.fromstring(f"<r>{''.join(re.findall('<svg.*?</svg>', page, re.DOTALL))}</r>"):
        assert len(list(figure.iter())) > 20
    answers = (tmp_path / "out" / "answers.jsonl").read_bytes()
    again = CliRunner().invoke(main, eval_command)
    assert again.exit_code == 0 and (tmp_path / "out" / "answers.jsonl").read_bytes() == answers
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == found


def test_parts_of_an_evaluation(eval_command: list[str], tmp_path: Path) -> None:
    one = CliRunner().invoke(main, [*eval_command, "--only", "skills", "--skill", "sentiment", "--rows", "2"])
    assert one.exit_code == 0, one.output
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(found["skills"]) == ["sentiment"] and "routing" not in found and found["limits"]["rows"] == 2
    gate = CliRunner().invoke(main, [*eval_command, "--only", "routing"])
    assert gate.exit_code == 0, gate.output
    assert "skills" not in json.loads((tmp_path / "out" / "report.json").read_text())


@pytest.mark.parametrize(
    "more, sentence, code",
    [
        (["--skill", "haiku"], "haiku", 2),
        (["--data-dir", "nowhere"], "nowhere", 1),
        (["--held-out", "nowhere.toml"], "nowhere.toml", 1),
        (["--none", "nowhere.jsonl"], "nowhere.jsonl", 1),
    ],
)
def test_evaluations_that_cannot_be(
    eval_command: list[str], more: list[str], sentence: str, code: int
) -> None:
    done = CliRunner().invoke(main, [*eval_command, *more])
    assert done.exit_code == code and sentence in done.stderr and done.stderr.startswith("error: "), (
        done.output
    )


def test_the_gate_needs_held_out_phrasings(eval_command: list[str]) -> None:
    place = eval_command.index("--held-out")
    done = CliRunner().invoke(main, eval_command[:place] + eval_command[place + 2 :])
    assert done.exit_code == 2 and "--held-out" in done.stderr, done.output


def test_reports_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_report(tmp_path / "report.json")
    for content in ("{", "[]", '{"format": 2}'):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(InvalidData):
            read_report(tmp_path / "report.json")


@pytest.mark.train
def test_an_adapter_says_the_same_before_conversion(eval_command: list[str], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    runs = tmp_path / "runs"
    for seed, name in enumerate(("sentiment", "summarize"), 1):  # the seeds of the tiny pack
        write_peft(runs / name / "adapter", seed=seed)
    done = CliRunner().invoke(main, [*eval_command, "--only", "skills", "--peft", str(runs)])
    assert done.exit_code == 0, done.output
    part = json.loads((tmp_path / "out" / "report.json").read_text())["skills"]["summarize"]["test"]
    assert part["torch"]["accuracy"]["rows"] == part["converted"]["accuracy"]["rows"] == 2
    assert part["torch_same"] == 1
    assert "Before and after conversion" in (tmp_path / "out" / "report.html").read_text()
    (runs / "sentiment" / "adapter" / "adapter_model.safetensors").unlink()
    failed = CliRunner().invoke(main, [*eval_command, "--only", "skills", "--peft", str(runs)])
    assert failed.exit_code == 1 and "adapter_model.safetensors" in failed.stderr
