"""The part of the admin API that is about models that come and go. Documents pass through: the registry knows them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any

import grpc
import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from inferflux.errors import InferfluxError
from inferflux.rpc.client import translated_errors
from inferflux.v1 import model_service_pb2 as pb
from inferflux.v1.model_service_pb2_grpc import ModelServiceStub
from services.gateway.documents import read, respond
from services.gateway.envelope import BodyLimits

LIMITS = BodyLimits(max_bytes=64 * 1024, max_depth=8)
TIMEOUT_S = 5.0
PATH = "/v1/admin/models"
NDJSON = "application/x-ndjson"


class LoadBody(BaseModel):
    """What POST /v1/admin/models takes; see the registry's ModelSpec. `stream`: tell how far it is until it is over."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=128)]
    source: str = ""
    prefill: int = 1
    decode: int = 1
    settings: dict[str, str | int | bool] = {}
    drain_s: float = 60.0
    stream: bool = False


class DefaultBody(BaseModel):
    """What PUT /v1/admin/models/default takes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=128)]


class ModelsApi:
    """Handlers of the routes. `channel`: to the registry."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = ModelServiceStub(channel)

    def router(self) -> APIRouter:
        """Make the routes."""
        router = APIRouter()
        router.add_api_route(PATH, self.list_models, methods=["GET"])
        router.add_api_route(PATH, self.load_model, methods=["POST"])
        router.add_api_route(PATH + "/default", self.set_default, methods=["PUT"])
        router.add_api_route(PATH + "/{name:path}", self.unload_model, methods=["DELETE"])
        return router

    async def list_models(self) -> Response:
        with translated_errors():
            answer = await self._stub.ListDeployments(pb.ListDeploymentsRequest(), timeout=TIMEOUT_S)
        return respond({"object": "list", "data": orjson.loads(answer.deployments_json)})

    async def load_model(self, request: Request) -> Response:
        body = await read(request, LoadBody, LIMITS)
        spec = orjson.dumps(body.model_dump(exclude={"stream"}))
        with translated_errors():
            answer = await self._stub.LoadModel(pb.LoadModelRequest(spec_json=spec), timeout=TIMEOUT_S)
        return self._answer(body.model, answer.deployment_json, is_streamed=body.stream)

    async def unload_model(self, name: str, request: Request) -> Response:
        with translated_errors():
            answer = await self._stub.UnloadModel(pb.UnloadModelRequest(model=name), timeout=TIMEOUT_S)
        return self._answer(name, answer.deployment_json, is_streamed=request.query_params.get("stream") == "true")

    async def set_default(self, request: Request) -> Response:
        body = await read(request, DefaultBody, LIMITS)
        with translated_errors():
            answer = await self._stub.SetDefaultModel(pb.SetDefaultModelRequest(model=body.model), timeout=TIMEOUT_S)
        return respond({"id": body.model, "object": "model", "is_default": True, "revision": answer.revision})

    def _answer(self, model: str, document: bytes, *, is_streamed: bool) -> Response:
        if is_streamed:
            return StreamingResponse(self._lines(model), 202, media_type=NDJSON)
        return Response(document, 202, media_type="application/json")

    async def _lines(self, model: str) -> AsyncIterator[bytes]:
        """Write the deployment each time it changes, until it is over; an error of the way ends it as a line."""
        try:
            async with aclosing(self._news(model)) as news:
                async for document in news:
                    yield document + b"\n"
        except InferfluxError as e:
            yield orjson.dumps({"error": e.message, "state": "unknown"}) + b"\n"

    async def _news(self, model: str) -> AsyncGenerator[bytes]:
        call = self._stub.WatchDeployment(pb.WatchDeploymentRequest(model=model))
        try:
            with translated_errors():
                async for message in call:
                    yield message.deployment_json
        finally:
            call.cancel()
