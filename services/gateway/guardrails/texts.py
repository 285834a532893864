"""Where the text is in the JSON of requests, answers and events: every string, but for what is no text.

Nothing here knows the fields of a dialect by name, so a field that an application learns tomorrow is looked at too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

Path = tuple[str | int, ...]
# Of the request as a whole; none of it gets into a prompt.
_ADDRESSING = frozenset(
    ("model", "user", "request_id", "safety_identifier", "prompt_cache_key", "metadata", "service_tier", "cache_salt")
)
# Names of things, as long as they look like names.
_NAMES = frozenset(
    ("role", "type", "id", "object", "status", "finish_reason", "stop_reason", "call_id", "item_id", "tool_call_id",
     "model", "system_fingerprint", "service_tier", "phase")
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9_.:/@+-]{0,128}")
_MEDIA = frozenset(("image_url", "input_audio", "audio_url", "video_url", "source", "file", "url", "data"))
_ABOUT_TOKENS = frozenset(("logprobs", "prompt_logprobs", "top_logprobs", "token_ids", "prompt_token_ids"))


class Leaf(NamedTuple):
    """One string and its place, where it can be replaced."""

    path: Path
    parent: Any
    key: Any

    @property
    def text(self) -> str:
        return str(self.parent[self.key])

    def replace(self, text: str) -> None:
        self.parent[self.key] = text


def of_request(document: dict[str, Any]) -> Iterator[Leaf]:
    """Yield what a client says to the model."""
    for key in document:
        if key not in _ADDRESSING:
            yield from _leaves((key,), document, key)


def of_answer(document: dict[str, Any]) -> Iterator[Leaf]:
    """Yield what a model says to the client. The tokens of a text are not said again; see `forget_tokens`."""
    for key in document:
        if key not in _ADDRESSING:
            yield from _leaves((key,), document, key)


def has_token_ids(document: dict[str, Any], fields: tuple[str, ...]) -> str | None:
    """Return the field that holds a prompt as something else than text, if there is one."""
    for field in fields:
        value = document.get(field)
        first = value[0] if isinstance(value, list) and value else None
        while isinstance(first, list) and first:
            first = first[0]
        if isinstance(first, int) or (field == "prompt_embeds" and value is not None):
            return field
    return None


def forget_tokens(node: Any) -> None:
    """Take away what repeats a text token by token: the text has been changed."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if key in _ABOUT_TOKENS:
            node[key] = None
        elif isinstance(value, (dict, list)):
            forget_tokens(value)


def _leaves(path: Path, parent: Any, key: Any) -> Iterator[Leaf]:
    value = parent[key]
    if isinstance(value, str):
        if not _is_no_text(key, value, parent):
            yield Leaf(path, parent, key)
    elif isinstance(value, dict):
        for name in value:
            if name not in _ABOUT_TOKENS:
                yield from _leaves((*path, name), value, name)
    elif isinstance(value, list) and value and not isinstance(value[0], (int, float)):
        for place, item in enumerate(value):
            number = item.get("index", place) if isinstance(item, dict) else place
            yield from _leaves((*path, number), value, place)


def _is_no_text(key: Any, value: str, parent: Any) -> bool:
    if key in _NAMES:
        return _NAME.fullmatch(value) is not None
    if key in _MEDIA:
        is_base64 = isinstance(parent, dict) and parent.get("type") == "base64"
        return value.startswith("data:") or is_base64 or (key == "data" and "format" in parent)
    return key in {"embedding", "signature", "encrypted_content"}
