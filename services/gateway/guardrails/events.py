"""What the events of streams say, by dialect, and how such a stream ends when it may not go on.

One reader for each shape of stream. A delta goes on with a text (its channel), everything else in an event is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from services.gateway.guardrails import texts
from services.gateway.guardrails.texts import Leaf

Group = int
Channel = tuple[Group, tuple[Any, ...]]
DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class Said:
    """What one event says. `ended`: groups of channels that it ends."""

    deltas: list[tuple[Channel, Leaf]] = field(default_factory=list)
    wholes: list[Leaf] = field(default_factory=list)
    ended: list[Group] = field(default_factory=list)


Read = Callable[[dict[str, Any]], Said]


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape of stream. `end` makes its last events, from all those that were shown before."""

    read: Read
    end: Callable[[Progress], bytes]


class Progress:
    """What the client knows of a stream's structure: enough to end it properly."""

    def __init__(self) -> None:
        self.first: dict[str, Any] = {}
        self.num_events = 0
        self.open: dict[Group, None] = {}

    def show(self, document: dict[str, Any], said: Said) -> None:
        """See an event on its way to the client."""
        self.first = self.first or document
        self.num_events += 1
        groups = _groups(document)
        self.open.update(dict.fromkeys(groups))
        for group in said.ended:
            self.open.pop(group, None)


def _groups(document: dict[str, Any]) -> Iterator[Group]:
    for choice in document.get("choices") or ():
        yield choice.get("index", 0)
    if document.get("type") == "content_block_start":
        yield document.get("index", 0)


# --- chat completions and completions


def read_choices(document: dict[str, Any]) -> Said:
    """Read an event with `choices`: `delta` of a chat, `text` of a completion."""
    said = Said()
    for leaf in texts.of_answer(document):
        path = leaf.path
        if path[0] == "choices" and len(path) > 2 and path[2] in {"delta", "text"}:
            said.deltas.append(((_number(path[1]), path[2:]), leaf))
        else:
            said.wholes.append(leaf)
    for choice in document.get("choices") or ():
        if choice.get("finish_reason") is not None:
            said.ended.append(choice.get("index", 0))
    return said


def end_choices(progress: Progress) -> bytes:
    """End all choices that have not ended with `content_filter`."""
    first = progress.first
    is_chat = first.get("object") == "chat.completion.chunk"
    document: dict[str, Any] = {key: first[key] for key in ("id", "object", "created", "model") if key in first}
    said: dict[str, Any] = {"delta": {}} if is_chat else {"text": ""}
    document["choices"] = [
        {"index": index, **said, "logprobs": None, "finish_reason": "content_filter"} for index in progress.open or (0,)
    ]
    return b"data: " + orjson.dumps(document) + b"\n\n" + DONE


# --- responses


def read_response(document: dict[str, Any]) -> Said:
    """Read an event of a response: those named `.delta` go on with a part of an output item, `.done` ends it."""
    said, kind = Said(), str(document.get("type", ""))
    group = _number(document.get("output_index", -1))
    part = (kind, document.get("content_index"), document.get("summary_index"))
    for leaf in texts.of_answer(document):
        if leaf.path[0] == "delta" and kind.endswith(".delta"):
            said.deltas.append(((group, (*part, *leaf.path)), leaf))
        else:
            said.wholes.append(leaf)
    if kind.endswith(".done"):
        said.ended.append(group)
    return said


def end_response(progress: Progress) -> bytes:
    """End a response as incomplete."""
    response = progress.first.get("response") or {}
    response |= {"status": "incomplete", "incomplete_details": {"reason": "content_filter"}, "output": []}
    return _event({"type": "response.incomplete", "sequence_number": progress.num_events, "response": response})


# --- messages


def read_message(document: dict[str, Any]) -> Said:
    """Read an event of a message."""
    said, kind = Said(), document.get("type")
    group = _number(document.get("index", -1))
    for leaf in texts.of_answer(document):
        if kind == "content_block_delta" and leaf.path[0] == "delta":
            said.deltas.append(((group, leaf.path), leaf))
        else:
            said.wholes.append(leaf)
    if kind == "content_block_stop":
        said.ended.append(group)
    return said


def end_message(progress: Progress) -> bytes:
    """End a message as refused."""
    stops = [_event({"type": "content_block_stop", "index": index}) for index in progress.open]
    refusal = {"stop_reason": "refusal", "stop_sequence": None}
    usage = {"output_tokens": 0}
    last = [_event({"type": "message_delta", "delta": refusal, "usage": usage}), _event({"type": "message_stop"})]
    return b"".join((*stops, *last))


def _event(document: dict[str, Any]) -> bytes:
    return b"event: " + str(document["type"]).encode() + b"\ndata: " + orjson.dumps(document) + b"\n\n"


def _number(value: object) -> int:
    return value if isinstance(value, int) else -1


CHOICES = Shape(read_choices, end_choices)
RESPONSE = Shape(read_response, end_response)
MESSAGE = Shape(read_message, end_message)
