"""What an operator may know of a prefill worker's tickets: all of them, whether they add up, and which have leaked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from inferflux.telemetry import metrics
from inferflux.tickets import CONFLICT, LEAK_AGE_S, TicketBook, TicketCounts, TicketEvent, TicketRecord, TicketState

_BY_WHY = {
    CONFLICT: metrics.TICKET_CONFLICT,
    TicketState.EXPIRED: metrics.TICKET_EXPIRED,
    TicketState.RELEASED: metrics.RELEASE,
}


@dataclass(frozen=True, slots=True)
class Audit:
    """The state of a book. `live` oldest first, `ended` newest first; `leaked`: ids of live ones.

    `num_leaked_slots`: arena slots that should be free.
    """

    counts: TicketCounts
    live: tuple[TicketRecord, ...]
    ended: tuple[TicketRecord, ...]
    leaked: frozenset[str]
    num_leaked_slots: int


class Ledger:
    """Looks at a book from outside, with the one thing that a book does not know: which sessions are alive."""

    def __init__(self, book: TicketBook, is_session_alive: Callable[[str], bool]) -> None:
        self._book = book
        self._is_session_alive = is_session_alive

    def audit(self) -> Audit:
        """Take the book as it is now, all of it at one moment."""
        live = self._book.list()
        leaked = frozenset(record.ticket_id for record in live if self._has_leaked(record))
        return Audit(self._book.counts(), live, self._book.ended(), leaked, self._book.num_leaked_slots())

    def _has_leaked(self, record: TicketRecord) -> bool:
        """Whether a ticket should have ended by itself: sweeps have passed it by, or its session ended without it."""
        return record.overdue_s > LEAK_AGE_S or not self._is_session_alive(record.session_id)


def measure(event: TicketEvent) -> None:
    """Let metrics hear what happened to tickets."""
    if event.name != CONFLICT:
        metrics.TICKETS.labels(event.name).inc(len(event.ages_s))
        for age_s in event.ages_s:
            metrics.TICKET_AGE.labels(event.name).observe(age_s)
    if (counter := _BY_WHY.get(event.name)) is not None:
        counter.labels(event.why).inc(len(event.ages_s))
