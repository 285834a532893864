"""The part of the admin API that is about the audit log, and the way to it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import grpc
import orjson
from fastapi import APIRouter, Request, Response

from inferflux.errors import InvalidRequest
from inferflux.rpc.client import translated_errors
from inferflux.v1 import policy_service_pb2 as pb
from inferflux.v1.policy_service_pb2_grpc import PolicyServiceStub
from services.gateway.documents import respond
from services.gateway.policy_api import limit

APPEND_TIMEOUT_S, SEARCH_TIMEOUT_S = 3.0, 20.0
FIELDS = frozenset(("kind", "actor", "key_id", "tenant", "request_id", "reason", "path", "gateway", "prompt_hash"))


class AuditTrail:
    """Calls to the policy service. All of them raise InferfluxError."""

    def __init__(self, channel: grpc.aio.Channel, gateway_id: str) -> None:
        self._stub: Any = PolicyServiceStub(channel)
        self._gateway_id = gateway_id

    async def append(self, records: list[bytes]) -> None:
        """Write records; they are on the service's disk when this returns. Idempotent."""
        request = pb.AppendAuditRequest(source=self._gateway_id, records=records)
        with translated_errors():
            await self._stub.AppendAudit(request, timeout=APPEND_TIMEOUT_S)

    async def search(self, fields: dict[str, str], since: datetime | None, most: int) -> list[bytes]:
        """Find the newest records with these fields; returns their lines, oldest first."""
        request = pb.ListAuditRequest(limit=most, fields=fields)
        if since is not None:
            request.since.FromDatetime(since)
        with translated_errors():
            answer = await self._stub.ListAudit(request, timeout=SEARCH_TIMEOUT_S)
        return list(answer.lines)


class AuditApi:
    """Handlers of the routes."""

    def __init__(self, trail: AuditTrail) -> None:
        self._trail = trail

    def router(self) -> APIRouter:
        """Make the routes."""
        router = APIRouter()
        router.add_api_route("/v1/admin/audit", self.search, methods=["GET"])
        return router

    async def search(self, request: Request) -> Response:
        """Find records: the parameters are `limit`, `since` and the fields that they must have."""
        fields = {name: value for name, value in request.query_params.items() if name not in ("limit", "since")}
        for name in fields.keys() - FIELDS:
            known = ", ".join(sorted(FIELDS))
            raise InvalidRequest(f"there is no parameter {name[:64]!r}: limit, since, {known}", param=name[:64])
        lines = await self._trail.search(fields, _since(request), limit(request))
        return respond({"object": "list", "data": [orjson.loads(line) for line in lines]})


def _since(request: Request) -> datetime | None:
    text = request.query_params.get("since")
    if text is None:
        return None
    try:
        since = datetime.fromisoformat(text)
    except ValueError as e:
        raise InvalidRequest(f"since: {text[:64]!r} is no time in ISO 8601", param="since") from e
    return since if since.tzinfo is not None else since.replace(tzinfo=UTC)
