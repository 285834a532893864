"""The part of PolicyService that is about the audit log."""

# ruff: noqa: N802 - methods have the names that the protos give them

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC
from typing import Any, cast

import grpc

from inferflux.errors import InvalidRequest
from inferflux.rpc.mtls import caller_role
from inferflux.v1 import policy_service_pb2 as pb
from inferflux.v1.policy_service_pb2_grpc import PolicyServiceServicer
from services.policy.audit_log import AuditLog

OPERATOR = "operator"
DEFAULT_LIMIT, MAX_LIMIT = 100, 10_000
Context = grpc.aio.ServicerContext[Any, Any]


class AuditServicer(PolicyServiceServicer):
    """Callers are authorised by the server before anything here runs."""

    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit

    async def AppendAudit(self, request: pb.AppendAuditRequest, context: Context) -> pb.AppendAuditResponse:
        await self._audit.append(list(request.records))
        return pb.AppendAuditResponse()

    async def ListAudit(self, request: pb.ListAuditRequest, context: Context) -> pb.ListAuditResponse:
        limit = request.limit or DEFAULT_LIMIT
        if limit > MAX_LIMIT:
            raise InvalidRequest(f"limit is {limit}, at most {MAX_LIMIT} records are listed", param="limit")
        since = ""
        if request.HasField("since"):
            since = request.since.ToDatetime(UTC).isoformat(timespec="milliseconds")
        return pb.ListAuditResponse(lines=await self._audit.search(dict(request.fields), since, limit))

    async def _will(self, context: Context, action: str, target: str) -> None:
        """Write down what an operator is about to do; gateways do so themselves. Raises AuditUnavailable."""
        if caller_role(cast("Mapping[str, list[bytes]]", context.auth_context())) == OPERATOR:
            await self._audit.act(OPERATOR, action, target)
