"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inferflux.engine.sim import tokenizer
from inferflux.engine.sim.api.call import (
    DONE,
    UNSUPPORTED,
    BadCall,
    Fields,
    Outcome,
    Plan,
    Renderer,
    event,
    openai_usage,
    sampling,
)
from inferflux.engine.sim.sequence import Emitted
from inferflux.types import RequestContext, Usage

DEFAULT_MAX_TOKENS = 16  # OpenAI's API reference


class CompletionRenderer(Renderer):
    """text_completion and its chunks."""

    def __init__(self, model: str, context: RequestContext, *, with_usage: bool) -> None:
        super().__init__(model, context)
        self._with_usage = with_usage

    def chunk(self, part: Emitted) -> bytes:
        return self._event([_choice(part.choice, part.text, part.finish_reason or None, part.stop)])

    def closing(self, outcomes: Sequence[Outcome], usage: Usage) -> bytes:
        return (self._event([], usage=openai_usage(usage)) if self._with_usage else b"") + DONE

    def document(self, outcomes: Sequence[Outcome], usage: Usage) -> dict[str, Any]:
        choices = [_choice(o.index, o.text, o.finish_reason, o.stop) for o in outcomes]
        return {**self._head(), "choices": choices, "usage": openai_usage(usage)}

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return event({**self._head(), "choices": choices, **more})

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}


def _choice(index: int, text: str, finish_reason: str | None, stop: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason, "stop_reason": stop}


def plan(fields: Fields, model: str, context: RequestContext) -> Plan:
    """Read a completion call; each of its prompts becomes a job of its own."""
    fields.refuse(*UNSUPPORTED)
    prompts = _prompts(fields.get("prompt"))
    renderer = CompletionRenderer(model, context, with_usage=fields.object("stream_options").flag("include_usage"))
    how = sampling(fields, "max_tokens", default_max_tokens=DEFAULT_MAX_TOKENS)
    return Plan(prompts, how, fields.flag("stream"), renderer)


def _prompts(value: Any) -> tuple[tuple[int, ...], ...]:
    """A string, ids, or a list of either."""
    many = value if isinstance(value, list) and not _is_ids(value) else [value]
    prompts = tuple(_prompt(item) for item in many)
    if not prompts or not all(prompts):
        raise BadCall("each prompt must have at least one token", param="prompt")
    return prompts


def _prompt(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        return tuple(tokenizer.encode(value))
    if _is_ids(value) and all(0 <= token_id < tokenizer.VOCABULARY_SIZE for token_id in value):
        return tuple(value)
    raise BadCall("prompt must be a string, a list of token ids, or a list of these", param="prompt")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
