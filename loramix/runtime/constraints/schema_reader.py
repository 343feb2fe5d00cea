"""Rewrites a JSON schema to the keywords that llguidance enforces exactly.

Omits titles, examples and unknown keywords, replaces old spellings, and collects references. An object with named
properties gets no others unless the schema allows them explicitly, because small models would add properties
endlessly; answers always satisfy the original schema.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from loramix.runtime.constraints.schema_strings import as_patterns
from loramix.runtime.constraints.schema_unions import tag_of, with_required
from loramix.runtime.constraints.schema_values import (
    VALUES,
    at,
    encodable,
    read_values,
    refuse,
    short,
    writable,
)

MAX_DEPTH = 64
_ALTERNATIVES = ("allOf", "anyOf", "oneOf")
_ARRAYS = ("items", "prefixItems", "additionalItems")
_OBJECTS = ("properties", "patternProperties", "additionalProperties", "required", "propertyNames")
_REFUSED = (
    "contains", "if", "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems",
    "unevaluatedProperties", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
_CONSTRAINTS = {*VALUES, *_ARRAYS, *_OBJECTS, *_ALTERNATIVES, *_REFUSED, "$ref", "not", "uniqueItems"}


class Reader:
    """Rewrites one schema.

    Args:
        root: the client's schema, the target of references.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self._names: dict[tuple[str, bool, str], str] = {}
        self.definitions: dict[str, Any] = {}
        """Definitions of the rewritten schema, by name."""
        self.nodes: list[tuple[str, dict[str, Any]]] = []
        """All objects of the rewritten schema with their paths, inner ones first."""
        self.split: set[str] = set()
        """Paths of schemas whose pattern or format became several patterns under ``allOf``."""

    def read(self, node: Any, path: str = "$", *, closed: bool = True, depth: int = 0) -> Any:
        """Rewrite a schema.

        Args:
            node: a schema.
            path: its path in the root schema.
            closed: whether objects may be closed to other properties; False if several schemas describe one
                object.
            depth: nesting depth.

        Raises:
            UsageError: not a schema, or a keyword cannot be enforced; the message has its path.
        """
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            refuse(path, f"is {short(node)}, which is no schema")
        if depth > MAX_DEPTH:
            refuse(path, f"is nested deeper than {MAX_DEPTH} levels")
        if _forbids_all(node, path):
            return False
        combined = [word for word in (*_ALTERNATIVES, "$ref") if word in node]
        out = read_values(node, path)
        if "allOf" in out:
            self.split.add(path)
            self.nodes += [(path, part) for part in out["allOf"]]
        alone = closed and not combined
        self._arrays(node, path, out, closed=alone, depth=depth + 1)
        self._objects(node, path, out, closed=alone, depth=depth + 1)
        passed_on = closed and _CONSTRAINTS & set(node) == set(combined) and len(combined) == 1
        for word in combined:
            if word == "$ref":
                out[word] = self._reference(node[word], at(path, word), closed=passed_on, depth=depth)
                continue
            if not isinstance(node[word], list) or not node[word]:
                refuse(at(path, word), "must be a list of schemas")
            whole = passed_on and (word != "allOf" or len(node[word]) == 1)
            tag = self._tag(node, path) if word == "oneOf" else None
            found = [
                self._branch(item, at(path, word, i), tag or "", closed=whole, depth=depth + 1)
                for i, item in enumerate(node[word])
            ]
            out["anyOf" if tag is not None else word] = [*found, *out.get(word, [])]
        if len(out) == 1 and len(only := [part for word in _ALTERNATIVES for part in out.get(word, [])]) == 1:
            return only[0]
        self.nodes.append((path, out))
        return out

    def check_references(self) -> None:
        """Reject references that only refer to each other."""
        for (reference, *_), name in self._names.items():
            seen, node = {name}, self.definitions[name]
            while isinstance(node, dict) and set(node) == {"$ref"}:
                name = node["$ref"].rpartition("/")[2]
                if name in seen:
                    refuse(_pointed(reference), "refers to itself")
                seen.add(name)
                node = self.definitions[name]

    def _arrays(
        self, node: Mapping[str, Any], path: str, out: dict[str, Any], *, closed: bool, depth: int
    ) -> None:
        """Read array items, including the tuple syntax of draft 7."""
        first, rest = (
            ("items", "additionalItems") if isinstance(node.get("items"), list) else ("prefixItems", "items")
        )
        if first in node:
            if not isinstance(node[first], list):
                refuse(at(path, first), "must be a list of schemas")
            out["prefixItems"] = [
                self.read(item, at(path, first, i), closed=closed, depth=depth)
                for i, item in enumerate(node[first])
            ]
        if rest in node:
            out["items"] = self.read(node[rest], at(path, rest), closed=closed, depth=depth)

    def _objects(
        self, node: Mapping[str, Any], path: str, out: dict[str, Any], *, closed: bool, depth: int
    ) -> None:
        """Read properties and constraints of their names."""
        for word in ("properties", "patternProperties"):
            if word in node:
                if not isinstance(node[word], dict):
                    refuse(at(path, word), f"is {short(node[word])}; it must hold a schema for each name")
                out[word] = {}
                for name, schema in node[word].items():
                    where = at(path, word, encodable(name, at(path, word)))
                    patterned = word == "patternProperties"
                    key = _key_pattern({"pattern": name}, where) if patterned else writable(name, where)
                    out[word][key] = self.read(schema, where, closed=closed, depth=depth)
        required = node.get("required", [])
        if isinstance(required, list) and all(isinstance(name, str) for name in required):
            out.update({"required": required} if required else {})
        elif not isinstance(required, bool):  # draft 3's, which says nothing since
            refuse(at(path, "required"), f"is {short(required)}; it must be a list of names")
        others: Any = None
        if "additionalProperties" in node:
            where = at(path, "additionalProperties")
            others = self.read(node["additionalProperties"], where, closed=closed, depth=depth)
        named = self._named(node, path)
        if named is not None:
            self._name(named, others if others is not None else True, path, out)
        elif others is not None:
            out["additionalProperties"] = others
        elif closed and (set(out) & {"properties", "patternProperties"}) and "minProperties" not in out:
            listed = out.get("properties", {})
            if (listed or out.get("patternProperties")) and set(out.get("required", ())) <= set(listed):
                out["additionalProperties"] = False
        if out.get("minProperties", 0) > len(required or ()) + 1:
            refuse(at(path, "minProperties"), "cannot be enforced: an answer may repeat a name")

    def _tag(self, node: Mapping[str, Any], path: str) -> str | None:
        """Return the property that distinguishes the schemas of a ``oneOf``; see `tag_of`."""
        branches = [self._resolved(item, at(path, "oneOf", i))[1] for i, item in enumerate(node["oneOf"])]
        if "anyOf" in node or not all(isinstance(branch, dict) for branch in branches):
            return None
        discriminator = node.get("discriminator")
        return tag_of(
            branches, discriminator.get("propertyName") if isinstance(discriminator, dict) else None
        )

    def _branch(self, item: Any, path: str, tag: str, *, closed: bool, depth: int) -> Any:
        """Read a schema of a union, whose objects must have the tag."""
        reference = self._resolved(item, path)[0]
        if reference is None or not tag:
            return self.read(with_required(item, tag) if tag else item, path, closed=closed, depth=depth)
        return {"$ref": self._reference(reference, path, closed=closed, depth=depth, tag=tag)}

    def _named(self, node: Mapping[str, Any], path: str) -> dict[str, Any] | None:
        """Return the constraints of property names; None if all names are allowed."""
        where = at(path, "propertyNames")
        names = self._resolved(node.get("propertyNames"), where)[1]
        if names is None or names is True:
            return None
        if not isinstance(names, dict) or _forbids_all(names, where):
            refuse(where, "cannot be enforced")
        named = {word: names[word] for word in names if word in _CONSTRAINTS}
        if named.pop("type", "string") != "string" or node.get("properties") or node.get("patternProperties"):
            refuse(where, "cannot be enforced")
        return named or None

    def _name(self, named: Mapping[str, Any], value: Any, path: str, out: dict[str, Any]) -> None:
        """Express constraints of property names as properties or patternProperties."""
        where = at(path, "propertyNames")
        shared = f"v{len(self.definitions)}"
        self.definitions[shared] = value
        value = {"$ref": f"#/$defs/{shared}"}
        out["additionalProperties"] = False
        read_values(named, where)  # refuses bad ones
        if set(named) in ({"enum"}, {"const"}):
            names = named.get("enum", [named.get("const")])
            out["properties"] = {name: value for name in names if isinstance(name, str)}
        elif set(named) <= {"minLength", "maxLength"}:
            most = named.get("maxLength", "")
            out["patternProperties"] = {rf"^[\s\S]{{{named.get('minLength', 0)},{most}}}$": value}
        elif set(named) in ({"pattern"}, {"format"}):
            out["patternProperties"] = {_key_pattern(named, where): value}
        else:
            refuse(where, "cannot be enforced")

    def _reference(self, reference: Any, path: str, *, closed: bool, depth: int, tag: str = "") -> str:
        """Return the reference to a definition; read the definition if it is new."""
        target = self._target(reference, path)
        key = (reference, closed, tag)
        if key not in self._names:
            self._names[key] = name = f"d{len(self._names)}"
            self.definitions[name] = True  # until it is known; it may refer to itself
            if tag and isinstance(target, dict):
                target = with_required(target, tag)
            self.definitions[name] = self.read(target, _pointed(reference), closed=closed, depth=depth + 1)
        return f"#/$defs/{self._names[key]}"

    def _resolved(self, node: Any, path: str) -> tuple[str | None, Any]:
        """Resolve a schema that is only a reference; return the last reference and its target."""
        reference = None
        for _ in range(MAX_DEPTH):
            if not isinstance(node, dict) or _CONSTRAINTS & set(node) != {"$ref"}:
                break
            reference, node = node["$ref"], self._target(node["$ref"], at(path, "$ref"))
        return reference, node

    def _target(self, reference: Any, path: str) -> Any:
        """Return the target of a reference."""
        base = self._root.get("$id") if isinstance(self._root, dict) else None
        if isinstance(reference, str) and isinstance(base, str) and base:
            reference = reference.removeprefix(base.rstrip("#"))
        if not isinstance(reference, str) or not re.fullmatch(r"#?(/.*)?", reference, re.DOTALL):
            refuse(path, f"is {short(reference)}; it must point into the schema itself, as '#/$defs/NAME'")
        target = self._root
        for step in _steps(reference):
            if isinstance(target, dict) and step in target:
                target = target[step]
            elif isinstance(target, list) and step.isdecimal() and int(step) < len(target):
                target = target[int(step)]
            else:
                refuse(path, f"is {short(reference)}, which is not in the schema")
        return target


def _steps(reference: str) -> list[str]:
    """Split a JSON pointer into its steps."""
    steps = unquote(reference.partition("#")[2]).split("/")[1:]
    return [step.replace("~1", "/").replace("~0", "~") for step in steps]


def _pointed(reference: str) -> str:
    return at("$", *_steps(reference))


def _key_pattern(named: Mapping[str, Any], path: str) -> str:
    """Return the single pattern of a property's name."""
    try:
        patterns = as_patterns(named.get("pattern"), named.get("format"))
    except ValueError as error:
        refuse(path, f"cannot be enforced: {error}")
    if len(patterns) > 1:
        refuse(path, "cannot be enforced: conditions that look ahead are not known in names")
    return patterns[0] if patterns else ""


def _forbids_all(node: Mapping[str, Any], path: str) -> bool:
    """Whether a schema allows nothing; rejects keywords that cannot be enforced."""
    for word in _REFUSED:
        harmless = word.startswith("unevaluated") and node.get(word) in (True, {})
        if word in node and not harmless:
            refuse(at(path, word), "cannot be enforced")
    most = node.get("maxItems")
    if node.get("uniqueItems") and not (isinstance(most, int) and most <= 1):
        refuse(at(path, "uniqueItems"), "cannot be enforced")
    if "not" not in node or node["not"] is False:
        return False
    if node["not"] is not True and node["not"] != {}:
        refuse(at(path, "not"), "cannot be enforced")
    return True
