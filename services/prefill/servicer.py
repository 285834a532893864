"""PrefillService on the wire; the only place of the prefill worker with protobuf messages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import grpc

from inferflux.clock import until_tick
from inferflux.errors import InvalidRequest, KvStale, TicketConflict, TicketExpired
from inferflux.tickets import Claimant
from inferflux.types import HttpAnswer, HttpCall, RequestContext, Transport
from inferflux.v1 import prefill_service_pb2 as pb
from inferflux.v1 import types_pb2
from inferflux.v1.prefill_service_pb2_grpc import PrefillServiceServicer
from inferflux.worker.leases import SessionLeases
from inferflux.worker.prefilling import Prefiller
from inferflux.worker.prefixes import CacheStatus
from inferflux.worker.sessions import PULSE_S
from inferflux.worker.worker import Worker

CALLERS = {
    "/inferflux.v1.PrefillService/": frozenset({"gateway"}),
    "/inferflux.v1.PrefillService/Claim": frozenset({"decode"}),
    "/inferflux.v1.PrefillService/Commit": frozenset({"decode"}),
    "/inferflux.v1.PrefillService/Handshake": frozenset({"decode"}),
}
VERDICTS = {
    "": pb.CLAIM_VERDICT_GRANTED,
    TicketConflict.kv_reason: pb.CLAIM_VERDICT_CONFLICT,
    TicketExpired.kv_reason: pb.CLAIM_VERDICT_EXPIRED,
    KvStale.kv_reason: pb.CLAIM_VERDICT_STALE,
}
MAX_TICKETS = 1024
Context = grpc.aio.ServicerContext[Any, Any]
_log = logging.getLogger(__name__)


class PrefillServicer(PrefillServiceServicer):
    """Callers are authorised by the server (see CALLERS) before anything here runs."""

    def __init__(self, worker: Worker, prefiller: Prefiller, leases: SessionLeases) -> None:
        self._worker = worker
        self._prefiller = prefiller
        self._leases = leases
        self._closed = asyncio.Event()

    def close(self) -> None:
        """End all watches."""
        self._closed.set()

    async def Prefill(self, request: pb.PrefillRequest, context: Context) -> pb.PrefillResponse:  # noqa: N802
        if not request.session_id:
            raise InvalidRequest("session_id is missing")
        result = await self._prefiller.prefill(
            RequestContext.from_proto(request.context), HttpCall.from_proto(request.call), request.session_id
        )
        if isinstance(result, HttpAnswer):
            return pb.PrefillResponse(answer=_answer(result))
        response = pb.PrefillResponse()
        response.prefilled.prompts.extend([prompt.to_proto() for prompt in result.prompts])
        response.engine_time.FromTimedelta(timedelta(seconds=result.engine_s))
        return response

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:  # noqa: N802
        num_released = self._prefiller.release(request.ticket_ids, request.request_ids, request.why)
        return pb.ReleaseResponse(num_released=num_released)

    async def Claim(self, request: pb.ClaimRequest, context: Context) -> pb.ClaimResponse:  # noqa: N802
        verdicts = _verdicts(self._prefiller.claim, request.claimant, request.tickets)
        return pb.ClaimResponse(verdicts=verdicts, incarnation=self._worker.lifecycle.incarnation)

    async def Commit(self, request: pb.CommitRequest, context: Context) -> pb.CommitResponse:  # noqa: N802
        return pb.CommitResponse(verdicts=_verdicts(self._prefiller.commit, request.claimant, request.tickets))

    async def Warm(self, request: pb.WarmRequest, context: Context) -> pb.WarmResponse:  # noqa: N802
        result = await self._prefiller.warm(
            RequestContext.from_proto(request.context), HttpCall.from_proto(request.call), request.pin
        )
        if isinstance(result, HttpAnswer):
            raise InvalidRequest(f"the application answered the call with {result.head.status}")
        return pb.WarmResponse(num_tokens=result)

    async def Unpin(self, request: pb.UnpinRequest, context: Context) -> pb.UnpinResponse:  # noqa: N802
        return pb.UnpinResponse(was_pinned=self._prefiller.unpin(request.name))

    async def GetCache(self, request: pb.GetCacheRequest, context: Context) -> pb.GetCacheResponse:  # noqa: N802
        return _cache(self._prefiller.cache_status())

    async def Watch(  # noqa: N802
        self, request: pb.WatchRequest, context: Context
    ) -> AsyncIterator[pb.WatchResponse]:
        if not request.session_id:
            raise InvalidRequest("session_id is missing")
        _log.info("watch opened", extra={"session_id": request.session_id, "gateway_id": request.gateway_id})
        with self._leases.open(request.session_id):
            while not self._closed.is_set():
                yield pb.WatchResponse(pulse=self._worker.pulse().to_proto())
                with suppress(TimeoutError):
                    async with asyncio.timeout(until_tick(PULSE_S)):
                        await self._closed.wait()

    async def Handshake(self, request: pb.HandshakeRequest, context: Context) -> pb.HandshakeResponse:  # noqa: N802
        worker, response = self._worker, pb.HandshakeResponse()
        if request.incarnation != worker.lifecycle.incarnation:
            raise KvStale(f"the arena of incarnation {request.incarnation[:64]} is gone")
        response.shm.host_id = worker.host_id
        if Transport.SHM in worker.settings.transports:
            response.shm.socket_path = str(worker.settings.arena_socket)
        if request.wants_nixl and worker.nixl is not None:
            peer = await asyncio.to_thread(worker.nixl.peer)
            response.nixl.CopyFrom(peer.to_proto())
        return response


def _verdicts(
    act: Callable[[str, Claimant, str], str], who: pb.Claimant, tickets: Sequence[pb.TicketRef]
) -> list[pb.ClaimVerdict.ValueType]:
    """Do one thing to all tickets, in one turn of the loop."""
    if not (who.worker_id and who.incarnation):
        raise InvalidRequest("the claimant is missing, or has no worker_id or incarnation")
    if len(tickets) > MAX_TICKETS:
        raise InvalidRequest(f"{len(tickets)} tickets in one call, at most {MAX_TICKETS}")
    claimant = Claimant(who.worker_id, who.incarnation)
    return [VERDICTS[act(ticket.ticket_id, claimant, ticket.incarnation)] for ticket in tickets]


def _cache(status: CacheStatus) -> pb.GetCacheResponse:
    slots, size = status.slots, status.block_size
    return pb.GetCacheResponse(
        block_size=size,
        num_slots=slots.num_slots,
        num_free_slots=slots.num_free,
        num_kept_slots=slots.num_kept,
        num_cached_slots=slots.num_named,
        num_pinned_slots=slots.num_pinned,
        max_pinned_slots=slots.max_pinned,
        num_peers=status.num_peers,
        pins=[pb.PinnedPrefix(name=pin.name, num_tokens=len(pin.slots) * size) for pin in status.pins],
        requests=status.requests,
        tokens=status.tokens,
        evictions=status.evictions,
    )


def _answer(answer: HttpAnswer) -> types_pb2.HttpAnswer:
    return types_pb2.HttpAnswer(head=answer.head.to_proto(), body=answer.body)
