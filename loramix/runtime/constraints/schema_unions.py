"""Detects ``oneOf`` schemas that exclude each other, which are equivalent to ``anyOf`` and can be enforced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from loramix.runtime.constraints.schema_values import TYPES


def tag_of(branches: Sequence[Mapping[str, Any]], preferred: object = None) -> str | None:
    """Find the property that distinguishes the objects of a union.

    Args:
        branches: schemas of the union with resolved references.
        preferred: property named by an OpenAPI ``discriminator``.

    Returns:
        The property's name; ``""`` if the types differ; None if two schemas may match the same value.
    """
    names = [name for branch in branches for name in _constants(branch)]
    for tag in ("", *([preferred] if isinstance(preferred, str) else []), *dict.fromkeys(names)):
        if all(_differ(one, other, tag) for one, other in combinations(branches, 2)):
            return tag
    return None


def with_required(schema: Mapping[str, Any], tag: str) -> Mapping[str, Any]:
    """Return a schema whose objects must have the tag; other schemas unchanged."""
    required = schema.get("required", [])
    if not tag or tag not in _constants(schema) or not isinstance(required, list) or tag in required:
        return schema
    return {**schema, "required": [*required, tag]}


def _differ(one: Mapping[str, Any], other: Mapping[str, Any], tag: str) -> bool:
    if not _kinds(one) & _kinds(other):
        return True
    if not tag or one.get("type") != "object" or other.get("type") != "object":
        return False
    first, second = _constants(one).get(tag), _constants(other).get(tag)
    return first is not None and second is not None and not first & second


def _kinds(schema: Mapping[str, Any]) -> set[str]:
    """Types of the values that a schema may match."""
    names = schema.get("type", TYPES)
    found = (
        {names}
        if isinstance(names, str)
        else set(map(str, names if isinstance(names, list | tuple) else TYPES))
    )
    return {"number" if name == "integer" else name for name in found}


def _constants(schema: Mapping[str, Any]) -> dict[str, set[str]]:
    """Return string constants of properties, by property name."""
    properties = schema.get("properties")
    found = {}
    for name, value in properties.items() if isinstance(properties, dict) else ():
        if not isinstance(value, dict):
            continue
        values = [value["const"]] if "const" in value else value.get("enum")
        if isinstance(values, list) and values and all(isinstance(item, str) for item in values):
            found[name] = set(values)
    return found
