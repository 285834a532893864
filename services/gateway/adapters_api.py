"""The part of the admin API that is about LoRA adapters. Documents pass through: the registry knows them."""

from __future__ import annotations

from typing import Annotated, Any

import grpc
import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from inferflux.rpc.client import translated_errors
from inferflux.v1 import model_service_pb2 as pb
from inferflux.v1.model_service_pb2_grpc import ModelServiceStub
from services.gateway.documents import read, respond
from services.gateway.envelope import BodyLimits

LIMITS = BodyLimits(max_bytes=64 * 1024, max_depth=8)
TIMEOUT_S = 5.0
PATH = "/v1/admin/adapters"


class AdapterBody(BaseModel):
    """What POST /v1/admin/adapters takes; see the registry's AdapterSpec."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1, max_length=128)]
    model: Annotated[str, Field(min_length=1, max_length=128)]
    source: str
    tenants: list[str] = []
    is_pinned: bool = False


class AdaptersApi:
    """Handlers of the routes. `channel`: to the registry."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = ModelServiceStub(channel)

    def router(self) -> APIRouter:
        """Make the routes."""
        router = APIRouter()
        router.add_api_route(PATH, self.list_adapters, methods=["GET"])
        router.add_api_route(PATH, self.put_adapter, methods=["POST"])
        router.add_api_route(PATH + "/{name:path}", self.delete_adapter, methods=["DELETE"])
        return router

    async def list_adapters(self) -> Response:
        with translated_errors():
            answer = await self._stub.ListAdapters(pb.ListAdaptersRequest(), timeout=TIMEOUT_S)
        return respond({"object": "list", "data": orjson.loads(answer.adapters_json)})

    async def put_adapter(self, request: Request) -> Response:
        body = await read(request, AdapterBody, LIMITS)
        change = pb.PutAdapterRequest(adapter_json=orjson.dumps(body.model_dump()))
        with translated_errors():
            answer = await self._stub.PutAdapter(change, timeout=TIMEOUT_S)
        return Response(answer.adapter_json, 202, media_type="application/json")

    async def delete_adapter(self, name: str) -> Response:
        with translated_errors():
            await self._stub.DeleteAdapter(pb.DeleteAdapterRequest(name=name), timeout=TIMEOUT_S)
        return respond({"id": name, "object": "adapter", "deleted": True})
