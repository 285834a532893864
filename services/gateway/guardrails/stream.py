"""A stream of events, held against the rules as it comes: clean events go on byte for byte, and in their order.

An event waits until every text that it goes on with is judged up to its end. One whose text is changed is written anew;
none is left out or put together with another, so the numbers of events stay what they are.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import orjson

from inferflux.policy.guardrails import Rule
from services.gateway.guardrails import texts
from services.gateway.guardrails.detectors import Match
from services.gateway.guardrails.events import Channel, Progress, Said, Shape
from services.gateway.guardrails.screen import Screen
from services.gateway.guardrails.texts import Leaf
from services.gateway.guardrails.window import Window, edited

_END, _DATA, _ID = b"\n\n", b"data:", b"id:"


@dataclass(slots=True)
class Part:
    """A piece of a text in an event: [begin, end) of its channel."""

    leaf: Leaf
    window: Window
    begin: int
    end: int


@dataclass(slots=True)
class Event:
    """One event that waits. `document` None: it is no JSON."""

    raw: bytes
    document: dict[str, Any] | None = None
    said: Said = field(default_factory=Said)
    parts: list[Part] = field(default_factory=list)
    is_changed: bool = False

    def is_judged(self) -> bool:
        return all(part.end <= part.window.cleared for part in self.parts)


class StreamScreen:
    """One stream. `blocked`: the rule that ended it; then `feed` and `finish` say nothing more.

    `found` and `said`: the matches, and the text, of what was returned.

    `num_seen`: events with smaller ids are left out of what is returned, since the client has them.
    """

    def __init__(self, screen: Screen, shape: Shape, num_seen: int = 0) -> None:
        self.blocked: Rule | None = None
        self.found: list[Match] = []
        self.said = ""
        self._screen = screen
        self._shape = shape
        self._num_seen = num_seen
        self._id = num_seen
        self._rest = b""
        self._windows: dict[Channel, tuple[Window, int]] = {}
        self._waiting: deque[Event] = deque()
        self._progress = Progress()

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes; returns what may go to the client."""
        *blocks, self._rest = (self._rest + data).split(_END)
        for block in blocks:
            self._take(block + _END)
        return self._released()

    def finish(self) -> bytes:
        """Take the end of the stream; returns the rest."""
        if self._rest:
            self._take(self._rest)
            self._rest = b""
        self._finish_all()
        return self._released()

    def _take(self, raw: bytes) -> None:
        document = _document(raw)
        if document is None:
            if _DATA in raw:
                self._finish_all()  # the mark that ends a stream
            self._waiting.append(Event(raw))
            return
        event = Event(raw, document, self._shape.read(document))
        self._waiting.append(event)
        for channel, leaf in event.said.deltas:
            self._go_on(event, channel, leaf)
        for leaf in event.said.wholes:
            self._read_whole(event, leaf)
        for group in event.said.ended:
            self._finish_group(group)

    def _go_on(self, event: Event, channel: Channel, leaf: Leaf) -> None:
        text = leaf.text
        window, begin = self._windows.get(channel) or (self._screen.window(), 0)
        end = begin + len(text)
        self._windows[channel] = window, end
        event.parts.append(Part(leaf, window, begin, end))
        for rule in self._screen.lengths:
            if begin <= rule.max_chars < end:
                window.cut(rule)
        window.feed(text)

    def _read_whole(self, event: Event, leaf: Leaf) -> None:
        window = self._screen.window()
        window.feed(leaf.text)
        window.finish()
        if window.blocked or window.edits or window.found:
            event.parts.append(Part(leaf, window, 0, len(leaf.text)))

    def _finish_group(self, group: int) -> None:
        for channel in [channel for channel in self._windows if channel[0] == group]:
            self._windows.pop(channel)[0].finish()

    def _finish_all(self) -> None:
        for window, _ in self._windows.values():
            window.finish()
        self._windows.clear()

    def _released(self) -> bytes:
        out: list[bytes] = []
        while self._waiting and self.blocked is None:
            event = self._waiting[0]
            if not event.is_judged():
                self.blocked = next((p.window.blocked.rule for p in event.parts if p.window.blocked), None)
                break
            self._waiting.popleft()
            out.append(self._shown(event))
        if self.blocked is not None:
            out.append(self.end())
        return b"".join(out)

    def end(self) -> bytes:
        """End the stream before its time; returns its last events."""
        self._waiting.clear()
        self._windows.clear()
        return self._shape.end(self._progress)

    def _shown(self, event: Event) -> bytes:
        for part in event.parts:
            self._edit(event, part)
        self.said += "".join(leaf.text for _, leaf in event.said.deltas)
        if event.document is not None:
            self._progress.show(event.document, event.said)
        if self._is_seen(event.raw):
            return b""
        return _rewritten(event) if event.is_changed else event.raw

    def _edit(self, event: Event, part: Part) -> None:
        window = part.window
        self.found += window.found
        window.found.clear()
        before = part.leaf.text
        after = edited(before, window.edits, part.begin)
        while window.edits and window.edits[0].end <= part.end:
            window.edits.pop(0)
        if after != before:
            part.leaf.replace(after)
            event.is_changed = True

    def _is_seen(self, raw: bytes) -> bool:
        """Tell whether the client has an event: one without an id belongs to the one before."""
        if raw.startswith(_ID):
            self._id = int(raw[len(_ID) : raw.index(b"\n")])
        return self._id < self._num_seen


def _document(raw: bytes) -> dict[str, Any] | None:
    data = b"\n".join(line[len(_DATA) :] for line in raw.split(b"\n") if line.startswith(_DATA))
    try:
        document = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return document if isinstance(document, dict) else None


def _rewritten(event: Event) -> bytes:
    texts.forget_tokens(event.document)
    lines = [line for line in event.raw.split(b"\n") if line and not line.startswith(_DATA)]
    return b"\n".join((*lines, b"data: " + orjson.dumps(event.document))) + _END
