"""Tool calls in the three dialects: how to ask for them, and where they are in an answer, whole or streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

MAX_TOKENS = 300


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that may be called."""

    name: str
    about: str
    parameters: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call; `arguments` is JSON in a string."""

    name: str
    arguments: str


class Chat:
    """OpenAI's chat completions."""

    path = "/v1/chat/completions"

    def body(self, prompt: str, tools: Sequence[Tool], choice: str) -> dict[str, Any]:
        named = {"type": "function", "function": {"name": choice}}
        return {
            "messages": [{"role": "user", "content": prompt}],
            "tools": [
                {"type": "function", "function": {"name": t.name, "description": t.about, "parameters": t.parameters}}
                for t in tools
            ],
            "tool_choice": choice if choice in ("auto", "required") else named,
            "max_tokens": MAX_TOKENS,
        }

    def calls(self, answer: dict[str, Any]) -> list[ToolCall]:
        (choice,) = answer["choices"]
        calls = choice["message"].get("tool_calls") or ()
        return [ToolCall(c["function"]["name"], c["function"]["arguments"]) for c in calls]

    def streamed(self, events: Sequence[dict[str, Any]]) -> list[ToolCall]:
        parts: dict[int, list[str]] = {}
        for call in (c for e in events for choice in e["choices"] for c in choice["delta"].get("tool_calls") or ()):
            part = parts.setdefault(call["index"], ["", ""])
            part[0] += call["function"].get("name") or ""
            part[1] += call["function"].get("arguments") or ""
        return [ToolCall(*part) for part in parts.values()]

    def is_cut(self, answer: dict[str, Any]) -> bool:
        return any(choice["finish_reason"] == "length" for choice in answer["choices"])


class Responses:
    """OpenAI's responses."""

    path = "/v1/responses"

    def body(self, prompt: str, tools: Sequence[Tool], choice: str) -> dict[str, Any]:
        return {
            "input": prompt,
            "tools": [
                {"type": "function", "name": t.name, "description": t.about, "parameters": t.parameters} for t in tools
            ],
            "tool_choice": choice if choice in ("auto", "required") else {"type": "function", "name": choice},
            "max_output_tokens": MAX_TOKENS,
        }

    def calls(self, answer: dict[str, Any]) -> list[ToolCall]:
        return [ToolCall(i["name"], i["arguments"]) for i in answer["output"] if i["type"] == "function_call"]

    def streamed(self, events: Sequence[dict[str, Any]]) -> list[ToolCall]:
        done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
        return self.calls({"output": done})

    def is_cut(self, answer: dict[str, Any]) -> bool:
        return bool(answer.get("response", answer).get("status") == "incomplete")


class Messages:
    """Anthropic's messages."""

    path = "/v1/messages"

    def body(self, prompt: str, tools: Sequence[Tool], choice: str) -> dict[str, Any]:
        choices = {"auto": {"type": "auto"}, "required": {"type": "any"}}
        return {
            "messages": [{"role": "user", "content": prompt}],
            "tools": [{"name": t.name, "description": t.about, "input_schema": t.parameters} for t in tools],
            "tool_choice": choices.get(choice, {"type": "tool", "name": choice}),
            "max_tokens": MAX_TOKENS,
        }

    def calls(self, answer: dict[str, Any]) -> list[ToolCall]:
        uses = (part for part in answer["content"] if part["type"] == "tool_use")
        return [ToolCall(use["name"], json.dumps(use["input"])) for use in uses]

    def streamed(self, events: Sequence[dict[str, Any]]) -> list[ToolCall]:
        parts: dict[int, list[str]] = {}
        for event in events:
            if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use":
                parts[event["index"]] = [event["content_block"]["name"], ""]
            elif event["type"] == "content_block_delta" and event["delta"]["type"] == "input_json_delta":
                parts[event["index"]][1] += event["delta"]["partial_json"]
        return [ToolCall(*part) for part in parts.values()]

    def is_cut(self, answer: dict[str, Any]) -> bool:
        return (answer.get("delta") or answer).get("stop_reason") == "max_tokens"


Dialect = Chat | Responses | Messages
DIALECTS: dict[str, Dialect] = {"chat": Chat(), "responses": Responses(), "messages": Messages()}


def events_of(text: str) -> Iterator[dict[str, Any]]:
    """Yield the documents of an event stream."""
    for line in text.splitlines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
