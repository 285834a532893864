"""Schemas of our own, for when no folder is given: what real ones use, one thing each."""

from __future__ import annotations

from typing import Any


def record(**properties: Any) -> dict[str, Any]:
    """An object with these properties, all required, and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT, NUMBER, WHOLE, FLAG = ({"type": kind} for kind in ("string", "number", "integer", "boolean"))
SCHEMAS: dict[str, Any] = {
    "city": record(name=TEXT, population={"type": "integer", "minimum": 1, "maximum": 40_000_000}, capital=FLAG),
    "optional": {"type": "object", "properties": {"a": TEXT, "b": WHOLE, "c": FLAG}, "required": ["b"]},
    "enum": record(colour={"enum": ["red", "green", "blue"]}, size={"enum": [1, 2, None]}, kind={"const": "shirt"}),
    "list": {"type": "array", "items": {"type": "integer", "minimum": -3, "maximum": 3}, "minItems": 2, "maxItems": 4},
    "pair": {"type": "array", "prefixItems": [TEXT, NUMBER], "items": False, "minItems": 2},
    "nested": record(owner=record(name=TEXT, tags={"type": "array", "items": TEXT, "maxItems": 2}), open=FLAG),
    "either": record(shape={"anyOf": [record(side=NUMBER), record(width=NUMBER, height=NUMBER)]}),
    "nullable": record(name=TEXT, nickname={"type": ["string", "null"], "maxLength": 8}),
    "pattern": record(code={"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2}$"}),
    "format": record(
        day={"type": "string", "format": "date"},
        id={"type": "string", "format": "uuid"},
        mail={"type": "string", "format": "email"},
    ),
    "tree": {
        "$defs": {
            "node": record(value=WHOLE, children={"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1})
        },
        "$ref": "#/$defs/node",
    },
    "map": {"type": "object", "additionalProperties": WHOLE},
    "bounds": record(
        share={"type": "number", "minimum": 0, "exclusiveMaximum": 1}, even={"type": "integer", "multipleOf": 2}
    ),
    "all": {"allOf": [{"type": "object", "properties": {"a": WHOLE}, "required": ["a"]}]},
    "refused-not": {"type": "object", "properties": {"a": {"not": {"type": "string"}}}},
    "refused-contradiction": {"type": "integer", "minimum": 3, "maximum": 2},
}
