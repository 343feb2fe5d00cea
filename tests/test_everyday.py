"""Everyday requests: what is in the files, how answers are scored, and a pack that is asked them."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from loramix.cli import main
from loramix.errors import InvalidData
from loramix.eval.everyday import run
from loramix.eval.everyday.checks import command_line, is_label, is_title, run_query, score
from loramix.eval.everyday.requests import CHECKS, DATA, SPLITS, Request, databases, read_requests
from loramix.train.made_rows import KINDS, made_rows
from loramix.train.metrics import is_sentence
from loramix.train.recipe import RECIPES, Recipe, load_recipe, shipped

ALL = [request for split in SPLITS for request in read_requests(DATA / f"{split}.jsonl")]


def recipe(name: str) -> Recipe:
    return load_recipe(str(RECIPES / "broad" / f"{name}.toml"))


def judged(skill: str, answer: str, **check: object) -> float:
    return score(Request(skill=skill, prompt="?", **check), answer, recipe(skill))  # type: ignore[arg-type]


def test_both_files_ask_every_skill_and_share_nothing() -> None:
    for split in SPLITS:
        counts = Counter(request.skill for request in read_requests(DATA / f"{split}.jsonl"))
        assert set(counts) == set(shipped()) and min(counts.values()) >= 8 and counts.total() >= 110
    assert len({request.prompt for request in ALL}) == len(ALL)
    assert {request.check for request in ALL} == set(CHECKS)


def right_answer(request: Request) -> str:
    found = getattr(request, request.check)
    if request.check == "entities":
        return "; ".join(found) or "none"
    if request.check == "slots":
        return json.dumps(found)
    if request.check == "references":
        return str(found[-1])
    return str(found)


@pytest.mark.parametrize("check", ["label", "entities", "query", "slots", "references"])
def test_right_answers_score_one_and_others_less(check: str) -> None:
    asked = [request for request in ALL if request.check == check]
    for request in asked:
        own = recipe(request.skill)
        assert score(request, right_answer(request), own) == pytest.approx(1.0), request.prompt
        assert score(request, "", own) <= (1.0 if request.entities == () else 0.0), request.prompt
    others = [score(a, right_answer(b), recipe(a.skill)) for a, b in itertools.pairwise(asked)]
    assert sum(others) < 0.6 * len(others)


def test_no_training_row_of_ours_is_an_everyday_request() -> None:
    def plain(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.casefold()))

    made = {plain(row.input) for name in KINDS for row in made_rows(name)}
    made = {text for text in made if len(text.split()) >= 6}
    assert len(made) > 3000
    asked = [plain(request.prompt) for request in ALL]
    assert not [prompt for prompt in asked if prompt in made or any(text in prompt for text in made)]
    assert not [
        r
        for r in ALL
        if r.references and plain(r.references[0]) in {plain(x.target) for x in made_rows("translate_fr")}
    ]


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("spam", 1),
        ("Spam.", 1),
        ("Yes, it is a scam.", 1),
        ("This message is spam.", 1),
        ("Yes", 1),
        ("ham", 0),
        ("It is not spam.", 0),
        ("no", 0),
        ("Yesterday it came", 0),
        ("", 0),
    ],
)
def test_a_label_may_stand_in_a_sentence(answer: str, value: int) -> None:
    assert judged("spam", answer, label="spam", also=("yes",)) == value
    assert is_label(answer, recipe("spam")) == (answer in ("spam", "Spam.", "ham"))


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("person: Ada Lind; location: Oslo", 1),
        ("- Person: Ada Lind\n- Place: Oslo", 1),
        ("organization: Oslo; person: Ada Lind", 0.75),
        ("The people are Ada Lind and the city of Oslo.", 0.5),
        ("person: Ada", 0),
        ("none", 0),
    ],
)
def test_names_count_half_and_types_half(answer: str, value: float) -> None:
    assert judged("entities", answer, entities=("person: Ada Lind", "location: Oslo")) == value


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("SELECT name FROM owners WHERE town = 'Delft'", 1),
        ("```sql\nselect name from owners where town='Delft';\n```", 1),
        ("SELECT town, name FROM owners WHERE town = 'Delft'", 0),
        ("SELECT name FROM owners", 0),
        ("Use SELECT.", 0),
    ],
)
def test_a_query_is_judged_by_its_rows(answer: str, value: int) -> None:
    query = "SELECT name FROM owners WHERE town = 'Delft' ORDER BY id DESC"
    assert judged("sql", answer, database="pets", query=query) == value


def test_order_counts_where_it_is_asked_for() -> None:
    query = "SELECT name FROM plants ORDER BY height_cm DESC"
    for ordered, value in ((True, 0.0), (False, 1.0)):
        assert (
            judged("sql", "SELECT name FROM plants", database="plants", query=query, ordered=ordered) == value
        )


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM owners",
        "ATTACH '{path}' AS x",
        "DROP TABLE owners",
        "PRAGMA writable_schema = 1",
        "INSERT INTO owners VALUES (9, 'a', 'b')",
        "SELECT load_extension('x')",
        "VACUUM INTO '{path}'",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n",
    ],
)
def test_a_query_can_only_read_and_ends(query: str, tmp_path: Path) -> None:
    path = tmp_path / "written.db"
    assert run_query(databases()["pets"], query.format(path=path)) is None
    assert not path.exists()


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ("```bash\n# list\n$ ls -a\n```", "ls -a"),
        ("`df -h`", "df -h"),
        ("You can use this:\n\n```\npwd\n```", "pwd"),
        ("Use:\nuptime", "uptime"),
    ],
)
def test_the_command_of_an_answer(answer: str, line: str) -> None:
    assert command_line(answer) == line


@pytest.mark.parametrize(
    ("text", "sentence", "title"),
    [
        ("The pool stays closed until March, says Dr. Lind.", True, False),
        ("Pool closed until March", False, True),
        ("The pool is closed. It opens in March.", False, False),
        ("It is shut.", False, False),
        ("The pool stays closed until March", False, True),
        ("One line with words here\nand another one.", False, False),
    ],
)
def test_sentences_and_titles(text: str, sentence: bool, title: bool) -> None:
    assert is_sentence(text) == sentence and is_title(text) == title
    said = (
        judged("summarize", text, sentence=("pool|line|shut",)),
        judged("summarize", text, title=("pool|line|shut",)),
    )
    assert said == (1.0 if sentence else 0.4, 1.0 if title else 0.4)


def test_texts_must_mention_what_matters() -> None:
    wanted = ("Casa Pilar", "Spanish", "low|poor")
    assert judged("facts", "Casa Pilar is a Spanish place.", mentions=wanted) == pytest.approx(2 / 3)
    assert judged("docstring", '"""Count the vowels."""', mentions=("count", "vowel"), short=True) == 1
    assert judged("docstring", "Count\nvowels", mentions=("count", "vowel"), short=True) == 0.5


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"skill": "sql"}', "prompt"),
        ('{"skill": "spam", "prompt": "p"}', "exactly one"),
        ('{"skill": "spam", "prompt": "p", "label": "ham", "title": ["x"]}', "exactly one"),
        ('{"skill": "spam", "prompt": "p", "label": 3}', "label"),
        ("no", "line 1"),
    ],
)
def test_lines_that_are_no_requests(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "dev.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InvalidData, match=problem):
        read_requests(path)


def test_a_pack_and_its_base_are_asked(
    tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    asked = [
        {"skill": "sentiment", "prompt": "good?", "label": "positive"},
        {"skill": "summarize", "prompt": "title?", "title": ["."]},
        {"skill": "shell", "prompt": "files?", "command": "ls"},
    ]
    (data / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    monkeypatch.setattr(run, "DATA", data)
    words = ["eval", str(tiny_pack), "--everyday", "--split", "dev", "--threads", "1", "--out", str(tmp_path)]
    said = CliRunner().invoke(main, words)
    assert said.exit_code == 0, said.output
    assert "dev, pinned: " in said.output and "dev, routed: " in said.output and "sentiment" in said.output
    found = json.loads((tmp_path / "everyday.json").read_text())["splits"]["dev"]
    assert set(found) == {"pinned", "routed"}
    assert {row["skill"] for row in found["pinned"]["answers"]} == {"sentiment", "summarize"}
    assert found["pinned"]["skills"]["sentiment"]["is_label"] == 0.0
    skills = found["pinned"]["skills"]
    mean = sum(figure["value"] for figure in skills.values()) / len(skills)
    assert found["pinned"]["mean"]["value"] == pytest.approx(mean)
    assert CliRunner().invoke(main, [*words, "--bare", "--skill", "shell"]).exit_code == 0
    found = json.loads((tmp_path / "everyday.json").read_text())["splits"]["dev"]
    assert [row["skill"] for row in found["base"]["answers"]] == ["shell"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "--everyday"),
        (["--bare"], "add --everyday"),
        (["--split", "dev"], "add --everyday"),
        (["--everyday", "--only", "routing"], "--only"),
        (["--everyday", "--rows", "3"], "--everyday excludes"),
    ],
)
def test_options_that_belong_together(tiny_pack: Path, words: list[str], problem: str) -> None:
    said = CliRunner().invoke(main, ["eval", str(tiny_pack), *words])
    assert said.exit_code == 2 and problem in said.output
