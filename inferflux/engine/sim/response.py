"""From what the scheduler emits to the frames of one call's response."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from inferflux.engine.sim import tokenizer
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
        self._is_filled.clear()
        events = list(self._events)
        self._events.clear()
        for event in events:
            if isinstance(event, Exception):
                raise event
        return events


class Response:
    """Builds the frames. A response that does not stream is one frame, the last."""

    def __init__(self, plan: Plan, jobs: Sequence[Job]) -> None:
        self._plan = plan
        self._jobs = jobs
        self._choices = [choice for job in jobs for choice in job.choices]
        delivered = [choice.tokens[len(job.prompt) :] for job in jobs for choice in job.choices]
        self._texts = [tokenizer.decode(ids) for ids in delivered]
        self._stops: list[str | None] = [None] * len(self._choices)
        self._held: list[ChoiceTokens] = []
        self._needs_opening = not any(delivered)
        self.is_complete = False

    def opening(self, reports: Sequence[KvReport]) -> Frame | None:
        """What can be said before anything is generated."""
        if not self._plan.stream:
            return Frame(kv=tuple(reports)) if reports else None
        return Frame(head=SSE_HEAD, kv=tuple(reports))

    def frame(self, events: Sequence[Event]) -> Frame | None:
        """The next part of the response; None when there is nothing to say yet."""
        parts = [event for event in events if isinstance(event, Emitted)]
        reports = tuple(event for event in events if isinstance(event, KvReport))
        for part in parts:
            self._texts[part.choice] += part.text
            self._stops[part.choice] = part.stop
        self.is_complete = all(choice.finish_reason for choice in self._choices)
        return self._streamed(parts, reports) if self._plan.stream else self._whole(parts, reports)

    def _streamed(self, parts: Sequence[Emitted], reports: tuple[KvReport, ...]) -> Frame:
        renderer, data = self._plan.renderer, []
        if parts and self._needs_opening:
            self._needs_opening = False
            data.append(renderer.opening(len(self._choices)))
        data += [renderer.chunk(part) for part in parts]
        if self.is_complete:
            data.append(renderer.closing(self._outcomes(), self._usage()))
        return Frame(None, b"".join(data), _tokens(parts), reports, self._end())

    def _whole(self, parts: Sequence[Emitted], reports: tuple[KvReport, ...]) -> Frame | None:
        self._held += _tokens(parts)
        if not self.is_complete:
            return Frame(kv=reports) if reports else None
        whole = answer(self._plan.renderer.document(self._outcomes(), self._usage()))
        return Frame(whole.head, whole.body, tuple(self._held), reports, self._end())

    def _end(self) -> End | None:
        return End(self._choices[0].finish_reason, self._usage()) if self.is_complete else None

    def _outcomes(self) -> list[Outcome]:
        return [
            Outcome(choice.index, self._texts[choice.index], choice.finish_reason, self._stops[choice.index])
            for choice in self._choices
        ]

    def _usage(self) -> Usage:
        num_output = sum(choice.num_output for choice in self._choices)
        return Usage(sum(len(job.prompt) for job in self._jobs), num_output, sum(job.num_cached for job in self._jobs))


def _tokens(parts: Sequence[Emitted]) -> tuple[ChoiceTokens, ...]:
    return tuple(ChoiceTokens(part.choice, part.token_ids, part.text) for part in parts)
