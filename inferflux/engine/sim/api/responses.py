"""POST /v1/responses, without state: no stored responses, no tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inferflux.engine.sim.api.call import BadCall, Fields, Outcome, Plan, Renderer, chat_prompt, event, sampling
from inferflux.engine.sim.sequence import Emitted, Sampling
from inferflux.types import RequestContext, Usage


class ResponsesRenderer(Renderer):
    """A response and its numbered events."""

    prefix = "resp_"

    def __init__(self, model: str, context: RequestContext, how: Sampling, instructions: str | None) -> None:
        super().__init__(model, context)
        self._how = how
        self._instructions = instructions
        self._item_id = "msg_" + context.request_id
        self._num_events = 0

    def opening(self, num_choices: int) -> bytes:
        response = self._response("in_progress", [], None)
        return b"".join(
            (
                self._event("response.created", response=response),
                self._event("response.in_progress", response=response),
                self._event("response.output_item.added", output_index=0, item=self._item("in_progress", [])),
                self._event("response.content_part.added", **self._place(), part=_part("")),
            )
        )

    def chunk(self, part: Emitted) -> bytes:
        return self._event("response.output_text.delta", **self._place(), delta=part.text, logprobs=[])

    def closing(self, outcomes: Sequence[Outcome], usage: Usage) -> bytes:
        response = self.document(outcomes, usage)
        text = outcomes[0].text
        return b"".join(
            (
                self._event("response.output_text.done", **self._place(), text=text, logprobs=[]),
                self._event("response.content_part.done", **self._place(), part=_part(text)),
                self._event("response.output_item.done", output_index=0, item=response["output"][0]),
                self._event(f"response.{response['status']}", response=response),
            )
        )

    def document(self, outcomes: Sequence[Outcome], usage: Usage) -> dict[str, Any]:
        (outcome,) = outcomes
        status = "incomplete" if outcome.finish_reason == "length" else "completed"
        return self._response(status, [self._item(status, [_part(outcome.text)])], usage)

    def _response(self, status: str, output: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": self._instructions,
            "max_output_tokens": self._how.max_tokens,
            "metadata": None,
            "model": self.model,
            "output": output,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "temperature": self._how.temperature,
            "tools": [],
            "top_p": 1.0,
            "usage": _usage(usage) if usage else None,
        }

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._num_events += 1
        return event({"type": kind, "sequence_number": self._num_events - 1, **fields}, kind)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def plan(fields: Fields, model: str, context: RequestContext) -> Plan:
    """Read a response call."""
    fields.refuse("tools", "previous_response_id", "text", "background", "conversation")
    value = fields.get("input")
    if not isinstance(value, str | list):
        raise BadCall("input must be a string or a list of messages", param="input")
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    instructions = fields.text("instructions") if fields.has("instructions") else None
    how = sampling(fields, "max_output_tokens")
    renderer = ResponsesRenderer(model, context, how, instructions)
    return Plan((chat_prompt(turns, instructions or ""),), how, fields.flag("stream"), renderer)
