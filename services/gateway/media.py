"""Nothing in a request makes a worker open a connection or a file: media come inside the body, as `data:` URLs.

What an operator has listed hosts for, and nothing else, the gateway puts there itself: `image_url`s of these hosts.

What is looked at are the content parts of all dialects: `image_url`, `audio_url`, `video_url` and `file_url`, as text
or as an object with a `url`; Anthropic's `source`; the `images` of embeddings. Schemas and arguments of tools are the
client's own and never fetched, whatever their members are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from inferflux.errors import InvalidRequest
from services.gateway import fetch

_PARTS = frozenset(("image_url", "audio_url", "video_url", "file_url", "input_image", "input_audio", "input_video"))
_LISTABLE = frozenset(("image_url",))
_EMBEDDED = "data:"
_SCHEMAS = frozenset(("tools", "functions", "tool_choice", "response_format", "structured_outputs", "text", "metadata"))
_HINTS = (b"url", b"images", b"uuid", b"\\u")
"""A body without any of these, letter for letter or escaped, has no media by address."""


def refuse_addresses(body: bytes, document: Mapping[str, Any], hosts: frozenset[str] = frozenset()) -> bool:
    """Raise InvalidRequest if a content part of the document, which is the body's, refers to media elsewhere.

    Tells whether there are images of `hosts` to fetch.
    """
    if not any(hint in body for hint in _HINTS):
        return False
    for image in document.get("images") or () if isinstance(document.get("images"), list) else ():
        _require_embedded(image, "images")
    has_listed = False
    for node in parts(document):
        is_listed = bool(hosts) and listed_address(node, hosts) is not None
        has_listed = has_listed or is_listed
        if not _PARTS.isdisjoint(node):
            _check_part(node, _LISTABLE if is_listed else frozenset())
        if isinstance(source := node.get("source"), dict) and "url" in source:
            _require_embedded(source["url"], "source.url")
    return has_listed


def listed_address(part: Mapping[str, Any], hosts: frozenset[str]) -> str | None:
    """Return the address of a content part's image if it is one of `hosts`."""
    value = part.get("image_url")
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str) or url[: len(_EMBEDDED)].lower() == _EMBEDDED:
        return None
    return url if fetch.host_of(url) in hosts else None


def parts(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield all objects of a call that may be content parts: not those of schemas and of arguments of tools."""
    return _objects({name: value for name, value in document.items() if name not in _SCHEMAS})


def _check_part(part: dict[str, Any], unchecked: frozenset[str]) -> None:
    for name in (_PARTS & part.keys()) - unchecked:
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
