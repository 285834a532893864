"""ModelService on the wire."""

# ruff: noqa: N802 - methods have the names that the protos give them

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc

from inferflux.errors import InvalidRequest
from inferflux.v1 import model_service_pb2 as pb
from inferflux.v1.model_service_pb2_grpc import ModelServiceServicer
from services.registry.deployments.adapter import AdapterSpec
from services.registry.deployments.deployer import FINAL, Deployer
from services.registry.deployments.deployment import ModelSpec
from services.registry.deployments.keeper import Keeper
from services.registry.directory import Directory

log = logging.getLogger(__name__)

SERVICE = "/inferflux.v1.ModelService/"
CALLERS = {SERVICE: frozenset({"operator", "gateway"})}
Context = grpc.aio.ServicerContext[Any, Any]


class ModelServicer(ModelServiceServicer):
    """Callers are authorised by the server (see CALLERS) before anything here runs."""

    def __init__(self, deployer: Deployer, keeper: Keeper, directory: Directory) -> None:
        self._deployer = deployer
        self._keeper = keeper
        self._directory = directory

    async def ListDeployments(self, request: pb.ListDeploymentsRequest, context: Context) -> pb.ListDeploymentsResponse:
        return pb.ListDeploymentsResponse(deployments_json=_dump(await self._deployer.documents()))

    async def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> pb.LoadModelResponse:
        spec = ModelSpec.from_json(_document(request.spec_json, "a model"))
        document = await self._deployer.load(replace(spec, revision=self._directory.now_ms()))
        log.info("model load", extra={"model": spec.model, "source": spec.source})
        return pb.LoadModelResponse(deployment_json=_dump(document))

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:
        document = await self._deployer.unload(request.model)
        log.info("model unload", extra={"model": request.model})
        return pb.UnloadModelResponse(deployment_json=_dump(document))

    async def WatchDeployment(
        self, request: pb.WatchDeploymentRequest, context: Context
    ) -> AsyncIterator[pb.WatchDeploymentResponse]:
        async for _, document in self._deployer.watch(request.model).watch():
            yield pb.WatchDeploymentResponse(deployment_json=_dump(document))
            if document["state"] in FINAL:
                return

    async def SetDefaultModel(self, request: pb.SetDefaultModelRequest, context: Context) -> pb.SetDefaultModelResponse:
        revision = await self._directory.set_default(request.model)
        log.info("default model set", extra={"model": request.model, "revision": revision})
        return pb.SetDefaultModelResponse(revision=revision)

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: Context) -> pb.ListAdaptersResponse:
        return pb.ListAdaptersResponse(adapters_json=_dump(await self._keeper.documents()))

    async def PutAdapter(self, request: pb.PutAdapterRequest, context: Context) -> pb.PutAdapterResponse:
        spec = AdapterSpec.from_json(_document(request.adapter_json, "an adapter"))
        document = await self._keeper.put(replace(spec, revision=self._directory.now_ms()))
        log.info("adapter put", extra={"adapter": spec.name, "model": spec.model})
        return pb.PutAdapterResponse(adapter_json=_dump(document))

    async def DeleteAdapter(self, request: pb.DeleteAdapterRequest, context: Context) -> pb.DeleteAdapterResponse:
        await self._keeper.delete(request.name)
        log.info("adapter deleted", extra={"adapter": request.name})
        return pb.DeleteAdapterResponse()


def _document(text: bytes, what: str) -> object:
    """Read what is wanted; its revision is ours to choose. Raises InvalidRequest."""
    try:
        document: object = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidRequest(f"{what} must be a JSON object", param="model") from e
    if isinstance(document, dict) and "revision" in document:
        raise InvalidRequest("unknown key 'revision'", param="revision")
    return document


def _dump(document: object) -> bytes:
    return json.dumps(document).encode()
