"""PoolService on the wire."""

# ruff: noqa: N802 - methods have the names that the protos give them

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import grpc

from inferflux.clock import Clock
from inferflux.types import Role
from inferflux.v1 import pool_service_pb2 as pb
from inferflux.v1.pool_service_pb2_grpc import PoolServiceServicer
from services.registry.planner import book
from services.registry.planner.spec import PoolSpec
from services.registry.planner.specs import Specs
from services.registry.planner.store import PlannerStore
from services.registry.workers import Worker

log = logging.getLogger(__name__)

SERVICE = "/inferflux.v1.PoolService/"
ADMINISTRATORS = frozenset({"operator", "gateway"})
CALLERS = {SERVICE + "ListPools": ADMINISTRATORS, SERVICE + "PutPools": ADMINISTRATORS}
Context = grpc.aio.ServicerContext[Any, Any]


class PoolServicer(PoolServiceServicer):
    """Callers are authorised by the server (see CALLERS) before anything here runs. `workers`: the registered ones."""

    def __init__(
        self, specs: Specs, store: PlannerStore, workers: Callable[[], tuple[Worker, ...]], clock: Clock
    ) -> None:
        self._specs = specs
        self._store = store
        self._workers = workers
        self._clock = clock

    async def ListPools(self, request: pb.ListPoolsRequest, context: Context) -> pb.ListPoolsResponse:
        known, put, plans = await self._specs.read(), await self._specs.put(), await self._store.read_plans()
        workers: dict[str, list[Worker]] = {}
        for worker in self._workers():
            workers.setdefault(f"{worker.role}/{worker.model}", []).append(worker)
        names = sorted(known.pools.keys() | workers.keys())
        documents = [
            _document(name, workers.get(name, []), known.pools.get(name), plans.get(name))
            | {"is_put": name in put.pools}
            for name in names
        ]
        return pb.ListPoolsResponse(pools_json=json.dumps(documents).encode(), revision=known.revision)

    async def PutPools(self, request: pb.PutPoolsRequest, context: Context) -> pb.PutPoolsResponse:
        pools = book.decode(request.pools_json)
        now_ms = int(self._clock.time() * 1000)
        stored = await self._store.update(lambda known: known.put(pools, request.revision, now_ms))
        log.info("pools put", extra={"pools": sorted(pools), "revision": stored.revision})
        return pb.PutPoolsResponse(revision=stored.revision)


def _document(name: str, workers: list[Worker], spec: PoolSpec | None, plan: Any) -> dict[str, Any]:
    """Render a pool. `spec` None: nobody plans it."""
    role, _, model = name.partition("/")
    states = [worker.state for worker in workers]
    return {
        "id": name,
        "object": "pool",
        "role": Role(role),
        "model": model,
        "workers": {str(state): states.count(state) for state in dict.fromkeys(states)},
        "spec": spec.to_json() if spec else None,
        "plan": plan if spec else None,
    }
