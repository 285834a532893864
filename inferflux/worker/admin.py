"""WorkerAdminService, the same on both roles."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import grpc

from inferflux.tickets import TicketRecord, TicketState
from inferflux.types import ROLE_TO_PROTO
from inferflux.v1 import worker_admin_service_pb2 as pb
from inferflux.v1.worker_admin_service_pb2_grpc import WorkerAdminServiceServicer
from inferflux.worker.drain import Drain
from inferflux.worker.worker import Worker

CALLERS = {"/inferflux.v1.WorkerAdminService/": frozenset({"operator", "registry", "gateway"})}
Context = grpc.aio.ServicerContext[object, object] if False else grpc.aio.ServicerContext

STATES = {
    TicketState.ISSUED: pb.TICKET_STATE_ISSUED,
    TicketState.CLAIMED: pb.TICKET_STATE_CLAIMED,
    TicketState.COMMITTED: pb.TICKET_STATE_COMMITTED,
    TicketState.RELEASED: pb.TICKET_STATE_RELEASED,
    TicketState.EXPIRED: pb.TICKET_STATE_EXPIRED,
    TicketState.REVOKED: pb.TICKET_STATE_REVOKED,
}
