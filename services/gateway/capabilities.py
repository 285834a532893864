"""What a request asks of a model, and whether the model can do it: known from the envelope, before any work.

A model whose record names no capabilities is asked for anything; its worker's application then answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from inferflux.errors import CapabilityNotSupported
from inferflux.models.capabilities import Capability
from inferflux.telemetry import metrics
from services.gateway.views import Model

_SCORE = ("/v1/score", "/score", "/v1/rerank", "/v2/rerank", "/rerank")
_BY_PATH = {
    "/v1/chat/completions": Capability.CHAT,
    "/v1/chat/completions/render": Capability.CHAT,
    "/v1/completions": Capability.COMPLETION,
    "/v1/completions/render": Capability.COMPLETION,
    "/v1/responses": Capability.RESPONSES,
    "/v1/responses/render": Capability.RESPONSES,
    "/v1/messages": Capability.MESSAGES,
    "/v1/messages/render": Capability.MESSAGES,
    "/v1/messages/count_tokens": Capability.MESSAGES,
    **dict.fromkeys(("/v1/embeddings", "/v2/embed", "/pooling"), Capability.EMBEDDINGS),
    **dict.fromkeys(_SCORE, Capability.SCORE),
    "/classify": Capability.CLASSIFY,
}
_IMAGE_PARTS = frozenset({"image_url", "input_image", "image"})
_OUTPUT_LIMITS = ("max_completion_tokens", "max_output_tokens", "max_tokens")
MAX_CONTEXT = "max_context"


@dataclass(frozen=True, slots=True)
class Wants:
    """What a body asks for beyond its path: the field that asks, by capability; the longest output, 0 = not said."""

    fields: Mapping[Capability, str] = field(default_factory=dict)
    num_output_tokens: int = 0


def read(document: Mapping[str, Any]) -> Wants:
    """Find what a body asks for. What is malformed asks for nothing: the application says what is wrong with it."""
    limits = (document.get(name) for name in _OUTPUT_LIMITS)
    return Wants(dict(_wanted(document)), max((limit for limit in limits if type(limit) is int), default=0))


def require(model: Model | None, path: str, wants: Wants) -> None:
    """Refuse a request that the model can't serve. Raises CapabilityNotSupported."""
    if model is None:
        return
    if model.capabilities:
        needed = {_BY_PATH[path]: ""} if path in _BY_PATH else {}
        for capability, name in (*needed.items(), *wants.fields.items()):
            if capability not in model.capabilities:
                can = ", ".join(model.capabilities)
                raise _refused(capability, f"model {model.name!r} does not do {capability}; it does {can}", name)
    if 0 < model.max_model_len < wants.num_output_tokens:
        asked = f"{wants.num_output_tokens} output tokens were asked for"
        raise _refused(MAX_CONTEXT, f"{asked}, model {model.name!r} holds {model.max_model_len} with its prompt", "")


def _refused(capability: str, message: str, name: str) -> CapabilityNotSupported:
    metrics.CAPABILITY_REJECTED.labels(capability).inc()
    return CapabilityNotSupported(message, param=name or None)


def _wanted(document: Mapping[str, Any]) -> Iterator[tuple[Capability, str]]:
    for name in ("tools", "functions"):
        if document.get(name):
            yield Capability.TOOLS, name
    for name in ("logprobs", "prompt_logprobs"):  # 0 asks for the sampled token's
        if (value := document.get(name)) is not None and value is not False:
            yield Capability.LOGPROBS, name
    if name := _schema_field(document):
        yield Capability.JSON_SCHEMA, name
    for name in ("messages", "input"):
        if _has_image(document.get(name)):
            yield Capability.VISION, name


def _schema_field(document: Mapping[str, Any]) -> str:
    text = document.get("text")
    of_text = text.get("format") if _is_map(text) else None
    for name, value in (("response_format", document.get("response_format")), ("text", of_text)):
        if _is_map(value) and value.get("type") not in (None, "text"):
            return name
    return "structured_outputs" if document.get("structured_outputs") else ""


def _has_image(messages: object) -> bool:
    """Say whether any part of any message is an image."""
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if _is_map(message) else None
        if isinstance(content, list) and any(_is_map(p) and _is_image(p.get("type")) for p in content):
            return True
    return False


def _is_image(kind: object) -> bool:
    return isinstance(kind, str) and kind in _IMAGE_PARTS


def _is_map(value: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)
