"""What an administrator may know of the workers and ask of them, through the connections that this gateway has."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration

from inferflux.errors import InferfluxError, NotFound, Unavailable
from inferflux.rpc.client import translated_errors
from inferflux.types import Pulse, Role
from inferflux.v1 import worker_admin_service_pb2 as pb
from services.gateway.link import Link
from services.gateway.views import Worker

TIMEOUT_S = 2.0
LOST = "lost"
STATES = {
    pb.TICKET_STATE_ISSUED: "issued",
    pb.TICKET_STATE_CLAIMED: "claimed",
    pb.TICKET_STATE_COMMITTED: "committed",
    pb.TICKET_STATE_RELEASED: "released",
    pb.TICKET_STATE_EXPIRED: "expired",
    pb.TICKET_STATE_REVOKED: "revoked",
}
LIVE = frozenset({"issued", "claimed", "committed"})
T = TypeVar("T")


class Which(StrEnum):
    """Which tickets to list."""

    ALL = "all"
    LIVE = "live"
    LEAKED = "leaked"


FILTERS = {
    Which.ALL: pb.TICKET_FILTER_UNSPECIFIED,
    Which.LIVE: pb.TICKET_FILTER_LIVE,
    Which.LEAKED: pb.TICKET_FILTER_LEAKED,
}


@dataclass(frozen=True, slots=True)
class Member:
    """One worker. `state`: its own word, or LOST without a connection, and then `pulse` is None."""

    worker: Worker
    incarnation: str
    state: str
    pulse: Pulse | None
    num_assigned: int


@dataclass(frozen=True, slots=True)
class Status:
    """A worker's answer about itself. `eta_s`: how long a drain would take; None = not known."""

    member: Member
    num_running: int
    reason: str
    eta_s: float | None


@dataclass(frozen=True, slots=True)
class DrainBegun:
    """A drain that is under way. `eta_s` None: not known; `time_left_s` None: no limit."""

    worker_id: str
    incarnation: str
    num_running: int
    num_live_tickets: int
    eta_s: float | None
    time_left_s: float | None


@dataclass(frozen=True, slots=True)
class Ticket:
    """One ticket of a worker."""

    worker_id: str
    ticket_id: str
    request_id: str
    tenant: str
    session_id: str
    state: str
    claimant: str
    num_bytes: int
    age_s: float
    is_leaked: bool


@dataclass(frozen=True, slots=True)
class Counts:
    """Tickets since a worker's start, and what should not be there: leaked tickets and arena slots."""

    issued: int = 0
    released: int = 0
    expired: int = 0
    revoked: int = 0
    live: int = 0
    leaked: int = 0
    leaked_slots: int = 0

    @property
    def is_balanced(self) -> bool:
        """Whether every ticket is accounted for."""
        return self.issued == self.released + self.expired + self.revoked + self.live

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.issued + other.issued,
            self.released + other.released,
            self.expired + other.expired,
            self.revoked + other.revoked,
            self.live + other.live,
            self.leaked + other.leaked,
            self.leaked_slots + other.leaked_slots,
        )


@dataclass(frozen=True, slots=True)
class Book:
    """The tickets of one prefill worker. `error`: why it could not be asked; then the rest is empty."""

    worker_id: str
    incarnation: str
    counts: Counts = field(default_factory=Counts)
    tickets: tuple[Ticket, ...] = ()
    error: str = ""


class Fleet:
    """All workers of the cluster. `workers` gives those that are known, with their connections."""

    def __init__(self, workers: Callable[[], Iterable[tuple[Worker, Link | None]]]) -> None:
        self._workers = workers

    def members(self) -> list[Member]:
        """Return all workers as this gateway sees them, by id; asks nobody."""
        return [_member(worker, link) for worker, link in self._workers()]

    async def status(self, worker_id: str) -> Status:
        """Ask one worker how it is. Raises NotFound, or Unavailable when it does not answer."""
        worker, link = self._find(worker_id)
        answer = await _ask(worker_id, link, lambda admin: admin.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S))
        return Status(_member(worker, link), answer.num_running, answer.reason, _seconds(answer, "eta"))

    async def drain(self, worker_id: str, budget_s: float | None) -> DrainBegun:
        """Tell one worker to take nothing new and to exit when it is done. None: in the time it was configured with.

        Raises as `status`.
        """
        _, link = self._find(worker_id)
        request = pb.DrainRequest(budget=_duration(budget_s))
        answer = await _ask(worker_id, link, lambda admin: admin.Drain(request, timeout=TIMEOUT_S))
        return DrainBegun(
            worker_id,
            answer.incarnation,
            answer.num_running,
            answer.num_live_tickets,
            _seconds(answer, "eta"),
            _seconds(answer, "time_left"),
        )

    async def books(self, which: Which, limit: int, worker_id: str | None = None) -> list[Book]:
        """Ask all prefill workers for at most `limit` tickets each, or one of them. Raises NotFound."""
        chosen = [self._find(worker_id)] if worker_id is not None else list(self._workers())
        prefills = [(worker, link) for worker, link in chosen if worker.role is Role.PREFILL]
        request = pb.ListTicketsRequest(filter=FILTERS[which], limit=limit)
        return list(await asyncio.gather(*(_book(worker, link, request) for worker, link in prefills)))

    def _find(self, worker_id: str) -> tuple[Worker, Link | None]:
        known = {worker.worker_id: (worker, link) for worker, link in self._workers()}
        if worker_id not in known:
            raise NotFound(f"there is no worker {worker_id[:256]!r}; there are {', '.join(known) or 'none'}")
        return known[worker_id]


def _member(worker: Worker, link: Link | None) -> Member:
    pulse = link.heart.pulse if link is not None else None
    if link is None or pulse is None:
        return Member(worker, worker.incarnation, LOST if link is not None else worker.state, None, 0)
    return Member(worker, link.incarnation, pulse.state, pulse, link.num_assigned)


async def _ask(worker_id: str, link: Link | None, question: Callable[[Any], Awaitable[T]]) -> T:
    if link is None:
        raise Unavailable(f"this gateway is not connected to worker {worker_id}")
    try:
        with translated_errors():
            return await question(link.admin)
    except grpc.aio.UsageError:  # its channel was closed meanwhile
        raise Unavailable(f"worker {worker_id} is gone") from None


async def _book(worker: Worker, link: Link | None, request: pb.ListTicketsRequest) -> Book:
    try:
        answer = await _ask(worker.worker_id, link, lambda admin: admin.ListTickets(request, timeout=TIMEOUT_S))
    except InferfluxError as e:
        return Book(worker.worker_id, worker.incarnation, error=e.message)
    counts = Counts(
        answer.num_issued,
        answer.num_released,
        answer.num_expired,
        answer.num_revoked,
        answer.num_live,
        answer.num_leaked,
        answer.num_leaked_slots,
    )
    return Book(worker.worker_id, answer.incarnation, counts, _tickets(worker.worker_id, answer.tickets))


def _tickets(worker_id: str, records: Sequence[pb.TicketRecord]) -> tuple[Ticket, ...]:
    return tuple(
        Ticket(
            worker_id=worker_id,
            ticket_id=record.ticket_id,
            request_id=record.request_id,
            tenant=record.tenant,
            session_id=record.session_id,
            state=STATES.get(record.state, "unknown"),
            claimant=record.claimant,
            num_bytes=record.num_bytes,
            age_s=record.age.ToTimedelta().total_seconds(),
            is_leaked=record.is_leaked,
        )
        for record in records
    )


def _seconds(message: Any, name: str) -> float | None:
    return getattr(message, name).ToTimedelta().total_seconds() if message.HasField(name) else None


def _duration(span_s: float | None) -> Duration | None:
    if span_s is None:
        return None
    duration = Duration()
    duration.FromMilliseconds(round(span_s * 1000))
    return duration
