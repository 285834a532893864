"""The schemas and grammars that a body brings: how large and how deep they are, before a worker reads any of them.

What compiling them takes is bounded on the workers; this is what can be known by looking.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import orjson

from inferflux.errors import InvalidRequest

MAX_TOOLS = 128
# vLLM ignores them in silence, and the answer follows no schema.
_REMOVED = (
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "structural_tag",
)
_TAG = "structural_tag"


def check(document: Mapping[str, Any], max_bytes: int, max_depth: int) -> None:
    """Refuse what is too large, too deep or not offered. Raises InvalidRequest.

    `max_bytes`: of all schemas of the body together.
    """
    _refuse_unoffered(document)
    num_bytes = 0
    for name, schema in _schemas(document):
        written = schema.encode("utf-8", "surrogatepass") if isinstance(schema, str) else orjson.dumps(schema)
        num_bytes += len(written)
        if num_bytes > max_bytes:
            raise InvalidRequest(
                f"the schemas of the body have at least {num_bytes} bytes, the limit is {max_bytes}", param=name
            )
        if (depth := _depth(_parsed(schema), max_depth)) > max_depth:
            raise InvalidRequest(
                f"a schema is nested at least {depth} levels deep, the limit is {max_depth}", param=name
            )


def _refuse_unoffered(document: Mapping[str, Any]) -> None:
    for name in _REMOVED:
        if document.get(name) is not None:
            raise InvalidRequest(f"{name} is not offered: use response_format or structured_outputs", param=name)
    wanted, outputs = document.get("response_format"), document.get("structured_outputs")
    for name, is_tag in (
        ("response_format", _is_map(wanted) and wanted.get("type") == _TAG),
        ("structured_outputs", _is_map(outputs) and outputs.get(_TAG) is not None),
    ):
        if is_tag:
            raise InvalidRequest("structural tags are not offered: use tools or a grammar", param=name)
    tools = document.get("tools")
    if isinstance(tools, list) and len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"there are {len(tools)} tools, the limit is {MAX_TOOLS}", param="tools")


def _schemas(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each schema, grammar and list of choices with the field that brings it."""
    for name, inner in (("response_format", "json_schema"), ("text", "format"), ("output_config", "format")):
        value = document.get(name)
        if _is_map(value) and _is_map(value := value.get(inner)):
            yield from ((name, value[key]) for key in ("schema", "json_schema") if key in value)
    if _is_map(outputs := document.get("structured_outputs")):
        yield from (
            ("structured_outputs", outputs[key]) for key in ("json", "regex", "grammar", "choice") if key in outputs
        )
    tools = document.get("tools")
    for tool in tools if isinstance(tools, list) else ():
        if _is_map(tool):
            function = tool.get("function")
            yield "tools", function if _is_map(function) else tool


def _parsed(schema: object) -> object:
    """Return a schema that is written as a string (structured_outputs.json) as what it says, if it says anything."""
    if not isinstance(schema, str) or schema.lstrip()[:1] != "{":
        return schema
    try:
        return orjson.loads(schema)
    except orjson.JSONDecodeError:
        return schema


def _depth(schema: object, max_depth: int) -> int:
    """Count levels of objects and lists, up to one more than `max_depth`."""
    level, depth = list[Any]([schema]), 0
    while depth <= max_depth:
        level = [node for node in level if isinstance(node, (dict, list))]
        if not level:
            return depth
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]
        depth += 1
    return depth


def _is_map(value: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)
