"""The part of the admin API that is about workers and their tickets."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from inferflux.errors import InvalidRequest
from services.gateway import envelope
from services.gateway.asgi import header_map
from services.gateway.documents import respond, validate
from services.gateway.envelope import BodyLimits
from services.gateway.fleet import LIVE, Book, Counts, DrainBegun, Fleet, Member, Status, Ticket, Which

LIMITS = BodyLimits(max_bytes=4096, max_depth=4)
MAX_DRAIN_S = 86_400
DEFAULT_TICKETS, MAX_TICKETS = 100, 1000
FLAGS = {"true": True, "1": True, "false": False, "0": False}


class DrainBody(BaseModel):
    """What POST /v1/admin/workers/{worker_id}/drain takes. `drain_s`: None = as the worker was configured."""

    model_config = ConfigDict(extra="forbid", strict=True)

    drain_s: Annotated[float, Field(ge=0, le=MAX_DRAIN_S)] | None = None


class FleetApi:
    """Handlers of the routes."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def router(self) -> APIRouter:
        """Make the routes."""
        router, path = APIRouter(), "/v1/admin/workers"
        router.add_api_route(path, self.list_workers, methods=["GET"])
        router.add_api_route(path + "/{worker_id}", self.get_worker, methods=["GET"])
        router.add_api_route(path + "/{worker_id}/drain", self.drain_worker, methods=["POST"])
        router.add_api_route("/v1/admin/tickets", self.list_tickets, methods=["GET"])
        return router

    async def list_workers(self) -> Response:
        return respond({"object": "list", "data": [_worker(member) for member in self._fleet.members()]})

    async def get_worker(self, worker_id: str) -> Response:
        return respond(_status(await self._fleet.status(worker_id)))

    async def drain_worker(self, worker_id: str, request: Request) -> Response:
        return respond(_drain(await self._fleet.drain(worker_id, await _drain_s(request))), 202)

    async def list_tickets(self, request: Request) -> Response:
        query = TicketQuery(request)
        return respond(_ledger(await self._fleet.books(query.which, query.limit, query.worker_id), query.limit))


class TicketQuery:
    """The parameters of GET /v1/admin/tickets. Raises InvalidRequest for any that makes no sense."""

    def __init__(self, request: Request) -> None:
        params = dict(request.query_params)
        is_live, is_leaked = _flag(params.pop("live", "false"), "live"), _flag(params.pop("leaked", "false"), "leaked")
        self.which = Which.LEAKED if is_leaked else Which.LIVE if is_live else Which.ALL
        self.worker_id = params.pop("worker", None)
        self.limit = _number(params.pop("limit", str(DEFAULT_TICKETS)), "limit")
        for name in params:
            raise InvalidRequest(f"there is no parameter {name[:64]!r}: live, leaked, worker, limit", param=name[:64])


def _flag(text: str, name: str) -> bool:
    if text not in FLAGS:
        raise InvalidRequest(f"{name}: {text[:64]!r} is neither true nor false", param=name)
    return FLAGS[text]


def _number(text: str, name: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 9 and 1 <= int(text) <= MAX_TICKETS):
        raise InvalidRequest(f"{name}: {text[:64]!r} is not a number from 1 to {MAX_TICKETS}", param=name)
    return int(text)


async def _drain_s(request: Request) -> float | None:
    data = await envelope.read_body(request.receive, header_map(request.headers.raw), LIMITS)
    if not data:
        return None
    return validate(DrainBody, envelope.parse_object(data, LIMITS)).drain_s


def _worker(member: Member) -> dict[str, Any]:
    """Render a worker; its load is None when it is not connected."""
    worker, pulse = member.worker, member.pulse
    load = None
    if pulse is not None:
        load = {
            "running": pulse.num_running,
            "waiting": pulse.num_waiting,
            "queued_tokens": pulse.num_queued_tokens,
            "free_blocks": pulse.num_free_blocks,
            "blocks": pulse.num_blocks,
            "free_slots": pulse.num_free_slots,
            "slots": pulse.num_slots,
            "tickets": pulse.num_live_tickets,
            "assigned": member.num_assigned,
        }
    return {
        "id": worker.worker_id,
        "object": "worker",
        "role": worker.role,
        "model": worker.model,
        "host_id": worker.host_id,
        "transports": sorted(worker.transports),
        "incarnation": member.incarnation,
        "state": member.state,
        "load": load,
    }


def _status(status: Status) -> dict[str, Any]:
    own = {"requests": status.num_running, "reason": status.reason, "eta_s": status.eta_s}
    return _worker(status.member) | own


def _drain(begun: DrainBegun) -> dict[str, Any]:
    return {
        "id": begun.worker_id,
        "object": "worker",
        "incarnation": begun.incarnation,
        "state": "draining",
        "requests": begun.num_running,
        "tickets": begun.num_live_tickets,
        "eta_s": begun.eta_s,
        "drain_s": begun.time_left_s,
    }


def _ledger(books: list[Book], limit: int) -> dict[str, Any]:
    """Render tickets, live ones first, and the proof that they add up: of each worker and in all."""
    tickets = sorted((t for book in books for t in book.tickets), key=lambda t: t.state not in LIVE)
    total = sum((book.counts for book in books), Counts())
    return {
        "object": "list",
        "data": [_ticket(ticket) for ticket in tickets[:limit]],
        "workers": [_book(book) for book in books],
        "total": asdict(total),
        "balanced": all(not book.error and book.counts.is_balanced for book in books),
    }


def _book(book: Book) -> dict[str, Any]:
    if book.error:
        return {"id": book.worker_id, "incarnation": book.incarnation, "error": book.error, "balanced": None}
    counts = asdict(book.counts)
    return {"id": book.worker_id, "incarnation": book.incarnation, **counts, "balanced": book.counts.is_balanced}


def _ticket(ticket: Ticket) -> dict[str, Any]:
    return {
        "id": ticket.ticket_id,
        "object": "ticket",
        "worker": ticket.worker_id,
        "request_id": ticket.request_id,
        "tenant": ticket.tenant,
        "session_id": ticket.session_id,
        "state": ticket.state,
        "claimant": ticket.claimant or None,
        "bytes": ticket.num_bytes,
        "age_s": round(ticket.age_s, 3),
        "leaked": ticket.is_leaked,
    }
