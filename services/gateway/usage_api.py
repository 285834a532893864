"""The part of the admin API that shows what has been used of limits, by all gateways together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from inferflux.errors import InvalidRequest
from inferflux.policy.limits import MICRO, Limits, Unit
from services.gateway.documents import respond
from services.gateway.limits_client import CounterUsage, LimitsClient


class UsageApi:
    """Handlers of the routes. `limits` gives those in force."""

    def __init__(self, client: LimitsClient, limits: Callable[[], Limits | None]) -> None:
        self._client = client
        self._limits = limits

    def router(self) -> APIRouter:
        """Make the routes."""
        router = APIRouter()
        router.add_api_route("/v1/admin/usage", self.show, methods=["GET"])
        return router

    async def show(self, request: Request) -> Response:
        """List counters, of one tenant or of all."""
        params = dict(request.query_params)
        tenant = params.pop("tenant", "")
        for name in params:
            raise InvalidRequest(f"there is no parameter {name[:64]!r}: tenant", param=name[:64])
        usages, limits = await self._client.usage(tenant), self._limits()
        return respond({"object": "list", "data": [_document(usage, limits) for usage in usages]})


def _document(usage: CounterUsage, limits: Limits | None) -> dict[str, Any]:
    """Render a counter; `limit` is None when there is none any more. Money in dollars, times in seconds."""
    name, scale = usage.name, MICRO if usage.name.kind.unit is Unit.MICRO_USD else 1
    found = limits.amounts(name.scope, name.owner) if limits is not None else ()
    most = next((limit.most for limit in found if limit.kind is name.kind), None)
    return {
        "object": "usage",
        "scope": name.scope,
        "owner": name.owner,
        "kind": name.kind,
        "used": usage.used / scale if scale > 1 else usage.used,
        "limit": None if most is None else most / scale if scale > 1 else most,
        "reset_s": round(usage.reset_s, 3),
    }
