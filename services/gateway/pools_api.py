"""The part of the admin API that is about pools and their planner. Documents pass through: the registry knows them."""

from __future__ import annotations

from typing import Annotated, Any

import grpc
import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from inferflux.rpc.client import translated_errors
from inferflux.v1 import pool_service_pb2 as pb
from inferflux.v1.pool_service_pb2_grpc import PoolServiceStub
from services.gateway.documents import read, respond
from services.gateway.envelope import BodyLimits

LIMITS = BodyLimits(max_bytes=256 * 1024, max_depth=8)
TIMEOUT_S = 5.0
PATH = "/v1/admin/pools"


class PutBody(BaseModel):
    """What PUT /v1/admin/pools takes. `expected_revision`: that was edited; 0 or none = replace any."""

    model_config = ConfigDict(extra="forbid", strict=True)

    pools: list[dict[str, Any]]
    expected_revision: Annotated[int, Field(ge=0, lt=2**62)] = 0


class PoolsApi:
    """Handlers of the routes. `channel`: to the registry."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = PoolServiceStub(channel)

    def router(self) -> APIRouter:
        """Make the routes."""
        router = APIRouter()
        router.add_api_route(PATH, self.list_pools, methods=["GET"])
        router.add_api_route(PATH, self.put_pools, methods=["PUT"])
        return router

    async def list_pools(self) -> Response:
        with translated_errors():
            answer = await self._stub.ListPools(pb.ListPoolsRequest(), timeout=TIMEOUT_S)
        return respond({"object": "list", "data": orjson.loads(answer.pools_json), "revision": answer.revision})

    async def put_pools(self, request: Request) -> Response:
        body = await read(request, PutBody, LIMITS)
        change = pb.PutPoolsRequest(pools_json=orjson.dumps(body.pools), revision=body.expected_revision)
        with translated_errors():
            answer = await self._stub.PutPools(change, timeout=TIMEOUT_S)
        return respond({"object": "pools", "revision": answer.revision})
