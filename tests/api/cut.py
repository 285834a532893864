"""python -m tests.api.cut FULL.json: cut OpenAI's OpenAPI description to the paths that the gateway serves.

Descriptions and examples go, as does what only OpenAI's tools read. Errors come in: the description has none, but says
what they look like (ErrorResponse).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CUT = Path(__file__).parent / "openai.json"
OPERATIONS = (
    ("/chat/completions", "post"),
    ("/completions", "post"),
    ("/responses", "post"),
    ("/embeddings", "post"),
    ("/models", "get"),
    ("/models/{model}", "get"),
)
UNREAD = ("description", "example", "examples", "title", "summary", "tags", "deprecated", "security")
REF = "#/components/"
ERROR = {
    "description": "An error.",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}},
}


def cut(full: dict[str, Any]) -> dict[str, Any]:
    """Cut a description."""
    paths: dict[str, Any] = {}
    for path, method in OPERATIONS:
        operation = slim(full["paths"][path][method])
        content = operation["responses"]["200"]["content"]
        if method == "post":
            content["text/event-stream"] = {}  # as described, not even OpenAI's own have a null as finish_reason
        answers = {"200": {"description": "", "content": content}, "4XX": ERROR, "5XX": ERROR}
        paths.setdefault(path, {})[method] = {**operation, "responses": answers}
    components: dict[str, Any] = {}
    wanted = [*refs(paths)]
    while wanted:
        kind, name = wanted.pop().removeprefix(REF).split("/")
        if name not in components.setdefault(kind, {}):
            components[kind][name] = slim(full["components"][kind][name])
            wanted += refs(components[kind][name])
    info = {name: full["info"][name] for name in ("title", "version", "license")}
    return {"openapi": full["openapi"], "info": info, "paths": paths, "components": components}


def slim(node: Any, *, is_map: bool = False) -> Any:
    """Leave out what no validator reads. `is_map`: the keys are names of properties, not keywords."""
    if isinstance(node, list):
        return [slim(part) for part in node]
    if not isinstance(node, dict):
        return node
    return {
        name: slim(value, is_map=name == "properties" and not is_map)
        for name, value in node.items()
        if is_map or not (name in UNREAD or name.startswith("x-"))
    }


def refs(node: Any) -> Iterator[str]:
    """Find all references."""
    if isinstance(node, list):
        for part in node:
            yield from refs(part)
    elif isinstance(node, dict):
        for name, value in node.items():
            if name == "$ref" and isinstance(value, str):
                yield value
            elif name == "discriminator":
                yield from value.get("mapping", {}).values()
            else:
                yield from refs(value)


if __name__ == "__main__":
    CUT.write_text(json.dumps(cut(json.loads(Path(sys.argv[1]).read_text())), indent=1, sort_keys=True) + "\n")
