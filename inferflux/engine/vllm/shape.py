"""Complete answers in the shape that OpenAI's description gives them.

vLLM writes a null into every field that it knows and has nothing for, also where a list or an object must be, and
leaves out a few that must be there. Clients that check what they read refuse both. `tests/api` measures it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

Node = dict[str, Any]


def shaped(body: bytes) -> bytes:
    """Put an answer into shape; what is none of OpenAI's stays as it is."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    shape = _SHAPES.get(str(document.get("object"))) if isinstance(document, dict) else None
    if shape is None:
        return body
    shape(document)
    return orjson.dumps(document)


def _chat(answer: Node) -> None:
    _without_nulls(answer, "system_fingerprint")
    _usage(answer)
    for choice in answer["choices"]:
        _without_nulls(choice["message"], "annotations", "function_call")
        if choice.get("logprobs") is not None:
            choice["logprobs"].setdefault("refusal", None)


def _completion(answer: Node) -> None:
    _without_nulls(answer, "system_fingerprint")
    _usage(answer)


def _response(answer: Node) -> None:
    answer.setdefault("error", None)
    _without_nulls(answer, "text", "user")
    for item in answer["output"]:
        for part in item.get("content") or ():
            if part.get("type") == "output_text" and part.get("logprobs") is None:
                part["logprobs"] = []


def _usage(answer: Node) -> None:
    if answer.get("usage") is not None:
        _without_nulls(answer["usage"], "completion_tokens_details", "prompt_tokens_details")


def _without_nulls(node: Node, *names: str) -> None:
    for name in names:
        if name in node and node[name] is None:
            del node[name]


_SHAPES: dict[str, Callable[[Node], None]] = {
    "chat.completion": _chat,
    "text_completion": _completion,
    "response": _response,
}
