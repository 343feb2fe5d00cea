"""What a request's field may hold, in data: honoured, ignored, or refused with a sentence; null is absent.

Pydantic checks and converts; what a client reads about it is written here, and names the field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, Field, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

MAX_SHOWN = 40
"""Characters of a wrong value that its message repeats."""
REFUSED = "refused"
"""Type of the errors that bring their own sentence."""


class Use(StrEnum):
    """What becomes of a field."""

    HONOURED = "honoured"
    IGNORED = "ignored"
    REFUSED = "refused"


@dataclass(frozen=True)
class Row:
    """A field of the table.

    Args:
        use: what becomes of it.
        says: honoured: what it must be; refused: why, as the end of a sentence that begins with its name.
        fields: of the object, or of the objects in the list, that it holds.
    """

    use: Use
    says: str = ""
    fields: Mapping[str, Row] | None = None


@dataclass(frozen=True)
class Refusal:
    """Why a field is refused.

    Args:
        why: the end of a sentence that begins with the field's name.
        harmless: values that ask for nothing.
        unless: another field and its value with which this one asks for nothing.
    """

    why: str
    harmless: tuple[Any, ...] = ("", [], {}, False)
    unless: tuple[str, Any] | None = None

    def lets(self, value: Any, body: Mapping[str, Any]) -> bool:
        """Whether that value in that body asks for nothing."""
        if self.unless and body.get(self.unless[0]) == self.unless[1]:
            return True
        alike = [known for known in self.harmless if isinstance(known, bool) == isinstance(value, bool)]
        return value in alike  # 0 is not False


def says(words: str, **bounds: Any) -> Any:
    """A field's bounds, beside the words that follow "must be" in what a client reads."""
    return Field(description=words, **bounds)


def refused(sentence: str, *path: str | int) -> PydanticCustomError:
    """An error for validators, with its own sentence behind the field's name.

    Args:
        sentence: see `Refusal`.
        *path: from the field that is validated to the one that is named.
    """
    # an error's template replaces names in braces, so the sentence goes in as one
    return PydanticCustomError(REFUSED, "{sentence}", {"sentence": sentence, "path": path})


class Body(BaseModel):
    """An object in a request: its fields are honoured, others are listed here; unknown ones are ignored."""

    what: ClassVar[str] = "an object"
    """After "must be", where one stands in a list."""
    ignored: ClassVar[frozenset[str]] = frozenset()
    """Fields that change nothing here, whatever they hold."""
    refusals: ClassVar[Mapping[str, Refusal]] = {}

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, value: Any) -> Any:
        """Drop nulls, and refuse what is asked for in vain."""
        if not isinstance(value, dict):
            return value
        kept = {name: held for name, held in value.items() if held is not None}
        for name, refusal in cls.refusals.items():
            if name in kept and not refusal.lets(kept[name], kept):
                raise refused(refusal.why, name)
        for name, field in cls.model_fields.items():
            # bool is an int in Python; a client that sends one for a number means something else
            name = field.alias or name
            if isinstance(kept.get(name), bool) and not _takes_bool(field.annotation):
                raise refused(_but_must(kept[name], _words(field)[0]), name)
        return kept

    @classmethod
    def table(cls) -> dict[str, Row]:
        """All fields that are known, by name."""
        rows = {name: Row(Use.IGNORED) for name in sorted(cls.ignored)}
        rows |= {name: Row(Use.REFUSED, refusal.why) for name, refusal in cls.refusals.items()}
        for name, field in cls.model_fields.items():
            inner = _inner(field.annotation)
            row = Row(Use.HONOURED, _words(field)[0], inner.table() if inner else None)
            rows[field.alias or name] = row
        return rows


def sentence(body: type[Body] | None, errors: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """What a client reads about a body that cannot be used.

    Args:
        body: what was expected; None where that is not known.
        errors: as pydantic lists them, with ``loc`` from the body on.

    Returns:
        The field's path, as ``messages[0].content``, and one sentence that begins with it.
    """
    error = errors[0]
    context = error.get("ctx") or {}
    path, words = "", ["a JSON object"]
    for part in (*error["loc"], *context.get("path", ())):
        field = _field(body, part)
        if field is not None:
            words, body = _words(field), _inner(field.annotation)
        elif isinstance(part, int) and body:
            words = [body.what]
        else:
            words = words[-1:]
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    if error["type"] == REFUSED:
        return path, f"{path} {context['sentence']}"
    if error["type"] == "extra_forbidden":
        parent, _, name = path.rpartition(".")
        return path, f"{path} is not known; {parent or 'the body'} has no field {name!r}."
    if not path:
        return path, "the body must be a JSON object."
    if error["type"] == "missing":
        return path, f"{path} is missing; it must be {words[0]}."
    return path, f"{path} {_but_must(error['input'], words[0])}"


def shown(value: Any) -> str:
    """A value in a few words, however large it is."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str) and len(value) > MAX_SHOWN:
        return f"a text of {len(value)} characters"
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"a number of {len(text)} digits"


def _but_must(value: Any, words: str) -> str:
    return f"is {shown(value)}; it must be {words}."


def _field(body: type[Body] | None, name: str | int) -> FieldInfo | None:
    if body is None or isinstance(name, int):
        return None
    return next((f for known, f in body.model_fields.items() if name in (known, f.alias)), None)


def _words(field: FieldInfo) -> list[str]:
    """What `says` was told: of the field, then of what its list or object holds."""

    def within(annotation: Any) -> list[str]:
        if isinstance(annotation, FieldInfo):
            return [annotation.description] if annotation.description else []
        # what is said of a type stands behind it, and what it is made of within
        return [words for part in reversed(get_args(annotation)) for words in within(part)]

    return [*([field.description] if field.description else []), *within(field.annotation)]


def _inner(annotation: Any) -> type[Body] | None:
    """The kind of object that a field holds, by itself or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Body):
        return annotation
    return next((found for part in get_args(annotation) if (found := _inner(part))), None)


def _takes_bool(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(_takes_bool(part) for part in get_args(annotation))
