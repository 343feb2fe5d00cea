"""Declarative rules for request fields: honoured, ignored, or refused with a message; null counts as absent.

Pydantic validates and converts; this module writes the error message, which names the field.
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
"""Longest invalid value, in characters, that an error message quotes."""
REFUSED = "refused"
"""Pydantic error type of errors that carry their own message."""


class Use(StrEnum):
    """How the server treats a field."""

    HONOURED = "honoured"
    IGNORED = "ignored"
    REFUSED = "refused"


@dataclass(frozen=True)
class Row:
    """A row of the field table.

    Args:
        use: how the server treats the field.
        rule: what the value must be (honoured), or why the field is refused; both continue a sentence that starts
            with the field's name.
        fields: fields of the nested object, or of the objects in a list.
    """

    use: Use
    rule: str = ""
    fields: Mapping[str, Row] | None = None


@dataclass(frozen=True)
class Refusal:
    """Why a field is refused.

    Args:
        why: end of a sentence that starts with the field's name.
        harmless: values that have no effect and are accepted.
        unless: another field and a value of it with which this field has no effect.
    """

    why: str
    harmless: tuple[Any, ...] = ("", [], {}, False)
    unless: tuple[str, Any] | None = None

    def allows(self, value: Any, body: Mapping[str, Any]) -> bool:
        """Return whether the value has no effect in this body."""
        if self.unless and body.get(self.unless[0]) == self.unless[1]:
            return True
        alike = [known for known in self.harmless if isinstance(known, bool) == isinstance(value, bool)]
        return value in alike  # 0 is not False


def must_be(words: str, **bounds: Any) -> Any:
    """Declare a field's bounds and the words that follow "must be" in its error message."""
    return Field(description=words, **bounds)


def invalid_field(sentence: str, *path: str | int) -> PydanticCustomError:
    """Build a validator error with a message of its own.

    Args:
        sentence: end of a sentence that starts with the field's name; see `Refusal`.
        *path: path from the validated field to the field that the message names.
    """
    # pydantic substitutes names in braces, so the message is passed as a parameter
    return PydanticCustomError(REFUSED, "{sentence}", {"sentence": sentence, "path": path})


def without_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an object that are not null; null counts as absent."""
    return {name: held for name, held in value.items() if held is not None}


class Body(BaseModel):
    """A request object: declared fields are honoured, the class variables list the others; unknown ones are ignored."""

    what: ClassVar[str] = "an object"
    """Words after "must be" for an item of a list."""
    ignored: ClassVar[frozenset[str]] = frozenset()
    """Known fields that have no effect, whatever their value."""
    refusals: ClassVar[Mapping[str, Refusal]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, value: Any) -> Any:
        """Drop nulls and refuse fields that the server cannot honour."""
        if not isinstance(value, dict):
            return value
        kept = without_nulls(value)
        for name, refusal in cls.refusals.items():
            if name in kept and not refusal.allows(kept[name], kept):
                raise invalid_field(refusal.why, name)
        for name, field in cls.model_fields.items():
            # bool is a subclass of int, so pydantic would accept true as the number 1
            name = field.alias or name
            if isinstance(kept.get(name), bool) and not _takes_bool(field.annotation):
                raise invalid_field(_mismatch(kept[name], _words(field)[0]), name)
        return kept

    @classmethod
    def table(cls) -> dict[str, Row]:
        """Return all known fields by name."""
        rows = {name: Row(Use.IGNORED) for name in sorted(cls.ignored)}
        rows |= {name: Row(Use.REFUSED, refusal.why) for name, refusal in cls.refusals.items()}
        for name, field in cls.model_fields.items():
            inner = _inner(field.annotation)
            row = Row(Use.HONOURED, _words(field)[0], inner.table() if inner else None)
            rows[field.alias or name] = row
        return rows


def sentence(body: type[Body] | None, errors: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Write the error message for an invalid body.

    Args:
        body: expected body type; None if unknown.
        errors: errors of pydantic, with ``loc`` relative to the body; the first one is reported.

    Returns:
        The field's path, such as ``messages[0].content``, and a sentence that starts with it.
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
    return path, f"{path} {_mismatch(error['input'], words[0])}"


def preview(value: Any) -> str:
    """Describe a value in a few words, however large it is."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, str) and len(value) > MAX_SHOWN:
        return f"a text of {len(value)} characters"
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"a number of {len(text)} digits"


def _mismatch(value: Any, words: str) -> str:
    return f"is {preview(value)}; it must be {words}."


def _field(body: type[Body] | None, name: str | int) -> FieldInfo | None:
    if body is None or isinstance(name, int):
        return None
    return next((f for known, f in body.model_fields.items() if name in (known, f.alias)), None)


def _words(field: FieldInfo) -> list[str]:
    """Return the words given to `must_be`: for the field, then for the items of its list or object."""

    def within(annotation: Any) -> list[str]:
        if isinstance(annotation, FieldInfo):
            return [annotation.description] if annotation.description else []
        # Annotated puts the description after the type, so the outer one comes last
        return [words for part in reversed(get_args(annotation)) for words in within(part)]

    return [*([field.description] if field.description else []), *within(field.annotation)]


def _inner(annotation: Any) -> type[Body] | None:
    """Return the body type that a field holds, directly or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Body):
        return annotation
    return next((found for part in get_args(annotation) if (found := _inner(part))), None)


def _takes_bool(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(_takes_bool(part) for part in get_args(annotation))
