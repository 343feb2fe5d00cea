"""JSON schemas in the form that Zod 4's `z.toJSONSchema` writes."""

from __future__ import annotations

from typing import Any

DRAFT = "https://json-schema.org/draft/2020-12/schema"
EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
UUID = (
    "^([0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[1-8][0-9a-fA-F]{3}-[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}"
    "|00000000-0000-0000-0000-000000000000)$"
)
ZOD_DATE = (
    r"((\d\d[2468][048]|\d\d[13579][26]|\d\d0[48]|[02468][048]00|[13579][26]00)-02-29|\d{4}-((0[13578]|1[02])-"
    r"(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|(02)-(0[1-9]|1\d|2[0-8])))"
)
ZOD_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d+)?"


TEXT, WHOLE, NULL = {"type": "string"}, {"type": "integer"}, {"type": "null"}
SAFE = {"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991}


def zod(properties: dict[str, Any], *, required: list[str] | None = None, **rest: Any) -> dict[str, Any]:
    """An object's schema as ``io: "output"`` writes it: closed."""
    needed = list(properties) if required is None else required
    found = {"$schema": DRAFT, "type": "object", "properties": properties, "required": needed}
    return {**found, "additionalProperties": False, **rest}


ZOD: dict[str, dict[str, Any]] = {
    "zod strings": zod(
        {
            "email": {"type": "string", "format": "email", "pattern": EMAIL},
            "url": {"type": "string", "format": "uri"},
            "uuid": {"type": "string", "format": "uuid", "pattern": UUID},
            "cuid": {"type": "string", "format": "cuid", "pattern": r"^[cC][^\s-]{8,}$"},
        }
    ),
    "zod dates": zod(
        {
            "day": {"type": "string", "format": "date", "pattern": f"^{ZOD_DATE}$"},
            "at": {"type": "string", "format": "date-time", "pattern": f"^{ZOD_DATE}T{ZOD_TIME}(Z)$"},
        }
    ),
    "zod checks": zod(
        {
            "slug": {
                "type": "string",
                "minLength": 3,
                "maxLength": 12,
                "allOf": [{"pattern": "^a.*"}, {"pattern": "^[^A-Z]*$"}],
            },
            "quote": {"type": "string", "pattern": r'^"[^"\\]{1,5}"\\$'},
            "line": {"type": "string", "pattern": r"^a\n\tb\/$"},
            "password": {"type": "string", "pattern": r"^(?=.*[A-Z])(?=.*\d).{4,12}$"},
        }
    ),
    "zod numbers": zod(
        {
            "int": SAFE,
            "positive": {**SAFE, "exclusiveMinimum": 0},
            "step": {"type": "number", "multipleOf": 0.25},
        }
    ),
    "zod record": zod(
        {"r": {"type": "object", "propertyNames": TEXT, "additionalProperties": {"type": "boolean"}}}
    ),
    "zod enum record": zod(
        {
            "r": {
                "type": "object",
                "propertyNames": {"type": "string", "enum": ["a", 'b"']},
                "additionalProperties": SAFE,
                "required": ["a", 'b"'],
            }
        }
    ),
    "zod tuple": zod(
        {"t": {"type": "array", "prefixItems": [TEXT, {"type": "number"}], "items": {"type": "boolean"}}}
    ),
    "zod union": zod(
        {
            "shape": {
                "oneOf": [
                    zod({"type": {"type": "string", "const": "circle"}, "r": {"type": "number"}}),
                    zod({"type": {"type": "string", "const": "square"}, "side": {"type": "number"}}),
                ]
            },
            "maybe": {"anyOf": [TEXT, NULL]},
            "never": {"not": {}},
        },
        required=["shape", "maybe"],
    ),
    "zod recursion": zod({"name": TEXT, "parts": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}}),
    "zod and": {
        "$schema": DRAFT,
        "allOf": [
            {"type": "object", "properties": {"a": TEXT}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "number"}}, "required": ["b"]},
        ],
    },
    "zod draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "required": ["p", "n"],
        "properties": {
            "p": {"type": "array", "items": [TEXT, SAFE], "additionalItems": False},
            "n": {"allOf": [{"$ref": "#/definitions/N"}]},
        },
        "definitions": {"N": {"type": "string", "minLength": 1, "maxLength": 9, "id": "N"}},
        "additionalProperties": False,
    },
    "zod keys": zod(
        {
            'say "hi"': TEXT,
            "back\\slash": SAFE,
            "tab\tline\n": {"type": "boolean"},
            "é/~": {"const": 'q"\\\n'},
        }
    ),
}
