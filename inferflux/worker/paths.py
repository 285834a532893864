"""How this decode worker reads from each prefill worker: chosen once per pair, shm before nixl before computing again.

shm is for pairs on one host whose sockets meet; those of two containers may not. nixl takes one handshake over gRPC,
which many requests may wait for but only one makes. What was chosen holds until the prefill worker starts anew or a
read fails.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from inferflux.engine.base import KvSource
from inferflux.errors import InferfluxError, KvError, KvUnreachable
from inferflux.kv import shm
from inferflux.kv.transport import open_reader
from inferflux.rpc.client import open_channel, translated_errors
from inferflux.rpc.mtls import Identity
from inferflux.telemetry import metrics
from inferflux.types import ArenaPath, NixlPeer, Transport
from inferflux.v1 import prefill_service_pb2 as pb
from inferflux.v1.prefill_service_pb2_grpc import PrefillServiceStub

SHM_TIMEOUT_S = 0.5
# The owner's first answer opens its agent, about a second on a busy machine.
HANDSHAKE_TIMEOUT_S = 5.0
SHARE_OF_DEADLINE = 0.25
RECOMPUTE = "recompute"
PROBE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Owner:
    """A prefill worker as a ticket or the registry describes it. Empty `socket_path`, `address`: not offered."""

    worker_id: str
    incarnation: str
    host_id: str
    socket_path: str
    address: str

    @classmethod
    def of(cls, source: KvSource) -> Owner:
        return cls(source.worker_id, source.incarnation, source.host_id, source.socket_path, source.address)


@dataclass(frozen=True, slots=True)
class Probe:
    """What a probe read, and how long that took once the path was open."""

    transport: Transport
    num_bytes: int
    elapsed_s: float


def note_speed(path: ArenaPath, num_bytes: int, elapsed_s: float) -> None:
    """Remember how fast a path was last."""
    metrics.KV_PATH_GBPS.labels(path.worker_id, path.transport).set(num_bytes / elapsed_s / 1e9)


class Paths:
    """The paths of one decode worker. All methods on one event loop."""

    def __init__(self, identity: Identity | None, host_id: str, transports: Sequence[Transport]) -> None:
        self._identity = identity
        self._host_id = host_id
        self._transports = transports
        self._paths: dict[str, tuple[str, asyncio.Task[ArenaPath]]] = {}

    async def connect(self, source: KvSource, time_left_s: float | None = None) -> KvSource:
        """Return the source with a path to it. Raises KvError when there is none.

        Takes no more than a part of the time left: without the blocks the prompt is still to be computed.
        """
        timeout_s = None if time_left_s is None else time_left_s * SHARE_OF_DEADLINE
        try:
            async with asyncio.timeout(timeout_s):
                path = await self.find(Owner.of(source))
        except TimeoutError:
            raise KvUnreachable(f"worker {source.worker_id} takes too long") from None
        return replace(source, transport=path.transport, peer=path.peer)

    async def find(self, owner: Owner) -> ArenaPath:
        """Return the path to a worker's arena, opening it if it is new. Raises KvError."""
        incarnation, task = self._paths.get(owner.worker_id, ("", None))
        if task is None or incarnation != owner.incarnation:
            task = asyncio.create_task(self._choose(owner), name=f"path-{owner.worker_id}")
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # even when nobody waits on
            self._paths[owner.worker_id] = owner.incarnation, task
        try:
            return await asyncio.shield(task)  # who gives up leaves it to the others
        except KvError:
            self._forget(owner)
            raise

    def lost(self, source: KvSource) -> None:
        """Note that a read failed: the path is chosen anew for the next one."""
        metrics.TRANSPORT_FALLBACK.labels(source.transport, RECOMPUTE).inc()
        self._forget(Owner.of(source))

    async def probe(self, worker_id: str, incarnation: str, address: str) -> Probe:
        """Read some of a prefill worker's arena, as a request would. Raises KvError."""
        answer = await self._ask(address, incarnation, wants_nixl=False)
        owner = Owner(worker_id, incarnation, answer.shm.host_id, answer.shm.socket_path, address)
        path = await self.find(owner)
        try:
            num_bytes, elapsed_s = await asyncio.to_thread(_read_some, path)
        except KvUnreachable:
            self._forget(owner)
            raise
        note_speed(path, num_bytes, elapsed_s)
        return Probe(path.transport, num_bytes, elapsed_s)

    def close(self) -> None:
        """Give up handshakes that run."""
        for _, task in self._paths.values():
            task.cancel()

    def _forget(self, owner: Owner) -> None:
        if self._paths.get(owner.worker_id, ("",))[0] == owner.incarnation:
            del self._paths[owner.worker_id]

    async def _choose(self, owner: Owner) -> ArenaPath:
        wants_shm = Transport.SHM in self._transports and owner.socket_path and owner.host_id == self._host_id
        wants_nixl = Transport.NIXL in self._transports and owner.address
        if wants_shm:
            if await asyncio.to_thread(shm.is_served, owner.socket_path, SHM_TIMEOUT_S):
                return ArenaPath(Transport.SHM, owner.worker_id, owner.incarnation, owner.socket_path)
            metrics.TRANSPORT_FALLBACK.labels(Transport.SHM, Transport.NIXL if wants_nixl else RECOMPUTE).inc()
        if wants_nixl:
            return await self._shake_hands(owner)
        raise KvUnreachable(f"no common transport with worker {owner.worker_id} on host {owner.host_id}")

    async def _shake_hands(self, owner: Owner) -> ArenaPath:
        try:
            answer = await self._ask(owner.address, owner.incarnation, wants_nixl=True)
            if not answer.HasField("nixl"):
                raise KvUnreachable(f"worker {owner.worker_id} does not offer nixl")
        except KvError:
            metrics.TRANSPORT_FALLBACK.labels(Transport.NIXL, RECOMPUTE).inc()
            raise
        peer = NixlPeer.from_proto(answer.nixl)
        return ArenaPath(Transport.NIXL, owner.worker_id, owner.incarnation, peer=peer)

    async def _ask(self, address: str, incarnation: str, *, wants_nixl: bool) -> pb.HandshakeResponse:
        """Make the handshake. Raises KvStale when the worker has started anew, KvUnreachable when it is gone."""
        if self._identity is None:
            raise KvUnreachable("this worker has no certificate to shake hands with")
        request = pb.HandshakeRequest(incarnation=incarnation, wants_nixl=wants_nixl)
        async with open_channel(address, self._identity, "prefill") as channel:
            try:
                with translated_errors():
                    return await PrefillServiceStub(channel).Handshake(request, timeout=HANDSHAKE_TIMEOUT_S)
            except KvError:
                raise
            except InferfluxError as e:
                raise KvUnreachable(f"no handshake at {address}: {e.message}") from e


def _read_some(path: ArenaPath) -> tuple[int, float]:
    """Copy slots as they lie there; returns bytes and seconds. The first read, which connects, is not counted."""
    with closing(open_reader(path)) as reader:
        slots = range(min(reader.num_slots, max(1, PROBE_BYTES // reader.slot_bytes)))
        copy = np.ones((len(slots), reader.slot_bytes), np.uint8)
        reader.read(slots[:1], lambda i, block: np.copyto(copy[i], block))
        started_at = time.perf_counter()
        reader.read(slots, lambda i, block: np.copyto(copy[i], block))
        return copy.nbytes, time.perf_counter() - started_at
