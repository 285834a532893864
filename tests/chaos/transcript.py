"""What a response said, whatever its endpoint: text, ends and usage, without ids and times: two can be equal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]


@dataclass(slots=True)
class Transcript:
    """One response. `said`: text by where it belongs; `ends`: why each choice ended; `usage`: prompt and output tokens.

    `flaws`: what no single stream may have, whoever wrote it: two ids, a choice that ends twice, a number left out.
    """

    said: dict[str, str] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    usage: tuple[int, int] | None = None
    is_complete: bool = False
    error: str | None = None
    flaws: list[str] = field(default_factory=list, compare=False)

    def say(self, where: str, text: str | None) -> None:
        """Add text."""
        if text:
            self.said[where] = self.said.get(where, "") + text

    def end(self, choice: int, reason: str | None) -> None:
        """End a choice."""
        if reason is not None:
            if choice in self.ends:
                self.flaws.append(f"choice {choice} ended twice")
            self.ends[choice] = reason

    def is_beginning_of(self, other: Transcript) -> bool:
        """Whether everything said here is how the other begins."""
        return all(other.said.get(where, "").startswith(text) for where, text in self.said.items())


def of_stream(data: bytes) -> Transcript:
    """Read an event stream, however far it came."""
    transcript = Transcript()
    ids: set[str] = set()
    numbers: list[int] = []
    for event in _events(data, transcript):
        _take(event, transcript)
        ids |= {str(event[key]) for key in ("id",) if event.get(key)}
        if "sequence_number" in event:
            numbers.append(event["sequence_number"])
    if len(ids) > 1:
        transcript.flaws.append(f"{len(ids)} ids in one stream")
    if numbers != list(range(len(numbers))):
        transcript.flaws.append("event numbers with a gap or a duplicate")
    return transcript


def of_document(data: bytes) -> Transcript:
    """Read a response that came in one piece."""
    transcript = Transcript(is_complete=True)
    document = json.loads(data)
    for choice in document.get("choices", ()):
        _take_choice(choice, choice.get("message") or choice, transcript)
    for item in document.get("output", ()):
        _take_parts(item.get("content", ()), transcript)
    _take_parts(document.get("content", ()), transcript)
    if reason := document.get("stop_reason") or document.get("status"):
        transcript.end(0, reason)
    _take_usage(document.get("usage"), transcript)
    return transcript


def _events(data: bytes, transcript: Transcript) -> Iterator[Event]:
    *blocks, rest = data.decode().split("\n\n")
    if rest:
        transcript.flaws.append("the stream ends inside an event")
    for block in blocks:
        if transcript.is_complete:
            transcript.flaws.append("events after the end")
        body = next((line[6:] for line in block.splitlines() if line.startswith("data: ")), "")
        if body == "[DONE]":
            transcript.is_complete = True
        elif body:
            yield json.loads(body)


def _take(event: Event, transcript: Transcript) -> None:
    if event.get("error") or event.get("type") == "error":
        error = event.get("error") or event
        transcript.error = str(error.get("code") or error.get("type"))
    for choice in event.get("choices", ()):
        _take_choice(choice, choice.get("delta") or choice, transcript)
    match event.get("type"):
        case "content_block_delta":  # Anthropic messages
            transcript.say("0.text", event["delta"].get("text"))
        case "message_delta":
            transcript.end(0, event["delta"]["stop_reason"])
            _take_usage(event.get("usage"), transcript)
        case "message_stop":
            transcript.is_complete = True
        case "response.output_text.delta":  # OpenAI responses
            transcript.say("0.text", event["delta"])
        case "response.completed" | "response.incomplete":
            transcript.end(0, event["response"]["status"])
            _take_usage(event["response"].get("usage"), transcript)
            transcript.is_complete = True
    if "choices" in event:
        _take_usage(event.get("usage"), transcript)


def _take_choice(choice: Event, said: Event, transcript: Transcript) -> None:
    i = choice["index"]
    for name in ("content", "text", "reasoning", "reasoning_content", "refusal"):
        if isinstance(said.get(name), str):
            transcript.say(f"{i}.text" if name == "content" else f"{i}.{name}", said[name])
    for call in said.get("tool_calls") or ():
        where = f"{i}.tool.{call.get('index', 0)}"
        transcript.say(f"{where}.name", call["function"].get("name"))
        transcript.say(f"{where}.arguments", call["function"].get("arguments"))
    tokens = (choice.get("logprobs") or {}).get("content") or ()
    transcript.say(f"{i}.logprobs", "".join(f"{entry['token']}|" for entry in tokens))
    reason = choice.get("finish_reason")
    if reason is not None:
        transcript.end(i, f"{reason} {choice.get('stop_reason') or ''}".strip())


def _take_parts(parts: Any, transcript: Transcript) -> None:
    for part in parts:
        transcript.say("0.text", part.get("text"))


def _take_usage(usage: Event | None, transcript: Transcript) -> None:
    if usage:
        prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
        transcript.usage = (
            usage.get("input_tokens", 0) if prompt is None else prompt,
            usage.get("output_tokens", 0) if output is None else output,
        )
