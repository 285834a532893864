"""Which workers are alive, by leases on a monotonic clock. Pure: no I/O, no timers; someone calls `expire` regularly.

A worker renews here, directly, or at another replica, which shows in the mirror and lets us `adopt` it. Only direct
renewals count for what we mirror ourselves: otherwise two replicas would keep a dead worker alive for each other.
Incarnations sort by time: an older start of a worker cannot push out a newer one, nor come back after it was dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

from inferflux.clock import Clock
from inferflux.errors import Conflict
from services.registry.workers import Worker

GONE_LEASES = 10
"""How many leases long a dropped incarnation is remembered: longer than any message about it can be under way."""


@dataclass(slots=True)
class Lease:
    """Instants are monotonic seconds."""

    worker: Worker
    direct_until: float
    until: float


@dataclass(frozen=True, slots=True)
class Gone:
    """A start of a worker that ended; `at` is monotonic seconds."""

    incarnation: str
    at: float


class LeaseTable:
    """All leases of this process. `lease_s`: how long a worker lives without renewing."""

    def __init__(self, clock: Clock, lease_s: float) -> None:
        self.lease_s = lease_s
        self._clock = clock
        self._leases: dict[str, Lease] = {}
        self._gone: dict[str, Gone] = {}
        self._looked_at = clock.monotonic()

    def workers(self) -> tuple[Worker, ...]:
        """List the live workers, by id."""
        return tuple(self._leases[worker_id].worker for worker_id in sorted(self._leases))

    def direct(self) -> tuple[Worker, ...]:
        """List the workers that renew here, by id."""
        now = self._clock.monotonic()
        return tuple(worker for worker in self.workers() if self._leases[worker.worker_id].direct_until > now)

    def gone(self) -> dict[str, str]:
        """Map ids to the incarnations that were dropped lately."""
        return {worker_id: gone.incarnation for worker_id, gone in self._gone.items()}

    def find(self, worker_id: str) -> Worker | None:
        lease = self._leases.get(worker_id)
        return lease.worker if lease else None

    def renew(self, worker: Worker) -> None:
        """Take a worker in, or prolong its lease, by its own word. Raises Conflict for an incarnation that is over."""
        if self._is_over(worker):
            raise Conflict(f"incarnation {worker.incarnation} of {worker.worker_id} is over")
        until = self._clock.monotonic() + self.lease_s
        self._leases[worker.worker_id] = Lease(worker, until, until)

    def adopt(self, worker: Worker) -> None:
        """Take a worker in, or prolong its lease, by another replica's word. Ignores an incarnation that is over."""
        if self._is_over(worker):
            return
        known = self._leases.get(worker.worker_id)
        until = self._clock.monotonic() + self.lease_s
        if known is None or known.worker.incarnation != worker.incarnation:
            self._leases[worker.worker_id] = Lease(worker, direct_until=0.0, until=until)
        elif known.direct_until > self._clock.monotonic():
            known.until = until  # its own word is newer than its mirror image
        else:
            self._leases[worker.worker_id] = Lease(worker, known.direct_until, until)

    def drop(self, worker_id: str, incarnation: str) -> None:
        """Take one start of a worker out at once, and older ones with it. Idempotent."""
        known, gone = self._leases.get(worker_id), self._gone.get(worker_id)
        if known is not None and known.worker.incarnation <= incarnation:
            del self._leases[worker_id]
        if gone is None or gone.incarnation < incarnation:
            self._gone[worker_id] = Gone(incarnation, self._clock.monotonic())

    def expire(self) -> list[Worker]:
        """Take out and return the workers whose lease is over.

        When this process itself stood still (stopped, starved), nobody could renew: that time does not count.
        """
        now = self._clock.monotonic()
        stood_still_s, self._looked_at = now - self._looked_at, now
        if stood_still_s > self.lease_s / 2:
            self._prolong(stood_still_s)
        self._gone = {i: gone for i, gone in self._gone.items() if gone.at + GONE_LEASES * self.lease_s > now}
        expired = [lease.worker for lease in self._leases.values() if lease.until <= now]
        for worker in expired:
            del self._leases[worker.worker_id]
        return expired

    def hold_adopted(self) -> None:
        """Prolong what only the mirror keeps alive; for while the mirror cannot be read."""
        now = self._clock.monotonic()
        for lease in self._leases.values():
            if lease.direct_until <= now < lease.until:
                lease.until = now + self.lease_s

    def _is_over(self, worker: Worker) -> bool:
        known, gone = self._leases.get(worker.worker_id), self._gone.get(worker.worker_id)
        is_replaced = known is not None and worker.incarnation < known.worker.incarnation
        return is_replaced or (gone is not None and worker.incarnation <= gone.incarnation)

    def _prolong(self, span_s: float) -> None:
        for lease in self._leases.values():
            lease.direct_until += span_s
            lease.until += span_s
