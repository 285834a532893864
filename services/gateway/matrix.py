"""Which decode worker reads from which prefill worker, how, and how fast: measured when somebody asks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc

from inferflux.errors import InferfluxError, KvIncompatible
from inferflux.rpc.client import open_channel, translated_errors
from inferflux.rpc.mtls import Identity
from inferflux.types import Role, State
from inferflux.v1 import worker_admin_service_pb2 as pb
from inferflux.v1.worker_admin_service_pb2_grpc import WorkerAdminServiceStub
from services.gateway.views import Worker

PROBE_TIMEOUT_S = 15.0
Workers = Callable[[], Sequence[Worker]]


@dataclass(frozen=True, slots=True)
class Path:
    """One pair. `state`: ok, or the reason why nothing could be read."""

    decode: str
    prefill: str
    transport: str = ""
    gbps: float = 0.0
    state: str = "ok"


class Matrix:
    """Asks decode workers to read from prefill workers."""

    def __init__(self, identity: Identity, workers: Workers) -> None:
        self._identity = identity
        self.workers = workers

    async def measure(self) -> list[Path]:
        """Probe every pair of one model; a decode worker's pairs one after the other, so that each has its memory."""
        workers = [worker for worker in self.workers() if worker.state is State.READY]
        owners = [worker for worker in workers if worker.role is Role.PREFILL]
        readers = [worker for worker in workers if worker.role is Role.DECODE]
        rows = await asyncio.gather(*(self._row(reader, owners) for reader in readers))
        return [path for row in rows for path in row]

    async def _row(self, reader: Worker, owners: Sequence[Worker]) -> list[Path]:
        async with open_channel(reader.address, self._identity, "decode") as channel:
            return [await _probe(channel, reader, owner) for owner in owners if owner.model == reader.model]


async def _probe(channel: grpc.aio.Channel, reader: Worker, owner: Worker) -> Path:
    pair = (reader.worker_id, owner.worker_id)
    if owner.fingerprint != reader.fingerprint:
        return Path(*pair, state=KvIncompatible.reason)
    request = pb.ProbePathRequest(worker_id=owner.worker_id, incarnation=owner.incarnation, address=owner.address)
    try:
        with translated_errors():
            probe = await WorkerAdminServiceStub(channel).ProbePath(request, timeout=PROBE_TIMEOUT_S)
    except InferfluxError as e:
        return Path(*pair, state=e.reason)
    elapsed_s = max(probe.elapsed.ToTimedelta().total_seconds(), 1e-6)
    return Path(*pair, probe.transport, round(probe.num_bytes / elapsed_s / 1e9, 3))
