"""The planner's side of the workers: asks them how they are and tells victims to drain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf.duration_pb2 import Duration

from inferflux.errors import InferfluxError
from inferflux.rpc.client import open_channel, translated_errors
from inferflux.rpc.mtls import Identity
from inferflux.types import STATE_FROM_PROTO, Pulse
from inferflux.v1 import worker_admin_service_pb2 as pb
from inferflux.v1.worker_admin_service_pb2_grpc import WorkerAdminServiceStub
from services.registry.planner.pool import Member, Report
from services.registry.workers import Worker

TIMEOUT_S = 2.0
ADAPTER_TIMEOUT_S = 60.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Line:
    """The connection to one address of a worker."""

    address: str
    channel: grpc.aio.Channel
    stub: Any


class WorkerClient:
    """Keeps a connection to each worker that is asked. An asynchronous context manager."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._lines: dict[str, Line] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async with AsyncExitStack() as stack:
            for line in self._lines.values():
                stack.push_async_callback(line.channel.close, None)

    async def look(self, workers: Iterable[Worker]) -> list[Member]:
        """Ask all these workers at once; forgets those that are not among them."""
        known = {worker.worker_id: worker for worker in workers}
        for worker_id in self._lines.keys() - known.keys():
            await self._lines.pop(worker_id).channel.close(None)
        return list(await asyncio.gather(*(self._look_at(worker) for worker in known.values())))

    async def drain(self, worker: Worker, budget_s: float) -> None:
        """Tell a worker to drain. Raises InferfluxError."""
        budget = Duration()
        budget.FromMilliseconds(round(budget_s * 1000))
        line = await self._line(worker)
        with translated_errors():
            await line.stub.Drain(pb.DrainRequest(budget=budget), timeout=TIMEOUT_S)

    async def load_adapter(self, worker: Worker, name: str, source: str, revision: int, *, is_pinned: bool) -> None:
        """Tell a worker to hold an adapter. Raises InferfluxError."""
        request = pb.LoadAdapterRequest(name=name, source=source, revision=revision, is_pinned=is_pinned)
        line = await self._line(worker)
        with translated_errors():
            await line.stub.LoadAdapter(request, timeout=ADAPTER_TIMEOUT_S)

    async def unload_adapter(self, worker: Worker, name: str) -> None:
        """Tell a worker to let an adapter go. Raises InferfluxError."""
        line = await self._line(worker)
        with translated_errors():
            await line.stub.UnloadAdapter(pb.UnloadAdapterRequest(name=name), timeout=ADAPTER_TIMEOUT_S)

    async def _look_at(self, worker: Worker) -> Member:
        line = await self._line(worker)
        try:
            with translated_errors():
                return Member(worker, _report(await line.stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)))
        except InferfluxError as e:
            _log.debug("no status", extra={"worker_id": worker.worker_id, "reason": e.reason})
            return Member(worker, None)

    async def _line(self, worker: Worker) -> Line:
        known = self._lines.get(worker.worker_id)
        if known is not None and known.address == worker.address:
            return known
        channel = open_channel(worker.address, self._identity, worker.role)
        line = self._lines[worker.worker_id] = Line(worker.address, channel, WorkerAdminServiceStub(channel))
        if known is not None:
            await known.channel.close(None)
        return line


def _report(answer: pb.GetStatusResponse) -> Report | None:
    """None for a state that this registry does not know."""
    if answer.pulse.state not in STATE_FROM_PROTO:
        return None
    return Report(
        pulse=Pulse.from_proto(answer.pulse),
        num_requests=answer.num_running,
        num_tokens=answer.num_tokens,
        eta_s=answer.eta.ToTimedelta().total_seconds() if answer.HasField("eta") else None,
        latency_s=answer.latency.ToTimedelta().total_seconds() if answer.HasField("latency") else None,
        num_gateways=answer.num_gateways,
    )
