"""Scores of answers to everyday requests, from 0 to 1."""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from loramix.eval.bare import code, one_line, tidy
from loramix.eval.everyday.requests import Request, databases
from loramix.train.metrics import chrf, is_sentence, normal, overlap, parse_entities, parse_frame
from loramix.train.recipe import Recipe

_NOT_SPAM = re.compile(
    r"\b(?:not|isn't|no)\s+(?:an?\s+|likely\s+)?(?:spam|scam|phishing|junk)\b", re.IGNORECASE
)
_NAME = re.compile(r"\b[A-ZÀ-Þ][\w'’-]*(?: [A-ZÀ-Þ][\w'’-]*)*")
_NO_NAMES = {
    "person", "people", "persons", "location", "locations", "place", "places", "organization", "organizations",
    "organisation", "organisations", "company", "companies", "names", "name", "none", "the", "here", "sure", "no",
    "yes", "there", "product", "type",
}  # fmt: skip
STEPS = 2_000_000  # limit of SQLite virtual machine steps, against endless queries


def score(request: Request, answer: str, recipe: Recipe) -> float:
    """Score an answer.

    Args:
        request: request with its check.
        answer: answer of a skill or of a bare base; a base's text around the answer is not penalized.
        recipe: recipe of the skill, for its labels.

    Returns:
        Score from 0 (wrong) to 1 (right).
    """
    return _CHECKS[request.check](request, answer.strip(), recipe)


def is_label(answer: str, recipe: Recipe) -> bool:
    """Return whether an answer is exactly one of the recipe's labels."""
    return normal(answer) in map(normal, recipe.labels)


def _label(request: Request, answer: str, recipe: Recipe) -> float:
    right = {normal(text) for text in (request.label or "", *request.accept)}
    if "ham" in right or "spam" in right:
        answer = _NOT_SPAM.sub("ham", answer)
    found = normal(tidy(answer, recipe))
    if found in right:
        return 1.0
    if found in map(normal, recipe.labels):
        return 0.0
    said = re.match(r"[\w' ]+", found)
    first = said[0].strip() if said else ""
    return float(any(re.match(rf"{re.escape(normal(text))}\b", first) for text in request.also))


def _named(answer: str) -> Counter[str]:
    """Extract names from running text: capitalized words."""
    found = (match[0].casefold() for match in _NAME.finditer(answer))
    return Counter(name for name in found if name not in _NO_NAMES)


def _f1(found: Counter[Any], wanted: Counter[Any]) -> float:
    if not found and not wanted:
        return 1.0
    right, n_found, n_wanted = overlap(found, wanted)
    return 2 * right / (n_found + n_wanted)


def _entities(request: Request, answer: str, recipe: Recipe) -> float:
    """Return the mean of two F1 scores: names alone, and names with their types."""
    wanted = parse_entities("; ".join(request.entities or ()))
    kinds = {"place": "location", "company": "organization", "organisation": "organization"}
    typed = parse_entities(one_line(answer))
    found = Counter({(kinds.get(kind, kind), name): n for (kind, name), n in typed.items()})
    names = Counter(name for _, name in found.elements()) if found else _named(answer)
    return (_f1(found, wanted) + _f1(names, Counter(name for _, name in wanted.elements()))) / 2


def run_query(script: str, query: str) -> list[tuple[Any, ...]] | None:
    """Run a query on a new read-only database; return its rows, or None if it fails.

    Args:
        script: SQL script that creates the tables.
        query: one SELECT statement.
    """
    reads = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
    connection = sqlite3.connect(":memory:")
    try:
        connection.executescript(script)
        connection.set_authorizer(
            lambda action, *_: sqlite3.SQLITE_OK if action in reads else sqlite3.SQLITE_DENY
        )
        steps = iter(range(STEPS // 1000))
        connection.set_progress_handler(lambda: next(steps, None) is None, 1000)
        return connection.execute(query).fetchall()
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        return None
    finally:
        connection.close()


def _rows(rows: Sequence[tuple[Any, ...]], ordered: bool) -> list[Any]:
    """Normalize rows for comparison: ignore the order of columns, and that of rows unless the request needs it."""
    plain = [tuple(sorted(str(round(v, 6) if isinstance(v, float) else v) for v in row)) for row in rows]
    return plain if ordered else sorted(plain)


def _query(request: Request, answer: str, recipe: Recipe) -> float:
    script = databases()[request.database]
    wanted = run_query(script, request.query or "")
    found = run_query(script, code(answer).split(";")[0])
    if wanted is None or found is None:
        return 0.0
    return float(_rows(found, request.ordered) == _rows(wanted, request.ordered))


def command_line(answer: str) -> str:
    """Extract the first line that can be a command, without prompt sign and backticks."""
    for line in code(answer).splitlines():
        line = line.strip().removeprefix("$ ").strip("`").strip()
        if line and not line.startswith("#") and not line.endswith(":"):
            return line
    return ""


def _command(request: Request, answer: str, recipe: Recipe) -> float:
    return float(re.search(request.command or "", command_line(answer)) is not None)


def _slots(request: Request, answer: str, recipe: Recipe) -> float:
    frame = parse_frame(code(answer)) or {}

    def pairs(slots: dict[str, Any]) -> Counter[tuple[str, str]]:
        values = {key: str(value).casefold() for key, value in slots.items()}
        for beginning in request.loose:
            values = {key: value.removeprefix(beginning) for key, value in values.items()}
        return Counter(values.items())

    return _f1(pairs(frame), pairs(request.slots or {}))


def _share(patterns: Sequence[str], text: str) -> float:
    return sum(bool(re.search(pattern, text, re.IGNORECASE)) for pattern in patterns) / len(patterns)


def _mentions(request: Request, answer: str, recipe: Recipe) -> float:
    if request.short and (quoted := re.search(r'"""(.+?)(?:"""|$)', answer, re.DOTALL)):
        answer = quoted[1].strip()
    brief = len(answer.splitlines()) == 1 and len(answer.split()) <= 30
    return _share(request.mentions or (), answer) * (1.0 if brief or not request.short else 0.5)


def _references(request: Request, answer: str, recipe: Recipe) -> float:
    """Return the sentence chrF with the closest reference, from 0 to 1."""
    line = next((line.strip() for line in answer.splitlines() if line.strip()), "")
    return max(chrf(line.strip('"«» '), reference) for reference in request.references or ()) / 100


def is_title(text: str) -> bool:
    """Return whether a text has the form of a title: one line of two to twelve words, no final full stop."""
    return "\n" not in text and 2 <= len(text.split()) <= 12 and not text.endswith(".")


def _sentence(request: Request, answer: str, recipe: Recipe) -> float:
    return _share(request.sentence or (), answer) * (1.0 if is_sentence(answer) else 0.4)


def _title(request: Request, answer: str, recipe: Recipe) -> float:
    return _share(request.title or (), answer) * (1.0 if is_title(answer.strip('"')) else 0.4)


_CHECKS: dict[str, Callable[[Request, str, Recipe], float]] = {
    "label": _label,
    "entities": _entities,
    "query": _query,
    "command": _command,
    "slots": _slots,
    "mentions": _mentions,
    "references": _references,
    "sentence": _sentence,
    "title": _title,
}
