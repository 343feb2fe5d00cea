"""Generates questions about small everyday tables with their SQL."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from loramix.formats.textfile import read_text
from loramix.train.data import Row

MADE = Path(__file__).parent / "made"
ROUNDS = 4
"""Number of questions of each kind per table, with different values."""


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of ``made/tables.toml``."""

    one: str
    many: str
    columns: dict[str, list[Any]]
    person: bool = False


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Two tables, one with a reference to the other."""

    many: str
    one: str
    key: str
    columns: dict[str, list[str]]
    labels: dict[str, str]
    number: str
    text: list[str]


class Tables(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``made/tables.toml``."""

    tables: dict[str, Table]
    links: list[Link]


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Wordings of a question, and its query."""

    asks: list[str]
    query: str
    sums: bool = False
    """Whether the query adds up a number, which makes no sense for years."""


class Questions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``made/questions.toml``."""

    questions: list[Question]
    joins: list[Question]


def sql_rows() -> list[Row]:
    """Generate all questions with their queries, deterministically."""
    made = msgspec.toml.decode(read_text(MADE / "tables.toml"), type=Tables)
    asked = msgspec.toml.decode(read_text(MADE / "questions.toml"), type=Questions)
    found: dict[str, Row] = {}
    rng = random.Random("sql")
    for name, table in made.tables.items():
        for _ in range(ROUNDS):
            for question in asked.questions:
                words, sums = _words(name, table, rng)
                if sums or not question.sums:
                    _add(found, [f"{name}({', '.join(table.columns)})"], question, words, rng)
    for link in made.links:
        schema = [f"{name}({', '.join(columns)})" for name, columns in link.columns.items()]
        for _ in range(ROUNDS):
            for question in asked.joins:
                rng.shuffle(schema)
                _add(found, schema, question, _link_words(link, rng), rng)
    return list(found.values())


def _add(
    found: dict[str, Row],
    schema: Sequence[str],
    question: Question,
    words: Mapping[str, str],
    rng: random.Random,
) -> None:
    ask, query = rng.choice(question.asks).format_map(words), question.query.format_map(words)
    if rng.random() < 0.5:
        ask = ask[0].upper() + ask[1:]
    text = "\n".join([*schema, ask])
    found.setdefault(text, Row("train", text, query, references=(query,)))


def _words(name: str, table: Table, rng: random.Random) -> tuple[dict[str, str], bool]:
    """Return the values of a question's placeholders, and whether its number can be added up."""
    label = next(column for column, about in table.columns.items() if about == ["text"])
    text = rng.choice(
        [c for c, about in table.columns.items() if about and isinstance(about[0], str) and c != label]
    )
    number = rng.choice([c for c, about in table.columns.items() if about and not isinstance(about[0], str)])
    value, other = rng.sample(table.columns[text], 2)
    lowest, highest, *words = table.columns[number]
    up, col, k = rng.random() < 0.5, number.replace("_", " "), rng.choice([2, 3, 5, 10])
    low, high = sorted(_amounts(lowest, highest, rng))
    first = rng.choice(["highest", "largest"] if up else ["lowest", "smallest"])
    if words:
        beyond, most = words[0 if up else 1], words[2 if up else 3]
        are_beyond, extreme, several = (
            f"are {beyond}",
            f"the {most} {table.one}",
            f"the {k} {most} {table.many}",
        )
    else:
        beyond = f"with {col} {'above' if up else 'below'}"
        are_beyond = f"have a {col} {'above' if up else 'below'}"
        extreme, several = (
            f"the {table.one} with the {first} {col}",
            f"the {k} {table.many} with the {first} {col}",
        )
    return {
        "table": name, "one": table.one, "many": table.many, "label": label, "key": label.replace("_", " "),
        "text": text, "cat": text.replace("_", " "), "value": value, "other": other, "number": number, "col": col,
        "kinds": f"{table.many} with {text.replace('_', ' ')} {value}", "n": str(low), "low": str(low),
        "high": str(high), "k": str(k), "sign": ">" if up else "<", "beyond": f"{beyond} {low}",
        "are_beyond": f"{are_beyond} {low}", "extreme": extreme, "several": several, "first": first,
        "order": " DESC" if up else "", "direction": "descending" if up else "ascending",
        "function": "MAX" if up else "MIN", "limit": "maximum" if up else "minimum",
        "letter": rng.choice("ABCDEGLMPRST"), "who": "who" if table.person else "what",
    }, not 1900 <= highest <= 2100  # fmt: skip


def _amounts(lowest: int, highest: int, rng: random.Random) -> list[int]:
    """Return two different numbers of a column, rounded if its range is large."""
    step = 10 ** max(0, len(str(highest - lowest)) - 2)
    choices = range(lowest // step + 1, max(highest // step, lowest // step + 2) + 1)
    return [step * number for number in rng.sample(choices, 2)]


def _link_words(link: Link, rng: random.Random) -> dict[str, str]:
    """Return the values of the placeholders of a question about two tables."""
    return {
        "a": link.many, "b": link.one, "link": link.key, "one": link.one.removesuffix("s"), "number": link.number,
        "mine": link.labels[link.many], "theirs": link.labels[link.one], "text": link.text[0],
        "value": rng.choice(link.text[1:]), "k": str(rng.choice([2, 3, 5])),
    }  # fmt: skip


def runs(schema: str, query: str) -> bool:
    """Whether a query runs on empty tables of a schema.

    Args:
        schema: ``table(column, …)``, one per line.
        query: one statement.
    """
    connection = sqlite3.connect(":memory:")
    try:
        for line in schema.splitlines():
            connection.execute(f"CREATE TABLE {line}")
        connection.execute(query)
    except sqlite3.Error:
        return False
    finally:
        connection.close()
    return True
