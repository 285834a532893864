"""WorkerAdminService, the same on both roles."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc

from inferflux.errors import Conflict, InvalidRequest
from inferflux.tickets import TicketRecord, TicketState
from inferflux.types import ROLE_TO_PROTO
from inferflux.v1 import worker_admin_service_pb2 as pb
from inferflux.v1.worker_admin_service_pb2_grpc import WorkerAdminServiceServicer
from inferflux.worker.adapters import Adapters
from inferflux.worker.leases import SessionLeases
from inferflux.worker.ledger import Audit, Ledger
from inferflux.worker.worker import Worker

CALLERS = {"/inferflux.v1.WorkerAdminService/": frozenset({"operator", "registry", "gateway"})}
STATES = {
    TicketState.ISSUED: pb.TICKET_STATE_ISSUED,
    TicketState.CLAIMED: pb.TICKET_STATE_CLAIMED,
    TicketState.COMMITTED: pb.TICKET_STATE_COMMITTED,
    TicketState.RELEASED: pb.TICKET_STATE_RELEASED,
    TicketState.EXPIRED: pb.TICKET_STATE_EXPIRED,
    TicketState.REVOKED: pb.TICKET_STATE_REVOKED,
}
Context = grpc.aio.ServicerContext[Any, Any]


class AdminServicer(WorkerAdminServiceServicer):
    """Callers are authorised by the server (see CALLERS) before anything here runs."""

    def __init__(self, worker: Worker, ledger: Ledger | None, leases: SessionLeases) -> None:
        self._worker = worker
        self._ledger = ledger
        self._leases = leases

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:  # noqa: N802
        worker = self._worker
        worker.drain.begin(_budget_s(request))
        time_left_s, eta_s = worker.drain.time_left_s, worker.eta_s()
        response = pb.DrainResponse(
            num_running=worker.work.num_running,
            num_live_tickets=worker.book.counts().live if worker.book else 0,
            incarnation=worker.lifecycle.incarnation,
        )
        if time_left_s is not None:
            response.time_left.FromTimedelta(timedelta(seconds=time_left_s))
        if eta_s is not None:
            response.eta.FromTimedelta(timedelta(seconds=eta_s if time_left_s is None else min(eta_s, time_left_s)))
        return response

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:  # noqa: N802
        lifecycle, eta_s = self._worker.lifecycle, self._worker.eta_s()
        response = pb.GetStatusResponse(
            worker_id=lifecycle.instance_id,
            role=ROLE_TO_PROTO[self._worker.role],
            pulse=self._worker.pulse().to_proto(),
            reason=lifecycle.readiness().reason,
            num_running=self._worker.work.num_running,
            num_tokens=self._worker.meter.num_tokens,
            num_gateways=self._leases.num_open,
        )
        if eta_s is not None:
            response.eta.FromTimedelta(timedelta(seconds=eta_s))
        if (latency_s := self._worker.meter.latency_s()) is not None:
            response.latency.FromTimedelta(timedelta(seconds=latency_s))
        return response

    async def ListTickets(  # noqa: N802
        self, request: pb.ListTicketsRequest, context: Context
    ) -> pb.ListTicketsResponse:
        incarnation = self._worker.lifecycle.incarnation
        if self._ledger is None:
            return pb.ListTicketsResponse(incarnation=incarnation)
        audit = self._ledger.audit()
        if request.filter not in _FILTERS:
            raise InvalidRequest(f"filter: {request.filter} is none of {sorted(_FILTERS)}")
        records = _FILTERS[request.filter](audit)[: request.limit or None]
        return pb.ListTicketsResponse(
            tickets=[_record(record, is_leaked=record.ticket_id in audit.leaked) for record in records],
            num_issued=audit.counts.issued,
            num_released=audit.counts.released,
            num_expired=audit.counts.expired,
            num_revoked=audit.counts.revoked,
            num_live=audit.counts.live,
            num_leaked=len(audit.leaked),
            num_leaked_slots=audit.num_leaked_slots,
            incarnation=incarnation,
        )

    async def ProbePath(self, request: pb.ProbePathRequest, context: Context) -> pb.ProbePathResponse:  # noqa: N802
        if self._worker.paths is None:
            raise InvalidRequest("only decode workers read from others")
        probe = await self._worker.paths.probe(request.worker_id, request.incarnation, request.address)
        response = pb.ProbePathResponse(transport=probe.transport, num_bytes=probe.num_bytes)
        response.elapsed.FromTimedelta(timedelta(seconds=probe.elapsed_s))
        return response

    async def LoadAdapter(  # noqa: N802
        self, request: pb.LoadAdapterRequest, context: Context
    ) -> pb.LoadAdapterResponse:
        source = Path(request.source)
        if not source.is_absolute():
            raise InvalidRequest(f"source: {request.source[:256]!r} is no absolute path", param="source")
        load = _adapters(self._worker).load
        digest = await load(request.name, source, request.revision, is_pinned=request.is_pinned)
        return pb.LoadAdapterResponse(digest=digest)

    async def UnloadAdapter(  # noqa: N802
        self, request: pb.UnloadAdapterRequest, context: Context
    ) -> pb.UnloadAdapterResponse:
        await _adapters(self._worker).unload(request.name)
        return pb.UnloadAdapterResponse()


def _adapters(worker: Worker) -> Adapters:
    if worker.adapters is None:
        raise Conflict("this worker holds no adapters")
    return worker.adapters


def _budget_s(request: pb.DrainRequest) -> float | None:
    if not request.HasField("budget"):
        return None
    budget_s = request.budget.ToTimedelta().total_seconds()
    if budget_s < 0:
        raise InvalidRequest(f"budget: {budget_s:g} s is less than 0")
    return budget_s


_FILTERS: dict[int, Callable[[Audit], tuple[TicketRecord, ...]]] = {
    pb.TICKET_FILTER_UNSPECIFIED: lambda audit: (*audit.live, *audit.ended),
    pb.TICKET_FILTER_LIVE: lambda audit: audit.live,
    pb.TICKET_FILTER_LEAKED: lambda audit: tuple(r for r in audit.live if r.ticket_id in audit.leaked),
}


def _record(record: TicketRecord, *, is_leaked: bool) -> pb.TicketRecord:
    message = pb.TicketRecord(
        ticket_id=record.ticket_id,
        request_id=record.request_id,
        tenant=record.tenant,
        state=STATES[record.state],
        num_bytes=record.num_bytes,
        session_id=record.session_id,
        claimant=record.claimant,
        is_leaked=is_leaked,
    )
    message.age.FromTimedelta(timedelta(seconds=record.age_s))
    return message
