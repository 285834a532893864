"""WorkerAdminService, the same on both roles."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import grpc

from inferflux.tickets import TicketRecord, TicketState
from inferflux.types import ROLE_TO_PROTO
from inferflux.v1 import worker_admin_service_pb2 as pb
from inferflux.v1.worker_admin_service_pb2_grpc import WorkerAdminServiceServicer
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

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:  # noqa: N802
        budget_s = request.budget.ToTimedelta().total_seconds() if request.HasField("budget") else 0.0
        self._worker.drain.begin(budget_s)
        return pb.DrainResponse(num_running=self._worker.work.num_running)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:  # noqa: N802
        lifecycle = self._worker.lifecycle
        return pb.GetStatusResponse(
            worker_id=lifecycle.instance_id,
            role=ROLE_TO_PROTO[self._worker.role],
            pulse=self._worker.pulse().to_proto(),
            reason=lifecycle.readiness().reason,
        )

    async def ListTickets(  # noqa: N802
        self, request: pb.ListTicketsRequest, context: Context
    ) -> pb.ListTicketsResponse:
        book = self._worker.book
        if book is None:
            return pb.ListTicketsResponse()
        counts = book.counts()
        return pb.ListTicketsResponse(
            tickets=map(_record, book.list()),
            num_issued=counts.issued,
            num_released=counts.released,
            num_expired=counts.expired,
            num_revoked=counts.revoked,
        )


def _record(record: TicketRecord) -> pb.TicketRecord:
    message = pb.TicketRecord(
        ticket_id=record.ticket_id,
        request_id=record.request_id,
        tenant=record.tenant,
        state=STATES[record.state],
        num_bytes=record.num_bytes,
    )
    message.age.FromTimedelta(timedelta(seconds=record.age_s))
    return message
