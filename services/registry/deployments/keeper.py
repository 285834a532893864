"""Brings the workers to the adapters that are wanted: each loads those of its model and lets go of others.

A worker says in its registration what it holds, so a new start of it, or of this registry, needs no memory of ours.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from inferflux.clock import Clock
from inferflux.errors import Conflict, InferfluxError, NotFound
from inferflux.types import State
from services.registry.deployments.adapter import AdapterSpec
from services.registry.directory import Directory
from services.registry.planner.workers import WorkerClient
from services.registry.store import RegistryStore
from services.registry.workers import Worker

log = logging.getLogger(__name__)

PERIOD_S = 1.0
IDLE_S = 5.0
RETRY_S = 10.0
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """What a worker said of a revision. `at`: monotonic seconds."""

    revision: int
    incarnation: str
    error: str
    at: float


class Keeper:
    """Acts with `run`, as a task."""

    def __init__(self, store: RegistryStore, directory: Directory, client: WorkerClient, clock: Clock) -> None:
        self._store = store
        self._directory = directory
        self._client = client
        self._clock = clock
        self._failures: dict[tuple[str, str], Failure] = {}
        self._wake = asyncio.Event()

    async def put(self, spec: AdapterSpec) -> Document:
        """Want an adapter, or a changed one, from now on. Raises Conflict, NotFound or Unavailable."""
        models = {model.name for model in self._directory.models() if not model.parent}
        if spec.name in models:
            raise Conflict(f"{spec.name!r} is a model's name")
        if spec.model not in models:
            raise NotFound(f"no model {spec.model!r}")
        await self._store.put_adapter(spec)
        await self._refresh()
        return self._document(spec)

    async def delete(self, name: str) -> None:
        """Want an adapter no more. Raises NotFound or Unavailable."""
        if not await self._store.delete_adapter(name):
            raise NotFound(f"no adapter {name[:128]!r}")
        await self._refresh()

    async def documents(self) -> list[Document]:
        """Describe all adapters. Raises Unavailable."""
        return [self._document(spec) for _, spec in sorted((await self._store.adapters()).items())]

    async def run(self) -> None:
        """Act for ever."""
        while True:
            self._wake.clear()
            is_busy = False
            try:
                is_busy = await self._turn()
            except InferfluxError as e:
                log.debug("adapters wait", extra={"reason": e.message})
            with suppress(TimeoutError):
                async with asyncio.timeout(PERIOD_S if is_busy else IDLE_S):
                    await self._wake.wait()

    async def _refresh(self) -> None:
        """Let gateways know, and workers do."""
        self._directory.set_adapters(await self._store.adapters())
        self._wake.set()

    async def _turn(self) -> bool:
        """Tell each worker what it lacks and what it has too much; says whether there are adapters at all."""
        specs = await self._store.adapters()
        self._directory.set_adapters(specs)
        workers = [worker for worker in self._directory.leases.workers() if worker.state is State.READY]
        await asyncio.gather(*(self._bring(worker, specs) for worker in workers if worker.max_adapters))
        return bool(specs) or any(worker.adapters for worker in workers)

    async def _bring(self, worker: Worker, specs: Mapping[str, AdapterSpec]) -> None:
        held = {adapter.name: adapter.revision for adapter in worker.adapters}
        wanted = {name: spec for name, spec in specs.items() if spec.model == worker.model}
        for name in held.keys() - wanted.keys():
            with suppress(InferfluxError):  # it is told again
                await self._client.unload_adapter(worker, name)
        for name, spec in wanted.items():
            if held.get(name) != spec.revision and not self._is_hopeless(worker, spec):
                await self._load(worker, spec)

    async def _load(self, worker: Worker, spec: AdapterSpec) -> None:
        key = worker.worker_id, spec.name
        try:
            await self._client.load_adapter(worker, spec.name, spec.source, spec.revision, is_pinned=spec.is_pinned)
        except InferfluxError as e:
            self._failures[key] = Failure(spec.revision, worker.incarnation, e.message, self._clock.monotonic())
            log.warning("adapter not loaded", extra={"adapter": spec.name, "worker_id": key[0], "reason": e.message})
        else:
            self._failures.pop(key, None)

    def _is_hopeless(self, worker: Worker, spec: AdapterSpec) -> bool:
        """Whether the worker has just refused this very revision."""
        failure = self._failure(worker, spec)
        return failure is not None and self._clock.monotonic() - failure.at < RETRY_S

    def _failure(self, worker: Worker, spec: AdapterSpec) -> Failure | None:
        failure = self._failures.get((worker.worker_id, spec.name))
        is_it = failure is not None and (failure.revision, failure.incarnation) == (spec.revision, worker.incarnation)
        return failure if is_it else None

    def _document(self, spec: AdapterSpec) -> Document:
        workers = [worker for worker in self._directory.leases.workers() if worker.model == spec.model]
        return {"id": spec.name, "object": "adapter"} | spec.to_json() | {"workers": list(self._shown(workers, spec))}

    def _shown(self, workers: Iterable[Worker], spec: AdapterSpec) -> Iterable[Document]:
        for worker in workers:
            held = next((adapter for adapter in worker.adapters if adapter.name == spec.name), None)
            failure = self._failure(worker, spec)
            is_loaded = held is not None and held.revision == spec.revision
            error = "" if is_loaded else failure.error if failure else ""
            if not worker.max_adapters:
                error = "it was started without adapters: max_adapters is 0"
            yield {
                "id": worker.worker_id,
                "state": "loaded" if is_loaded else "failed" if error else "loading",
                "revision": held.revision if held else 0,
                "digest": held.digest if held else "",
                "error": error,
            }
