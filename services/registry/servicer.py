"""RegistryService on the wire: checks what comes in, calls the directory, is the only place with protobuf messages."""

# ruff: noqa: N802 - methods have the names that the protos give them

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any, cast

import grpc

from inferflux.errors import InvalidRequest, PermissionDenied
from inferflux.rpc.mtls import caller_role
from inferflux.types import ROLE_FROM_PROTO, ROLE_TO_PROTO, STATE_FROM_PROTO, STATE_TO_PROTO, ModelFingerprint, Role
from inferflux.v1 import registry_service_pb2 as pb
from inferflux.v1.registry_service_pb2_grpc import RegistryServiceServicer
from services.registry.directory import Content, Directory
from services.registry.models import Model
from services.registry.releases import Release, Version, is_key_id
from services.registry.store import RegistryStore
from services.registry.workers import HeldAdapter, Worker

log = logging.getLogger(__name__)

SERVICE = "/inferflux.v1.RegistryService/"
WORKERS = frozenset(Role)
ADMINISTRATORS = frozenset({"operator", "gateway"})
OPERATOR = frozenset({"operator"})
CALLERS = {
    SERVICE + "RegisterWorker": WORKERS,
    SERVICE + "DeregisterWorker": WORKERS,
    SERVICE + "WatchSnapshot": frozenset({"gateway"}),
    SERVICE + "PutModel": ADMINISTRATORS,
    SERVICE + "DeleteModel": ADMINISTRATORS,
    SERVICE + "PushVersion": OPERATOR,
    SERVICE + "PromoteVersion": OPERATOR,
    SERVICE + "RollBackVersion": OPERATOR,
    SERVICE + "GetHistory": OPERATOR,
    SERVICE + "RevokeSigningKey": OPERATOR,
    SERVICE + "GetModelRules": WORKERS | OPERATOR,
}
COALESCE_S = 0.02
"""Shortest time between two snapshots on one watch: a cluster that starts is a few messages, not one per worker."""

Context = grpc.aio.ServicerContext[Any, Any]


class RegistryServicer(RegistryServiceServicer):
    """Callers are authorised by the server (see CALLERS) before anything here runs."""

    def __init__(self, directory: Directory, store: RegistryStore) -> None:
        self._directory = directory
        self._store = store
        self._snapshot = pb.RegistrySnapshot()

    async def RegisterWorker(self, request: pb.RegisterWorkerRequest, context: Context) -> pb.RegisterWorkerResponse:
        worker, model = _to_worker(request.worker), _to_model(request.model)
        _require_role(context, worker.role)
        if worker.model != model.name:
            raise InvalidRequest(f"worker serves {worker.model!r}, its model record is {model.name!r}", param="model")
        self._directory.register(worker, model)
        response = pb.RegisterWorkerResponse()
        response.lease.FromTimedelta(timedelta(seconds=self._directory.leases.lease_s))
        return response

    async def DeregisterWorker(
        self, request: pb.DeregisterWorkerRequest, context: Context
    ) -> pb.DeregisterWorkerResponse:
        if known := self._directory.leases.find(request.worker_id):
            _require_role(context, known.role)
        self._directory.deregister(request.worker_id, request.incarnation)
        return pb.DeregisterWorkerResponse()

    async def WatchSnapshot(
        self, request: pb.WatchRegistryRequest, context: Context
    ) -> AsyncIterator[pb.WatchRegistryResponse]:
        log.info("watch opened", extra={"gateway_id": request.gateway_id, "gateway_revision": request.revision})
        await self._directory.overtake(request.revision)
        async for revision, content in self._directory.feed.watch(at_least=request.revision):
            yield pb.WatchRegistryResponse(snapshot=self._to_snapshot(revision, content))
            await asyncio.sleep(COALESCE_S)

    async def PutModel(self, request: pb.PutModelRequest, context: Context) -> pb.PutModelResponse:
        model = _to_model(request.model)
        revision = await self._directory.put_model(model)
        log.info("model put", extra={"model": model.name, "revision": revision})
        return pb.PutModelResponse(revision=revision)

    async def DeleteModel(self, request: pb.DeleteModelRequest, context: Context) -> pb.DeleteModelResponse:
        revision = await self._directory.delete_model(request.name)
        log.info("model deleted", extra={"model": request.name, "revision": revision})
        return pb.DeleteModelResponse(revision=revision)

    async def PushVersion(self, request: pb.PushVersionRequest, context: Context) -> pb.PushVersionResponse:
        pushed = request.version
        name, version = Version.make(pushed.key_id, pushed.source, pushed.manifest, pushed.signature)
        if (name, version.version) != (pushed.model, pushed.version):
            raise InvalidRequest("the manifest is about another model or version", param="manifest")
        await self._store.edit_release(name, lambda release: release.push(version, self._directory.now_ms()))
        _log_release("push", name, version.version)
        return pb.PushVersionResponse()

    async def PromoteVersion(self, request: pb.PromoteVersionRequest, context: Context) -> pb.PromoteVersionResponse:
        release = await self._store.edit_release(
            request.model, lambda release: release.promote(request.version, self._directory.now_ms())
        )
        _log_release("promote", request.model, release.current)
        return pb.PromoteVersionResponse(floor=release.floor)

    async def RollBackVersion(self, request: pb.RollBackVersionRequest, context: Context) -> pb.RollBackVersionResponse:
        release = await self._store.edit_release(
            request.model, lambda release: release.roll_back(self._directory.now_ms())
        )
        _log_release("rollback", request.model, release.current)
        return pb.RollBackVersionResponse(version=release.current)

    async def GetHistory(self, request: pb.GetHistoryRequest, context: Context) -> pb.GetHistoryResponse:
        return _from_release(request.model, await self._store.release(request.model))

    async def RevokeSigningKey(
        self, request: pb.RevokeSigningKeyRequest, context: Context
    ) -> pb.RevokeSigningKeyResponse:
        if not is_key_id(request.key_id):
            raise InvalidRequest("key_id must be a SHA-256 in lower-case hex", param="key_id")
        await self._store.revoke_key(request.key_id)
        log.warning("signing key revoked", extra={"key_id": request.key_id})
        return pb.RevokeSigningKeyResponse()

    async def GetModelRules(self, request: pb.GetModelRulesRequest, context: Context) -> pb.GetModelRulesResponse:
        release, revoked, revision = await self._store.rules(request.model)
        return pb.GetModelRulesResponse(floor=release.floor, revoked_key_ids=sorted(revoked), revision=revision)

    def _to_snapshot(self, revision: int, content: Content) -> pb.RegistrySnapshot:
        """Convert a version once for all watchers."""
        if self._snapshot.revision != revision:
            workers, models = map(_from_worker, content.workers), map(_from_model, content.models)
            self._snapshot = pb.RegistrySnapshot(revision=revision, workers=workers, models=models)
        return self._snapshot


def _require_role(context: Context, role: Role) -> None:
    """A prefill worker's certificate speaks for prefill workers only."""
    caller = caller_role(cast("dict[str, list[bytes]]", context.auth_context()))
    if caller != role:
        raise PermissionDenied(f"role {caller or 'unknown'} may not speak for a {role} worker")


def _to_worker(record: pb.WorkerRecord) -> Worker:
    if record.role not in ROLE_FROM_PROTO or record.state not in STATE_FROM_PROTO:
        raise InvalidRequest("worker needs a role and a state", param="worker")
    return Worker(
        worker_id=record.worker_id,
        incarnation=record.incarnation,
        role=ROLE_FROM_PROTO[record.role],
        model=record.model,
        address=record.address,
        state=STATE_FROM_PROTO[record.state],
        fingerprint=ModelFingerprint.from_proto(record.fingerprint),
        reason=record.reason,
        host_id=record.host_id,
        engine=record.engine,
        max_model_len=record.max_model_len,
        max_num_seqs=record.max_num_seqs,
        transports=tuple(record.transports),
        adapters=tuple(HeldAdapter(held.name, held.revision, held.digest) for held in record.adapters),
        max_adapters=record.max_adapters,
    )


def _from_worker(worker: Worker) -> pb.WorkerRecord:
    return pb.WorkerRecord(
        worker_id=worker.worker_id,
        incarnation=worker.incarnation,
        role=ROLE_TO_PROTO[worker.role],
        model=worker.model,
        address=worker.address,
        state=STATE_TO_PROTO[worker.state],
        fingerprint=worker.fingerprint.to_proto(),
        reason=worker.reason,
        host_id=worker.host_id,
        engine=worker.engine,
        max_model_len=worker.max_model_len,
        max_num_seqs=worker.max_num_seqs,
        transports=worker.transports,
        adapters=[pb.HeldAdapter(name=a.name, revision=a.revision, digest=a.digest) for a in worker.adapters],
        max_adapters=worker.max_adapters,
    )


def _to_model(record: pb.ModelRecord) -> Model:
    return Model(
        name=record.name,
        digest=record.digest,
        dtype=record.dtype,
        max_model_len=record.max_model_len,
        capabilities=tuple(record.capabilities),
        created_at_ms=record.created_at.ToMilliseconds() if record.HasField("created_at") else 0,
        is_default=record.is_default,
        version=record.version,
        signed_by=record.signed_by,
    )


def _from_model(model: Model) -> pb.ModelRecord:
    record = pb.ModelRecord(
        name=model.name,
        digest=model.digest,
        dtype=model.dtype,
        max_model_len=model.max_model_len,
        capabilities=model.capabilities,
        is_default=model.is_default,
        version=model.version,
        signed_by=model.signed_by,
        parent=model.parent,
        tenants=model.tenants,
    )
    record.created_at.FromMilliseconds(model.created_at_ms)
    return record


def _from_release(model: str, release: Release) -> pb.GetHistoryResponse:
    """Convert all versions of a model."""
    response = pb.GetHistoryResponse(current=release.current, floor=release.floor)
    for version in release.versions:
        record = response.versions.add(
            model=model,
            version=version.version,
            weights_digest=version.weights_digest,
            key_id=version.key_id,
            source=version.source,
            manifest=base64.b64decode(version.manifest),
            signature=base64.b64decode(version.signature),
        )
        record.pushed_at.FromMilliseconds(version.pushed_at_ms)
    for event in release.events:
        response.events.add(action=event.action, version=event.version).at.FromMilliseconds(event.at_ms)
    return response


def _log_release(action: str, model: str, version: int) -> None:
    log.info("model %s", action, extra={"model": model, "version": version})
