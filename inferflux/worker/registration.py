"""A worker's entry in the registry, sent whole each second.

The registry may be gone for as long as it likes: nothing here ever disturbs serving.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import grpc

from inferflux.clock import until_tick
from inferflux.errors import InferfluxError
from inferflux.lifecycle import Lifecycle
from inferflux.rpc.client import translated_errors
from inferflux.types import ROLE_TO_PROTO, STATE_TO_PROTO, Role, State
from inferflux.v1 import registry_service_pb2 as pb
from inferflux.v1.registry_service_pb2_grpc import RegistryServiceStub
from inferflux.worker.settings import WorkerSettings
from inferflux.worker.worker import Worker

if TYPE_CHECKING:
    from inferflux.v1.registry_service_pb2_grpc import RegistryServiceAsyncStub

PERIOD_S = 1.0
TIMEOUT_S = 1.0
MakeRequest = Callable[[], pb.RegisterWorkerRequest]
_log = logging.getLogger(__name__)


class Registration:
    """Keeps a worker registered. `run` once, as a task."""

    def __init__(self, request: MakeRequest, lifecycle: Lifecycle, channel: grpc.aio.Channel) -> None:
        self._request = request
        self._lifecycle = lifecycle
        self._stub: RegistryServiceAsyncStub = RegistryServiceStub(channel)
        self._is_known = False
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Renew for ever."""
        while True:
            self._changed.clear()
            await self._renew()
            with suppress(TimeoutError):
                async with asyncio.timeout(until_tick(PERIOD_S)):
                    await self._changed.wait()

    def announce(self) -> None:
        """Send the record now: the worker's state has changed."""
        self._changed.set()

    async def leave(self) -> None:
        """Take the worker out, if the registry answers."""
        lifecycle = self._lifecycle
        request = pb.DeregisterWorkerRequest(worker_id=lifecycle.instance_id, incarnation=lifecycle.incarnation)
        with suppress(InferfluxError), translated_errors():
            await self._stub.DeregisterWorker(request, timeout=TIMEOUT_S)

    async def _renew(self) -> None:
        """Send the record. The time limit is ours, not gRPC's: its timers wake up threads, here and in the registry."""
        try:
            with translated_errors():
                async with asyncio.timeout(TIMEOUT_S):
                    await self._stub.RegisterWorker(self._request())
        except InferfluxError as e:
            self._note(is_known=False, reason=e.reason)
        except TimeoutError:
            self._note(is_known=False, reason="timeout")
        else:
            self._note(is_known=True)

    def _note(self, *, is_known: bool, reason: str = "") -> None:
        """Log changes only: a registry that is down for an hour is one line, not 3,600."""
        if is_known != self._is_known:
            self._is_known = is_known
            level = logging.INFO if is_known else logging.WARNING
            _log.log(level, "registered" if is_known else "registry lost", extra={"reason": reason})


def worker_request(worker: Worker, address: str) -> pb.RegisterWorkerRequest:
    """Say what a worker with a running engine is."""
    info = worker.info
    record = pb.WorkerRecord(
        worker_id=worker.lifecycle.instance_id,
        incarnation=worker.lifecycle.incarnation,
        role=ROLE_TO_PROTO[worker.role],
        model=info.model,
        address=address,
        state=STATE_TO_PROTO[worker.state],
        reason=worker.lifecycle.readiness().reason,
        fingerprint=info.fingerprint.to_proto(),
        host_id=worker.host_id,
        engine=info.name,
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        transports=worker.settings.transports,
        max_adapters=worker.settings.max_adapters,
        adapters=[
            pb.HeldAdapter(name=held.name, revision=held.revision, digest=held.digest)
            for held in (worker.adapters.held if worker.adapters else ())
        ],
    )
    model = pb.ModelRecord(
        name=info.model,
        digest=info.fingerprint.weights_digest,
        dtype=info.fingerprint.dtype,
        max_model_len=info.max_model_len,
        capabilities=info.capabilities,
        version=worker.model.version,
        signed_by=worker.model.signed_by,
    )
    return pb.RegisterWorkerRequest(worker=record, model=model)


def refused_request(role: Role, settings: WorkerSettings, lifecycle: Lifecycle) -> pb.RegisterWorkerRequest:
    """Say of a worker without an engine why it has none. It never takes requests."""
    record = pb.WorkerRecord(
        worker_id=lifecycle.instance_id,
        incarnation=lifecycle.incarnation,
        role=ROLE_TO_PROTO[role],
        model=settings.model,
        address=settings.bind,
        state=STATE_TO_PROTO[State.FAILED],
        reason=lifecycle.reason,
        engine=settings.engine,
    )
    return pb.RegisterWorkerRequest(worker=record, model=pb.ModelRecord(name=settings.model))
