"""Reads the tables in a prompt for SQL from one of the usual forms, and writes them in another."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

Table = tuple[str, tuple[str, ...], tuple[str, ...]]
"""Name, columns, and types (one per column, or none)."""

_TABLE = re.compile(r"(?:CREATE TABLE |Tables?:? )?(\w+) ?\(([^()]*)\)[;,.]?\s*")
_QUESTION = re.compile(r"^(?:Question|Q): ")


def parse(prompt: str) -> tuple[list[Table], str] | None:
    """Split a prompt into its tables and its question.

    Args:
        prompt: tables as ``name(column, …)`` or ``name(column type, …)``, with or without ``Table`` or
            ``CREATE TABLE`` before them, then the question, with or without ``Question:``.

    Returns:
        Tables and question; None if the prompt has another form.
    """
    tables: list[Table] = []
    place = 0
    while found := _TABLE.match(prompt, place):
        words = [column.split() for column in found[2].split(",")]
        if not words or not all(1 <= len(column) <= 2 for column in words):
            return None
        types = tuple(column[1] for column in words if len(column) == 2)
        if types and len(types) != len(words):
            return None
        tables.append((found[1], tuple(column[0] for column in words), types))
        place = found.end()
    question = _QUESTION.sub("", prompt[place:]).strip()
    return (tables, question) if tables and question else None


def _plain(table: Table) -> str:
    return f"{table[0]}({', '.join(table[1])})"


def _typed(table: Table) -> str:
    name, columns, types = table
    pairs = zip(columns, types, strict=True) if types else ((column, "text") for column in columns)
    return f"{name}({', '.join(f'{column} {kind}' for column, kind in pairs)})"


def _listed(columns: Sequence[str]) -> str:
    return columns[0] if len(columns) == 1 else f"{', '.join(columns[:-1])} and {columns[-1]}"


def _create(table: Table) -> str:
    return f"CREATE TABLE {_typed(table)};"


def _sentence(table: Table) -> str:
    return f"table {table[0]} with columns {_listed(table[1])}"


_Form = Callable[[Sequence[Table], str], str]
_FORMS: tuple[_Form, ...] = (
    lambda tables, q: "\n".join(map(_plain, tables)) + f"\n{q}",
    lambda tables, q: "\n".join(map(_plain, tables)) + f"\n\n{q}",
    lambda tables, q: ", ".join(map(_plain, tables)) + f". {q}",
    lambda tables, q: "Table " + ", ".join(map(_plain, tables)) + f". {q}",
    lambda tables, q: "Schema: " + "; ".join(map(_plain, tables)) + f"\nQuestion: {q}",
    lambda tables, q: f"{q}\n" + "\n".join(map(_plain, tables)),
    lambda tables, q: f"{q} Schema: " + ", ".join(map(_plain, tables)),
    lambda tables, q: f"{q} The tables are " + ", ".join(map(_plain, tables)) + ".",
    lambda tables, q: "Given " + " and ".join(map(_plain, tables)) + f", {q[:1].lower() + q[1:]}",
    lambda tables, q: "I have " + " and ".join(map(_plain, tables)) + f". {q}",
    lambda tables, q: "I have a " + " and a ".join(map(_sentence, tables)) + f". {q}",
    lambda tables, q: "There is a " + " and a ".join(map(_sentence, tables)) + f". {q}",
    lambda tables, q: f"{q} I have a " + " and a ".join(map(_sentence, tables)) + ".",
    lambda tables, q: "\n".join(map(_create, tables)) + f"\n{q}",
    lambda tables, q: "\n".join(map(_create, tables)) + f"\n\nQuestion: {q}",
    lambda tables, q: "Table " + "\nTable ".join(map(_typed, tables)) + f"\nQuestion: {q}",
)


def rewritten(prompt: str, rng: random.Random, keep: float = 0.3) -> str:
    """Rewrite the tables and the question in a random form.

    Args:
        prompt: see `parse`; a prompt that cannot be parsed stays unchanged.
        rng: source of the random choice.
        keep: share of the prompts that stay unchanged.
    """
    read = parse(prompt)
    if read is None or rng.random() < keep:
        return prompt
    return rng.choice(_FORMS)(*read)
