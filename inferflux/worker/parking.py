"""What is known of each request while it runs and for a moment after: enough to go on with it from any gateway.

A client that lost its connection, or its gateway, comes back within seconds or not at all.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field, replace

from inferflux.errors import NotFound
from inferflux.journal import Journal
from inferflux.types import ChoiceTokens, Frame, RequestContext
from inferflux.worker.answering import DecodeRequest

PARK_S = 5.0
"""How long a request is known after its end."""
MAX_PARKED_BYTES = 64 << 20
"""Most memory for requests that have ended; more forgets the oldest."""


@dataclass(slots=True)
class Record:
    """One request and the tokens it has. `deadline_at`, `ended_at` (0: it runs): in the loop's time."""

    request: DecodeRequest
    deadline_at: float | None
    journal: Journal = field(default_factory=Journal)
    ended_at: float = 0.0

    @property
    def num_bytes(self) -> int:
        """About what it takes in memory."""
        return len(self.request.call.body) + self.journal.num_bytes

    @property
    def context(self) -> RequestContext:
        """The request's context with the time that is left now."""
        if self.deadline_at is None:
            return self.request.context
        time_left_s = max(0.0, self.deadline_at - asyncio.get_running_loop().time())
        return replace(self.request.context, time_left_s=time_left_s)

    @property
    def tokens(self) -> list[ChoiceTokens]:
        """All tokens, as they were posted."""
        return [ChoiceTokens(index, tuple(token_ids)) for index, token_ids in self.journal.groups()]

    def take(self, frame: Frame) -> None:
        """See a frame on its way to the gateway."""
        for choice in frame.choices:
            self.journal.take(choice.index, choice.token_ids)


class ParkingLot:
    """Records by request id."""

    def __init__(self) -> None:
        self._running: dict[str, Record] = {}
        self._parked: OrderedDict[str, Record] = OrderedDict()
        self._num_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def enter(self, request: DecodeRequest) -> Record:
        """Take in a request that starts, perhaps with tokens of another run of it, which is forgotten."""
        context, now = request.context, asyncio.get_running_loop().time()
        self._drop(context.request_id)
        record = Record(request, None if context.time_left_s is None else now + context.time_left_s)
        if request.delivered is not None:
            record.take(Frame(choices=request.delivered.tokens))
        self._running[context.request_id] = record
        return record

    def park(self, record: Record) -> None:
        """Keep the record of a request that has ended for a while."""
        request_id = record.request.context.request_id
        if self._running.get(request_id) is not record:
            return  # it runs again, from this record or further on
        del self._running[request_id]
        record.ended_at = asyncio.get_running_loop().time()
        self._parked[request_id] = record
        self._num_bytes += record.num_bytes
        self._expire()

    def find(self, request_id: str, tenant: str) -> Record:
        """Raise NotFound for unknown requests and for those of other tenants."""
        record = self._running.get(request_id) or self._parked.get(request_id)
        if record is None or record.request.context.tenant != tenant:
            raise NotFound(f"request {request_id} is not known here")
        return record

    def close(self) -> None:
        """Forget everything."""
        self._parked.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _drop(self, request_id: str) -> None:
        if record := self._parked.pop(request_id, None):
            self._num_bytes -= record.num_bytes

    def _expire(self) -> None:
        """Forget what is too old or too much, and come back when the next is due."""
        loop = asyncio.get_running_loop()
        while self._parked:
            request_id, oldest = next(iter(self._parked.items()))
            if loop.time() < oldest.ended_at + PARK_S and self._num_bytes <= MAX_PARKED_BYTES:
                break
            self._drop(request_id)
        if self._timer is not None:
            self._timer.cancel()
        oldest_at = next((record.ended_at for record in self._parked.values()), None)
        self._timer = loop.call_at(oldest_at + PARK_S, self._expire) if oldest_at is not None else None
