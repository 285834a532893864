"""What every part of a worker process needs, wired once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from inferflux.engine.base import Engine, EngineInfo
from inferflux.kv.arena import Arena
from inferflux.kv.nixl import NixlServer
from inferflux.kv.prefixes import PrefixStore
from inferflux.lifecycle import Lifecycle
from inferflux.telemetry import metrics
from inferflux.tickets import TicketBook, TicketState
from inferflux.types import Pulse, RequestContext, Role, State
from inferflux.worker.adapters import Adapters
from inferflux.worker.claims import Claims
from inferflux.worker.drain import Drain
from inferflux.worker.eta import left_s
from inferflux.worker.meter import Meter
from inferflux.worker.model import LoadableModel
from inferflux.worker.paths import Paths
from inferflux.worker.prefixes import PrefixTally
from inferflux.worker.progress import Progress
from inferflux.worker.settings import WorkerSettings
from inferflux.worker.work import Work


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker.

    `paths` and `claims` belong to decode workers only; `arena`, `book`, `nixl` and what concerns prefixes to prefill
    workers.
    """

    role: Role
    settings: WorkerSettings
    lifecycle: Lifecycle
    engine: Engine
    info: EngineInfo
    work: Work
    drain: Drain
    host_id: str
    ticket_key: bytes
    progress: Progress
    meter: Meter
    arena: Arena | None = None
    book: TicketBook | None = None
    nixl: NixlServer | None = None
    paths: Paths | None = None
    claims: Claims | None = None
    prefixes: PrefixStore | None = None
    tally: PrefixTally | None = None
    model: LoadableModel = field(default_factory=LoadableModel)
    adapters: Adapters | None = None

    @contextmanager
    def using(self, context: RequestContext) -> Iterator[RequestContext]:
        """See Adapters.using; without adapters a context is as it came."""
        if self.adapters is None:
            yield context
            return
        with self.adapters.using(context) as adapted:
            yield adapted

    @property
    def state(self) -> State:
        """What others hear. While a readiness check objects, a ready worker takes nothing new, as a draining one.

        With an engine that hangs or is dead it has failed, also while it drains: what it has is to be moved at once.
        """
        if self.progress.objection is not None or not self.engine.load().is_alive:
            return State.FAILED
        is_vetoed = self.lifecycle.state is State.READY and not self.lifecycle.readiness().ready
        return State.DRAINING if is_vetoed else self.lifecycle.state

    def pulse(self) -> Pulse:
        """Where the worker stands now."""
        self._measure_tickets()
        load = self.engine.load()
        num_slots, num_free = self._slots()
        return Pulse(
            incarnation=self.lifecycle.incarnation,
            state=self.state,
            step=load.step,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_queued_tokens=load.num_queued_tokens,
            num_free_blocks=load.num_free_blocks,
            num_blocks=load.num_blocks,
            num_free_slots=num_free,
            num_slots=num_slots,
            num_live_tickets=self.book.counts().live if self.book else 0,
        )

    def eta_s(self) -> float | None:
        """How long a drain would take, probably; None when nothing tells."""
        lefts = [self.work.left_s()]
        if self.book is not None:
            lengths_s = [record.age_s for record in self.book.ended()]
            lefts.append(left_s((record.age_s for record in self.book.list()), lengths_s))
        known = [left for left in lefts if left is not None]
        return max(known) if len(known) == len(lefts) else None

    def _measure_tickets(self) -> None:
        if self.book is not None:
            num_live = Counter(record.state for record in self.book.list())
            for state in (TicketState.ISSUED, TicketState.CLAIMED, TicketState.COMMITTED):
                metrics.TICKETS_LIVE.labels(state).set(num_live[state])

    def _slots(self) -> tuple[int, int]:
        """All slots, and those that a prompt could have now."""
        if self.arena is None or self.prefixes is None:
            return 0, 0
        num_slots, num_free, num_kept = self.arena.num_slots, self.arena.num_free, self.prefixes.num_kept
        metrics.KV_SLOTS.labels("free").set(num_free)
        metrics.KV_SLOTS.labels("cached").set(num_kept)
        metrics.KV_SLOTS.labels("used").set(num_slots - num_free - num_kept)
        return num_slots, num_free + num_kept
