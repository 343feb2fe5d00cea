"""Forty JSON schemas as people's libraries write them: here those of Pydantic v2's `model_json_schema`."""

from __future__ import annotations

from typing import Any

import jsonschema_rs
from schemas_zod import NULL, TEXT, WHOLE, ZOD


def pydantic(properties: dict[str, Any], *, required: list[str] | None = None, **rest: Any) -> dict[str, Any]:
    """A model's schema; every field has its title, and is required unless said otherwise."""
    titled = {
        name: {"title": name.replace("_", " ").title(), **schema} for name, schema in properties.items()
    }
    needed = list(properties) if required is None else required
    found = {"properties": titled, "title": "Model", "type": "object", **rest}
    return {**found, "required": needed} if needed else found


CAT = pydantic({"kind": {"const": "cat", "type": "string"}, "lives": {"type": "integer", "minimum": 1}})
DOG = pydantic(
    {"kind": {"const": "dog", "type": "string"}, "breed": {"enum": ["pug", "collie"], "type": "string"}}
)

PYDANTIC: dict[str, dict[str, Any]] = {
    "scalars": pydantic(
        {"name": TEXT, "age": WHOLE, "height": {"type": "number"}, "member": {"type": "boolean"}}
    ),
    "phone": pydantic({"phone": {"type": "string", "pattern": r"^\d{3}-\d{4}$"}}),
    "words as names": pydantic(
        {
            "minLength": TEXT,
            "$ref": WHOLE,
            "type": {"enum": ["a", "b"], "type": "string"},
            "required": {"type": "boolean"},
            "properties": {"additionalProperties": WHOLE, "type": "object"},
            "const": TEXT,
            "enum": {"items": TEXT, "type": "array"},
        }
    ),
    "any": pydantic({"value": {}, "items": {"items": {}, "type": "array"}}),
    "optional": pydantic({"nick": {"anyOf": [TEXT, NULL], "default": None}, "id": WHOLE}, required=["id"]),
    "literal": pydantic(
        {"mode": {"const": "fast", "type": "string"}, "level": {"enum": [1, 2, 3], "type": "integer"}}
    ),
    "mixed literal": pydantic({"x": {"enum": ["auto", 0, None, True, 1.5, "\b\f\u2028\U0001f600"]}}),
    "root reference": {
        "$defs": {
            "Node": pydantic(
                {
                    "value": WHOLE,
                    "next": {"anyOf": [{"$ref": "#/$defs/Node"}, NULL], "default": None},
                },
                required=["value"],
            )
        },
        "$ref": "#/$defs/Node",
    },
    "tree": {
        "$defs": {
            "Tree": pydantic({"name": TEXT, "children": {"items": {"$ref": "#/$defs/Tree"}, "type": "array"}})
        },
        **pydantic({"root": {"$ref": "#/$defs/Tree"}}),
    },
    "enum class": {
        "$defs": {
            "Color": {"enum": ["red", "green"], "title": "Color", "type": "string", "description": "A color."}
        },
        **pydantic({"color": {"$ref": "#/$defs/Color", "default": "red", "description": "which"}}),
    },
    "discriminated": {
        "$defs": {"Cat": CAT, "Dog": DOG},
        **pydantic(
            {
                "pet": {
                    "discriminator": {
                        "mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"},
                        "propertyName": "kind",
                    },
                    "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
                }
            }
        ),
    },
    "map": pydantic({"scores": {"additionalProperties": {"type": "number"}, "type": "object"}}),
    "map by pattern": pydantic({"env": {"patternProperties": {"^[A-Z_]{1,8}$": TEXT}, "type": "object"}}),
    "map by enum": {
        "$defs": {"Color": {"enum": ["red", "green"], "title": "Color", "type": "string"}},
        **pydantic(
            {
                "n": {
                    "additionalProperties": WHOLE,
                    "propertyNames": {"$ref": "#/$defs/Color"},
                    "type": "object",
                }
            }
        ),
    },
    "tuple": pydantic(
        {"pair": {"maxItems": 2, "minItems": 2, "prefixItems": [WHOLE, TEXT], "type": "array"}}
    ),
    "lengths": pydantic(
        {
            "code": {"maxLength": 6, "minLength": 2, "type": "string"},
            "tags": {
                "items": {"maxLength": 5, "type": "string"},
                "maxItems": 3,
                "minItems": 1,
                "type": "array",
            },
        }
    ),
    "bounds": pydantic(
        {
            "age": {"maximum": 150, "minimum": 0, "type": "integer"},
            "share": {"exclusiveMaximum": 1, "exclusiveMinimum": 0, "type": "number"},
            "even": {"multipleOf": 2, "type": "integer", "minimum": -10},
            "price": {"minimum": 0.01, "type": "number"},
        }
    ),
    "dates": pydantic(
        {
            "day": {"format": "date", "type": "string"},
            "at": {"format": "date-time", "type": "string"},
            "time": {"format": "time", "type": "string"},
            "span": {"format": "duration", "type": "string"},
        }
    ),
    "formats": pydantic(
        {
            "id": {"format": "uuid", "type": "string"},
            "mail": {"format": "email", "type": "string"},
            "site": {"format": "uri", "maxLength": 60, "minLength": 1, "type": "string"},
            "v4": {"format": "ipv4", "type": "string"},
            "v6": {"format": "ipv6", "type": "string"},
        }
    ),
    "remarks": pydantic(
        {
            "secret": {
                "format": "password",
                "type": "string",
                "writeOnly": True,
                "examples": ["x"],
                "deprecated": True,
            },
            "file": {"format": "path", "type": "string"},
            "raw": {"format": "binary", "type": "string"},
        },
        description="A model.",
        examples=[{"secret": "a"}],
    ),
    "closed": pydantic({"a": {"anyOf": [WHOLE, TEXT]}}, additionalProperties=False),
    "optional tag": {
        "$defs": {
            "Add": pydantic(
                {"op": {"const": "add", "default": "add", "type": "string"}, "to": {"$ref": "#/$defs/Sum"}},
                required=["to"],
            ),
            "Leaf": pydantic({"op": {"const": "leaf", "default": "leaf", "type": "string"}}, required=[]),
            "Sum": {
                "discriminator": {"propertyName": "op"},
                "oneOf": [{"$ref": "#/$defs/Add"}, {"$ref": "#/$defs/Leaf"}],
            },
        },
        **pydantic({"sum": {"$ref": "#/$defs/Sum"}}),
    },
    "open": pydantic(
        {"a": WHOLE, "none": {"properties": {}, "title": "Empty", "type": "object"}},
        additionalProperties=True,
    ),
    "decimal": pydantic(
        {
            "amount": {
                "anyOf": [
                    {"type": "number"},
                    {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"},
                ]
            }
        }
    ),
    "look behind": pydantic({"code": {"type": "string", "pattern": "^a(?<!b)c$"}}),
    "set": pydantic({"tags": {"items": TEXT, "type": "array", "uniqueItems": True}}),
    "root list": {
        "$defs": {"P": pydantic({"x": WHOLE})},
        "items": {"$ref": "#/$defs/P"},
        "type": "array",
        "maxItems": 2,
    },
    "root union": {"anyOf": [WHOLE, TEXT, {"items": WHOLE, "type": "array"}], "title": "Answer"},
}

SCHEMAS = {**PYDANTIC, **ZOD}
REFUSED = {"set": "$.properties.tags.uniqueItems", "look behind": "$.properties.code.pattern"}
"""Those that cannot be enforced, with the path that the refusal names."""


def validator(schema: Any) -> Any:
    """A validator by another implementation, formats checked."""
    return jsonschema_rs.validator_for(schema, validate_formats=True)
