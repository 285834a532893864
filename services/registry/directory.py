"""The registry's state in this process: leases and models, fed to watchers, mirrored in Redis.

Registering never touches Redis: leases live in memory, and tasks carry them to the mirror and bring in what other
replicas, or an earlier start of this one, put there. While Redis is away all this goes on without it; only an
operator's changes of models are refused.

A registry that has just started does not know its workers before they have had one lease to renew. Until then it is not
*settled*, and a gateway that already has a snapshot gets no new one: it keeps its workers instead of losing them.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from inferflux.clock import Clock, until_tick
from inferflux.errors import Conflict, InvalidRequest, Unavailable
from inferflux.feed import Feed
from inferflux.store import MAX_REVISION
from inferflux.telemetry.metrics import SNAPSHOT_REVISION, STORE_UP
from inferflux.types import State
from services.registry.deployments.adapter import AdapterSpec
from services.registry.leases import LeaseTable
from services.registry.models import Model, ModelBook
from services.registry.roster import Roster
from services.registry.store import RegistryStore
from services.registry.workers import Worker

log = logging.getLogger(__name__)

LEASE_S = 3.0
TICK_S = 0.5
MIRROR_S = 1.0
LONELY_S = 5.0
"""How often a replica without others looks whether the store still has what it wrote: who joins is announced."""
MAX_BACKOFF_S = 1.0
FORGET_S = 60.0
"""A roster that has not changed for so long belongs to a replica that is gone."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a snapshot says."""

    workers: tuple[Worker, ...] = ()
    models: tuple[Model, ...] = ()


@dataclass(frozen=True, slots=True)
class Sighting:
    """The newest beat of another replica and when it was new, in monotonic seconds."""

    beat: int
    at: float


class Directory:
    """Owns the registry's state. `owner` names this start of this replica. Used from one event loop."""

    def __init__(self, store: RegistryStore, clock: Clock, owner: str, lease_s: float = LEASE_S) -> None:
        self.feed: Feed[Content] = Feed()
        self.leases = LeaseTable(clock, lease_s)
        self._store = store
        self._clock = clock
        self._owner = owner
        self._book = ModelBook()
        self._adapters: Mapping[str, AdapterSpec] = {}
        self._unsaved: dict[str, Model] = {}
        self._sightings: dict[str, Sighting] = {}
        self._settled = asyncio.Event()
        self._settles_at = clock.monotonic() + lease_s
        self._changed = asyncio.Event()
        self._beat = 0
        self._is_up: bool | None = None
        self._publish(Content())

    def register(self, worker: Worker, model: Model) -> None:
        """Take a worker in or renew its lease. Raises Conflict for an incarnation that is over."""
        known = self.leases.find(worker.worker_id)
        self.leases.renew(worker)
        # What a worker could not load or prove, or is about to, says nothing of the model that others serve.
        was_ready = known is not None and known.incarnation == worker.incarnation and known.state is State.READY
        if (worker.state is State.READY and not was_ready) or model.name not in self._models().models:
            self._unsaved[model.name] = replace(model, created_at_ms=self.now_ms())
            self._changed.set()
        if known != worker:
            log.info("worker registered", extra=_describe(worker))
            self._changed.set()
        if self._changed.is_set():
            self._update()

    def deregister(self, worker_id: str, incarnation: str) -> None:
        """Take one start of a worker out at once. Idempotent."""
        self.leases.drop(worker_id, incarnation)
        log.info("worker deregistered", extra={"worker_id": worker_id, "incarnation": incarnation})
        self._changed.set()
        self._update()

    async def put_model(self, model: Model) -> int:
        """Create or replace a record; returns the first snapshot revision that has it. Raises Unavailable."""
        await self._change(lambda stored: stored.put(model, self.now_ms()))
        return self.feed.revision

    async def delete_model(self, name: str) -> int:
        """Remove a record; returns the first snapshot revision without it.

        Raises Conflict while workers serve it (they would make it known again), NotFound, Unavailable.
        """
        if serving := [worker.worker_id for worker in self.leases.workers() if worker.model == name]:
            raise Conflict(f"model {name!r} is served by {', '.join(serving)}")
        await self._change(lambda stored: stored.delete(name, self.now_ms()))
        return self.feed.revision

    async def set_default(self, name: str) -> int:
        """Make a model the default; returns the first snapshot revision that says so. Raises NotFound, Unavailable."""
        await self._change(lambda stored: stored.set_default(name, self.now_ms()))
        return self.feed.revision

    def set_adapters(self, adapters: Mapping[str, AdapterSpec]) -> None:
        """List these adapters with the models from now on."""
        self._adapters = adapters
        self._update()

    def models(self) -> tuple[Model, ...]:
        """List the known models by name, exactly one of them the default, and the adapters of those after them."""
        return self._content().models

    async def overtake(self, revision: int) -> None:
        """Get above a revision that a gateway has, once settled. Raises InvalidRequest."""
        if revision >= MAX_REVISION:
            raise InvalidRequest(f"revision {revision} is not one of ours", param="revision")
        if revision:
            await self._settled.wait()
        if self.feed.revision < revision:
            self._publish(self._content(), floor=revision)

    def now_ms(self) -> int:
        return int(self._clock.time() * 1000)

    async def run_leases(self) -> None:
        """End leases in time, for ever."""
        while True:
            await asyncio.sleep(until_tick(TICK_S))
            self.tick()

    def tick(self) -> None:
        """End the leases that are over."""
        for worker in self.leases.expire():
            log.warning("worker lease expired", extra=_describe(worker))
            self._changed.set()
        if not self._is_up:
            self.leases.hold_adopted()
        if self._clock.monotonic() >= self._settles_at:
            self._settled.set()
        self._update()

    async def run_writer(self) -> None:
        """Mirror our leases for ever: at once when they change, and each second while there are other replicas."""
        while True:
            await _wait(self._changed, until_tick(MIRROR_S))
            if self._changed.is_set() or self._sightings:
                try:
                    await self._write()
                except Unavailable as e:
                    log.debug("not mirrored", extra={"reason": e.message})
                    await asyncio.sleep(MIRROR_S)

    async def run_reader(self) -> None:
        """Follow what others mirror, for ever, through all absences of the store."""
        backoff_s = 0.05
        while True:
            try:
                async with self._store.subscribe() as wait:
                    await self._read()
                    self._note(is_up=True)
                    backoff_s = 0.05
                    while True:
                        await wait(until_tick(MIRROR_S if self._sightings else LONELY_S))
                        await self._read()
            except Unavailable as e:
                self._note(is_up=False, reason=e.message)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311  -- jitter
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _write(self) -> None:
        is_news = self._changed.is_set()
        if self._unsaved:  # first, so that nobody sees a worker whose model is unknown
            await self._change(lambda stored: stored)
        self._beat += 1
        self._changed.clear()
        try:
            roster = Roster(self._beat, self.leases.direct(), self.leases.gone())
            await self._store.write_roster(self._owner, roster, announce=is_news)
        except Unavailable:
            self._changed.set()
            raise

    async def _read(self) -> None:
        revision, rosters = await self._store.read()
        if self._owner not in rosters:
            self._changed.set()  # the store is new, or lost it
        for owner, roster in rosters.items():
            if owner != self._owner:
                await self._take_over(owner, roster)
        if revision != self._book.revision:
            await self._change(lambda stored: stored)
        self._update()

    async def _take_over(self, owner: str, roster: Roster) -> None:
        now, seen = self._clock.monotonic(), self._sightings.get(owner)
        if seen is None or seen.beat != roster.beat:
            self._sightings[owner] = Sighting(roster.beat, now)
            for worker_id, incarnation in roster.gone.items():
                self.leases.drop(worker_id, incarnation)
            for worker in roster.workers:
                self.leases.adopt(worker)
        elif seen.at + FORGET_S < now:
            del self._sightings[owner]
            await self._store.forget(owner)

    async def _change(self, edit: Callable[[ModelBook], ModelBook]) -> None:
        """Apply `edit` to the store's models and take the result over, with all that workers told us of theirs."""
        unsaved = dict(self._unsaved)

        def edit_repaired(stored: ModelBook) -> ModelBook:
            now_ms = self.now_ms()
            return edit(stored.restore(self._book, now_ms).learn(unsaved.values(), now_ms))

        book = await self._store.update(edit_repaired)
        if book.revision > self._book.revision:
            self._book = book
        for name, model in unsaved.items():
            if self._unsaved.get(name) is model:
                del self._unsaved[name]
        self._update()

    def _models(self) -> ModelBook:
        return self._book.learn(self._unsaved.values(), self.now_ms())

    def _content(self) -> Content:
        workers = self.leases.workers()
        models = self._models().listed(worker.model for worker in workers)
        known = {model.name: model for model in models}
        adapters = [
            adapted(spec, known[spec.model])
            for _, spec in sorted(self._adapters.items())
            if spec.model in known and spec.name not in known
        ]
        return Content(workers, (*models, *adapters))

    def _update(self) -> None:
        if (content := self._content()) != self._published:
            self._publish(content)

    def _publish(self, content: Content, floor: int = 0) -> None:
        self._published = content
        revision = max(self.feed.revision + 1, floor + 1, self.now_ms())
        self.feed.publish(revision, content)
        SNAPSHOT_REVISION.labels("registry").set(revision)

    def _note(self, *, is_up: bool, reason: str = "") -> None:
        STORE_UP.labels("registry").set(is_up)
        if is_up is not self._is_up:
            self._is_up = is_up
            level = logging.INFO if is_up else logging.ERROR
            log.log(level, "registry store is %s", "up" if is_up else "away", extra={"reason": reason})


def adapted(spec: AdapterSpec, parent: Model) -> Model:
    """Make the record of an adapter: it can what its model can."""
    return replace(
        parent,
        name=spec.name,
        parent=parent.name,
        tenants=spec.tenants,
        created_at_ms=spec.revision,
        is_default=False,
        version=0,
        signed_by="",
    )


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass


def _describe(worker: Worker) -> dict[str, str]:
    return {
        "worker_id": worker.worker_id,
        "incarnation": worker.incarnation,
        "worker_state": worker.state,
        "reason": worker.reason,
    }
