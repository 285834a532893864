"""Nothing in a request makes a worker open a connection or a file: media come inside the body, as `data:` URLs.

What is looked at are the content parts of all dialects: `image_url`, `audio_url`, `video_url` and `file_url`, as text
or as an object with a `url`; Anthropic's `source`; the `images` of embeddings. Schemas and arguments of tools are the
client's own and never fetched, whatever their members are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from inferflux.errors import InvalidRequest

_PARTS = frozenset(("image_url", "audio_url", "video_url", "file_url", "input_image", "input_audio", "input_video"))
_EMBEDDED = "data:"
_SCHEMAS = frozenset(("tools", "functions", "tool_choice", "response_format", "structured_outputs", "text", "metadata"))
_HINTS = (b"url", b"images", b"uuid", b"\\u")
"""A body without any of these, letter for letter or escaped, has no media by address."""


def refuse_addresses(body: bytes, document: Mapping[str, Any]) -> None:
    """Raise InvalidRequest if a content part of the document, which is the body's, refers to media elsewhere."""
    if not any(hint in body for hint in _HINTS):
        return
    for image in document.get("images") or () if isinstance(document.get("images"), list) else ():
        _require_embedded(image, "images")
    for node in parts(document):
        if not _PARTS.isdisjoint(node):
            _check_part(node)
        if isinstance(source := node.get("source"), dict) and "url" in source:
            _require_embedded(source["url"], "source.url")


def parts(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield all objects of a call that may be content parts: not those of schemas and of arguments of tools."""
    return _objects({name: value for name, value in document.items() if name not in _SCHEMAS})


def _check_part(part: dict[str, Any]) -> None:
    for name in _PARTS & part.keys():
        value = part[name]
        _require_embedded(value.get("url") if isinstance(value, dict) else value, name)
    if part.get("uuid") is not None:
        # It names media that workers remember, whoever sent them.
        raise InvalidRequest("a content part must not refer to earlier media by uuid", param="uuid")


def _require_embedded(url: object, name: str) -> None:
    if isinstance(url, str) and url[: len(_EMBEDDED)].lower() != _EMBEDDED:
        raise InvalidRequest(f"{name} must be a data: URL: nothing is fetched for a request", param=name)


def _objects(root: object) -> Iterator[dict[str, Any]]:
    """Yield all objects below `root`, except the arguments of tool calls."""
    nodes: list[Any] = [root]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            yield node
            is_tool_call = node.get("type") == "tool_use"
            nodes += [value for name, value in node.items() if not (is_tool_call and name == "input")]
        elif isinstance(node, list):
            nodes += node
