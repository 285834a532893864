"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inferflux.engine.sim.api.call import (
    DONE,
    UNSUPPORTED,
    Fields,
    Outcome,
    Plan,
    Renderer,
    chat_prompt,
    event,
    openai_usage,
    sampling,
)
from inferflux.engine.sim.sequence import Emitted
from inferflux.types import RequestContext, Usage


class ChatRenderer(Renderer):
    """chat.completion and its chunks."""

    prefix = "chatcmpl-"

    def __init__(self, model: str, context: RequestContext, *, with_usage: bool) -> None:
        super().__init__(model, context)
        self._with_usage = with_usage

    def opening(self, num_choices: int) -> bytes:
        delta = {"role": "assistant", "content": ""}
        choices = [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(num_choices)]
        return b"".join(self._chunk([choice]) for choice in choices)

    def chunk(self, part: Emitted) -> bytes:
        choice = {
            "index": part.choice,
            "delta": {"content": part.text},
            "logprobs": None,
            "finish_reason": part.finish_reason or None,
        }
        if part.finish_reason:
            choice["stop_reason"] = part.stop
        return self._chunk([choice])

    def closing(self, outcomes: Sequence[Outcome], usage: Usage) -> bytes:
        return (self._chunk([], usage=openai_usage(usage)) if self._with_usage else b"") + DONE

    def document(self, outcomes: Sequence[Outcome], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": o.index,
                "message": {"role": "assistant", "content": o.text, "refusal": None},
                "logprobs": None,
                "finish_reason": o.finish_reason,
                "stop_reason": o.stop,
            }
            for o in outcomes
        ]
        head = {"id": self.id, "object": "chat.completion", "created": self.created, "model": self.model}
        return {**head, "choices": choices, "usage": openai_usage(usage)}

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        return event({**head, "choices": choices, **more})


def plan(fields: Fields, model: str, context: RequestContext) -> Plan:
    """Read a chat call."""
    fields.refuse(*UNSUPPORTED)
    prompt = chat_prompt(fields.get("messages"))
    name = "max_completion_tokens" if fields.has("max_completion_tokens") else "max_tokens"
    renderer = ChatRenderer(model, context, with_usage=fields.object("stream_options").flag("include_usage"))
    return Plan((prompt,), sampling(fields, name), fields.flag("stream"), renderer)
