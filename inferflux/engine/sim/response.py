"""From what the scheduler emits to the frames of one call's response."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from inferflux.engine.resume import Withheld
from inferflux.engine.sim.api import Plan
from inferflux.engine.sim.api.call import Outcome, answer
from inferflux.engine.sim.sequence import Emitted, Event, Job
from inferflux.types import ChoiceTokens, End, Frame, HttpHead, KvReport, Usage

SSE_HEAD = HttpHead(200, (("content-type", "text/event-stream; charset=utf-8"),))


class Inbox:
    """What the scheduler has for one call. `put` never blocks."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._is_filled = asyncio.Event()

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._is_filled.set()

    async def take(self) -> list[Event]:
        """Wait for something and take all of it. Raises the first exception in it."""
        await self._is_filled.wait()
        events = self.drain()
        for event in events:
            if isinstance(event, Exception):
                raise event
        return events

    def drain(self) -> list[Event]:
        """Take all there is, without waiting."""
        self._is_filled.clear()
        events = list(self._events)
        self._events.clear()
        return events


class Response:
    """Builds the frames: one event for the opening, for each part and for the closing.

    A response that does not stream is one event, the last frame. `num_events`: how many the client has.
    """

    def __init__(self, plan: Plan, jobs: Sequence[Job], num_events: int = 0) -> None:
        self._plan = plan
        self._jobs = jobs
        self._choices = [choice for job in jobs for choice in job.choices]
        self._texts = [""] * len(self._choices)
        self._stops: list[str | None] = [None] * len(self._choices)
        self._finish_reasons = [""] * len(self._choices)
        self._held: list[ChoiceTokens] = []
        self._withheld = Withheld(num_events)
        self._needs_opening = True
        self.is_complete = False

    def beginning(self, reports: tuple[KvReport, ...], replayed: Sequence[Event]) -> Iterator[Frame]:
        """What can be said before anything is generated; the tokens of what is replayed are not told again."""
        if self._plan.stream:
            yield Frame(head=SSE_HEAD, kv=reports)
        elif reports:
            yield Frame(kv=reports)
        yield from self._told(replace(frame, choices=()) for frame in self._frames(replayed))
        self._held.clear()

    def frames(self, events: Sequence[Event]) -> Iterator[Frame]:
        """The next parts of the response, if there is anything to say yet."""
        return self._told(self._frames(events))

    def _told(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        return (told for frame in frames if (told := self._withheld.remainder(frame)))

    def _frames(self, events: Sequence[Event]) -> Iterator[Frame]:
        parts = [event for event in events if isinstance(event, Emitted)]
        reports = tuple(event for event in events if isinstance(event, KvReport))
        for part in parts:
            self._texts[part.choice] += part.text
            self._stops[part.choice] = part.stop
            self._finish_reasons[part.choice] = part.finish_reason
        self.is_complete = all(self._finish_reasons)
        if reports:
            yield Frame(kv=reports)
        yield from self._streamed(parts) if self._plan.stream else self._whole(parts)

    def _streamed(self, parts: Sequence[Emitted]) -> Iterator[Frame]:
        renderer = self._plan.renderer
        if parts and self._needs_opening:
            self._needs_opening = False
            if opening := renderer.opening(len(self._choices)):
                yield Frame(data=opening)
        for part in parts:
            yield Frame(data=renderer.chunk(part), choices=_tokens(part))
        if self.is_complete:
            yield Frame(data=renderer.closing(self._outcomes(), self._usage()), end=self._end())

    def _whole(self, parts: Sequence[Emitted]) -> Iterator[Frame]:
        if not self._plan.is_pooling:
            self._held += [tokens for part in parts for tokens in _tokens(part)]
        if self.is_complete:
            whole = answer(self._plan.renderer.document(self._outcomes(), self._usage()))
            yield Frame(whole.head, whole.body, tuple(self._held), end=self._end())

    def _end(self) -> End:
        return End("" if self._plan.is_pooling else self._finish_reasons[0], self._usage())

    def _outcomes(self) -> list[Outcome]:
        ends = zip(self._texts, self._finish_reasons, self._stops, strict=True)
        return [Outcome(i, text, finish_reason, stop) for i, (text, finish_reason, stop) in enumerate(ends)]

    def _usage(self) -> Usage:
        num_output = 0 if self._plan.is_pooling else sum(choice.num_output for choice in self._choices)
        return Usage(sum(len(job.prompt) for job in self._jobs), num_output, sum(job.num_cached for job in self._jobs))


def _tokens(part: Emitted) -> tuple[ChoiceTokens, ...]:
    return (ChoiceTokens(part.choice, part.token_ids, part.text),)
