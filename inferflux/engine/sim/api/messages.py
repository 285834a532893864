"""POST /v1/messages and /v1/messages/count_tokens, Anthropic's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inferflux.engine.sim.api.call import Fields, Outcome, Plan, Renderer, chat_prompt, content, event, sampling
from inferflux.engine.sim.sequence import Emitted
from inferflux.types import RequestContext, Usage


class MessagesRenderer(Renderer):
    """A message and its events."""

    prefix = "msg_"

    def __init__(self, model: str, context: RequestContext, num_prompt_tokens: int) -> None:
        super().__init__(model, context)
        self._num_prompt_tokens = num_prompt_tokens

    def opening(self, num_choices: int) -> bytes:
        message = self._message([], None, None, Usage(self._num_prompt_tokens, 0))
        block = {"index": 0, "content_block": {"type": "text", "text": ""}}
        return _event("message_start", message=message) + _event("content_block_start", **block)

    def chunk(self, part: Emitted) -> bytes:
        return _event("content_block_delta", index=0, delta={"type": "text_delta", "text": part.text})

    def closing(self, outcomes: Sequence[Outcome], usage: Usage) -> bytes:
        delta = {"stop_reason": _stop_reason(outcomes[0]), "stop_sequence": outcomes[0].stop}
        return (
            _event("content_block_stop", index=0)
            + _event("message_delta", delta=delta, usage=_usage(usage))
            + _event("message_stop")
        )

    def document(self, outcomes: Sequence[Outcome], usage: Usage) -> dict[str, Any]:
        (outcome,) = outcomes
        parts = [{"type": "text", "text": outcome.text}]
        return self._message(parts, _stop_reason(outcome), outcome.stop, usage)

    def _message(
        self, parts: list[dict[str, str]], reason: str | None, stop: str | None, usage: Usage
    ) -> dict[str, Any]:
        head = {"id": self.id, "type": "message", "role": "assistant", "content": parts, "model": self.model}
        return {**head, "stop_reason": reason, "stop_sequence": stop, "usage": _usage(usage)}


def _usage(usage: Usage) -> dict[str, int]:
    return {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}


def _stop_reason(outcome: Outcome) -> str:
    if outcome.finish_reason == "length":
        return "max_tokens"
    return "end_turn" if outcome.stop is None else "stop_sequence"


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


def prompt(fields: Fields) -> tuple[int, ...]:
    """The prompt of a message call."""
    fields.refuse("tools", "thinking")
    return chat_prompt(fields.get("messages"), content(fields.get("system"), "system"))


def plan(fields: Fields, model: str, context: RequestContext) -> Plan:
    """Read a message call."""
    ids = prompt(fields)
    how = sampling(fields, "max_tokens", stop="stop_sequences")
    return Plan((ids,), how, fields.flag("stream"), MessagesRenderer(model, context, len(ids)))
