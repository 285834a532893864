"""The planner: while it leads, it looks at each pool that has a spec, decides its size, and acts where it may.

It is no part of serving: without Redis, without its actuator or without anybody who leads, pools stay as they are.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from inferflux.clock import Clock, until_tick
from inferflux.errors import InferfluxError, Unavailable
from inferflux.telemetry import metrics
from inferflux.types import State
from services.registry.planner.actuator import Actuator
from services.registry.planner.lease import Lease
from services.registry.planner.pool import Counters, Member, group
from services.registry.planner.scaler import Outlook, Scaler
from services.registry.planner.spec import Mode, PoolSpec
from services.registry.planner.specs import Specs
from services.registry.planner.store import PlannerStore
from services.registry.planner.victims import choose, staying
from services.registry.planner.workers import WorkerClient
from services.registry.workers import Worker

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Memory:
    """What a leader remembers of one pool."""

    counters: Counters = field(default_factory=Counters)
    scaler: Scaler = field(default_factory=Scaler)
    said: str = ""


class Planner:
    """Plans with `run`, as a task. `workers` lists the registered ones; `actuator` None: it can only advise."""

    def __init__(
        self,
        *,
        name: str,
        specs: Specs,
        store: PlannerStore,
        lease: Lease,
        workers: Callable[[], tuple[Worker, ...]],
        client: WorkerClient,
        actuator: Actuator | None,
        clock: Clock,
        period_s: float,
    ) -> None:
        self._name = name
        self._specs = specs
        self._store = store
        self._lease = lease
        self._workers = workers
        self._client = client
        self._actuator = actuator
        self._clock = clock
        self._period_s = period_s
        self._pools: dict[str, Memory] = {}
        self._leads = False
        self._plans: dict[str, Any] = {}

    async def run(self) -> None:
        """Plan for ever; gives the lease back when it is cancelled."""
        try:
            while True:
                await asyncio.sleep(until_tick(self._period_s))
                await self._turn()
        finally:
            if self._leads:
                await self._resign()

    async def _turn(self) -> None:
        """Plan once, if there is anything to plan and we lead."""
        try:
            specs = (await self._specs.read()).pools
            leads = bool(specs) and await self._lease.hold()
        except InferfluxError as e:
            self._note(leads=False, reason=e.message)
            return
        self._note(leads=leads)
        if leads:
            await self._plan(specs)

    async def _resign(self) -> None:
        try:
            await self._lease.drop()
        except InferfluxError as e:
            log.debug("the lease runs out by itself", extra={"reason": e.message})

    def _note(self, *, leads: bool, reason: str = "") -> None:
        """Who leads no more forgets: what it saw is of no use later, and its gauges would contradict the leader's."""
        metrics.PLANNER_LEADS.set(leads)
        if leads is not self._leads:
            self._leads = leads
            log.info("planner %s", "leads" if leads else "does not lead", extra={"reason": reason})
            if not leads:
                self._pools.clear()
                for gauge in (metrics.POOL_REPLICAS, metrics.POOL_TARGET, metrics.POOL_NEED):
                    gauge.clear()

    async def _plan(self, specs: Mapping[str, PoolSpec]) -> None:
        self._pools = {name: self._pools.get(name) or Memory() for name in specs}
        planned = {(spec.role, spec.model) for spec in specs.values()}
        members = group(await self._client.look(w for w in self._workers() if (w.role, w.model) in planned))
        plans = {}
        for name, spec in specs.items():
            plans[name] = await self._plan_pool(spec, members.get((spec.role, spec.model), []))
        try:
            await self._store.write_plans(plans)
        except Unavailable as e:
            log.warning("plans are not shown", extra={"reason": e.message})

    async def _plan_pool(self, spec: PoolSpec, members: list[Member]) -> dict[str, Any]:
        memory, now = self._pools[spec.name], self._clock.monotonic()
        try:
            num_wanted = await self._actuator.size(spec) if self._actuator else 0
        except InferfluxError as e:
            return self._failed(spec, memory, e)
        outlook = memory.scaler.look(now, memory.counters.read(now, members, num_wanted, spec.role), spec)
        measure(spec, outlook)
        plan = {"at": round(self._clock.time(), 3), "planner": self._name} | document(outlook)
        if outlook.target == outlook.current or spec.mode is Mode.ADVISE:
            memory.said = ""
            return plan
        if self._actuator is None:
            return plan | {"error": "this registry has no actuator: INFERFLUX_PLANNER is advise"}
        return plan | await self._act(spec, memory, outlook, members, self._actuator)

    async def _act(
        self, spec: PoolSpec, memory: Memory, outlook: Outlook, members: list[Member], actuator: Actuator
    ) -> dict[str, Any]:
        """Change the size; a failure is tried again with the next turn, which may want something else."""
        direction = "up" if outlook.target > outlook.current else "down"
        try:
            if direction == "up":
                await actuator.grow(spec, outlook.target)
            else:
                await self._shrink(spec, outlook, members, actuator)
        except InferfluxError as e:
            metrics.SCALINGS.labels(spec.role, spec.model, direction, "failed").inc()
            return self._failed(spec, memory, e)
        metrics.SCALINGS.labels(spec.role, spec.model, direction, "done").inc()
        log.info("pool scaled", extra={"pool": spec.name, "from": outlook.current, "to": outlook.target})
        memory.said = ""
        return {"error": ""}

    async def _shrink(self, spec: PoolSpec, outlook: Outlook, members: list[Member], actuator: Actuator) -> None:
        """Take workers out whose drain costs least; who can't be told to drain hears it from whoever ends it."""
        doomed = await actuator.doomed(spec, outlook.target)
        if doomed is None:
            num_unseen = outlook.current - len(staying(members))  # still starting: they go first
            victims = choose(members, outlook.current - outlook.target - num_unseen)
        else:
            victims = [member for member in staying(members) if member.worker.worker_id in doomed]
        await actuator.shrink(spec, outlook.target, victims)
        for victim in victims:
            worker_id = victim.worker.worker_id
            try:
                await self._client.drain(victim.worker, spec.drain_s)
            except InferfluxError as e:
                log.warning("victim not drained", extra={"worker_id": worker_id, "reason": e.message})
            else:
                log.info("victim drains", extra={"worker_id": worker_id, "budget_s": spec.drain_s})

    def _failed(self, spec: PoolSpec, memory: Memory, error: InferfluxError) -> dict[str, Any]:
        """Log changes only."""
        if memory.said != error.message:
            memory.said = error.message
            log.warning("pool not scaled", extra={"pool": spec.name, "reason": error.message})
        return {"at": round(self._clock.time(), 3), "planner": self._name, "error": error.message}


def measure(spec: PoolSpec, outlook: Outlook) -> None:
    """Tell metrics, and whoever scales by them."""
    labels = spec.role, spec.model
    metrics.POOL_REPLICAS.labels(*labels, State.READY).set(outlook.load.num_ready)
    metrics.POOL_REPLICAS.labels(*labels, State.STARTING).set(outlook.current - outlook.load.num_ready)
    metrics.POOL_TARGET.labels(*labels).set(outlook.target)
    needs = {term.name: term.replicas for term in outlook.verdict.terms}
    for term in ("rate", "backlog", "sequences", "kv", "latency"):
        metrics.POOL_NEED.labels(*labels, term).set(needs.get(term, 0.0))


def document(outlook: Outlook) -> dict[str, Any]:
    """Render what was decided and why."""
    load, slo = outlook.load, outlook.slo
    return {
        "current": outlook.current,
        "target": outlook.target,
        "needed": outlook.verdict.desired,
        "bound": outlook.verdict.bound,
        "terms": [{"name": t.name, "replicas": round(t.replicas, 3), "why": t.why} for t in outlook.verdict.terms],
        "load": {
            "ready": load.num_ready,
            "running": load.num_running,
            "waiting": load.num_waiting,
            "queued_tokens": round(load.queued_tokens),
            "tokens_per_s": round(load.tokens_per_s, 1),
            "kv_demand": round(load.kv_demand, 3),
            "latency_s": load.latency_s,
        },
        "slo": {
            "latency_s": slo.latency_s,
            "tokens_per_s": round(slo.tokens_per_s, 1),
            "sequences": slo.num_sequences,
            "utilization": slo.utilization,
        },
    }
