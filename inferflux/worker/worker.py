"""What every part of a worker process needs, wired once."""

from __future__ import annotations

from dataclasses import dataclass

from inferflux.engine.base import Engine, EngineInfo
from inferflux.kv.arena import Arena
from inferflux.lifecycle import Lifecycle
from inferflux.telemetry import metrics
from inferflux.tickets import TicketBook
from inferflux.types import Pulse, Role, State
from inferflux.worker.drain import Drain
from inferflux.worker.settings import WorkerSettings
from inferflux.worker.work import Work


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker. `arena` and `book` belong to prefill workers only."""

    role: Role
    settings: WorkerSettings
    lifecycle: Lifecycle
    engine: Engine
    info: EngineInfo
    work: Work
    drain: Drain
    host_id: str
    ticket_key: bytes
    arena: Arena | None = None
    book: TicketBook | None = None

    @property
    def state(self) -> State:
        """What others hear. While a readiness check objects, a ready worker takes nothing new, as a draining one."""
        is_vetoed = self.lifecycle.state is State.READY and not self.lifecycle.readiness().ready
        return State.DRAINING if is_vetoed else self.lifecycle.state

    def pulse(self) -> Pulse:
        """Where the worker stands now."""
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

    def _slots(self) -> tuple[int, int]:
        if self.arena is None:
            return 0, 0
        num_slots, num_free = self.arena.num_slots, self.arena.num_free
        metrics.KV_SLOTS.labels("free").set(num_free)
        metrics.KV_SLOTS.labels("used").set(num_slots - num_free)
        return num_slots, num_free
