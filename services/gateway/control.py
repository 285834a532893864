"""The gateway's side of the policy and registry services: their messages become our values here and nowhere else."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import grpc

from inferflux.errors import PolicyInvalid
from inferflux.policy.document import EMPTY
from inferflux.policy.identity import key_id
from inferflux.policy.signature import Verifier
from inferflux.rpc.client import translated_errors
from inferflux.telemetry import metrics
from inferflux.types import ROLE_FROM_PROTO, STATE_FROM_PROTO, ModelFingerprint
from inferflux.v1 import policy_service_pb2 as policy_pb
from inferflux.v1 import registry_service_pb2 as registry_pb
from inferflux.v1 import types_pb2
from inferflux.v1.policy_service_pb2_grpc import PolicyServiceStub
from inferflux.v1.registry_service_pb2_grpc import RegistryServiceStub
from services.gateway.auth import Key, KeyRing, Principal, cache_salt
from services.gateway.endpoints import Scope
from services.gateway.policy import Compiler, Policies, Source
from services.gateway.views import ClusterView, FailedWorker, Model, Worker

ADMIN_TIMEOUT_S = 5.0
_log = logging.getLogger(__name__)
_SCOPES = {
    Scope.GENERATE: policy_pb.SCOPE_GENERATE,
    Scope.READ: policy_pb.SCOPE_READ,
    Scope.ADMIN: policy_pb.SCOPE_ADMIN,
}
_SCOPES_FROM_PROTO = {number: scope for scope, number in _SCOPES.items()}


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """One API key without its hash."""

    key_id: str
    name: str
    tenant: str
    scopes: tuple[Scope, ...]
    priority: int
    created_at: datetime
    expires_at: datetime | None
    team: str
    roles: tuple[str, ...]
    models: tuple[str, ...] | None
    previous_until: datetime | None


@dataclass(frozen=True, slots=True)
class NewKey:
    """What to create. `secret` empty: the service makes one. `models` None: no restriction."""

    name: str
    scopes: tuple[Scope, ...]
    tenant: str = ""
    priority: int = 0
    expires_at: datetime | None = None
    secret: str = field(default="", repr=False)
    team: str = ""
    roles: tuple[str, ...] = ()
    models: tuple[str, ...] | None = None


class PolicyClient:
    """Calls to the policy service. `tenant_key` makes the salts that separate tenants' prefix caches."""

    def __init__(self, channel: grpc.aio.Channel, gateway_id: str, tenant_key: bytes, verifier: Verifier) -> None:
        self._stub: Any = PolicyServiceStub(channel)
        self._gateway_id = gateway_id
        self._tenant_key = tenant_key
        self._verifier = verifier
        self._compiler = Compiler()
        self._revoked: set[str] = set()

    async def watch(self, revision: int) -> AsyncGenerator[Policies]:
        """Yield the current policies and each later one. Raises InferfluxError when the stream ends badly."""
        revoked = sorted(self._revoked)
        request = policy_pb.WatchSnapshotRequest(gateway_id=self._gateway_id, revision=revision, revoked=revoked)
        call = self._stub.WatchSnapshot(request)
        try:
            with translated_errors():
                async for message in call:
                    if (policies := self._to_policies(message)) is not None:
                        yield policies
        finally:
            call.cancel()

    async def create_key(self, key: NewKey) -> tuple[KeyInfo, str, int]:
        """Create a key; returns it, its secret and the revision that has it. Raises InferfluxError."""
        request = policy_pb.CreateKeyRequest(
            name=key.name,
            tenant=key.tenant,
            scopes=[_SCOPES[scope] for scope in key.scopes],
            priority=key.priority,
            secret=key.secret,
            team=key.team,
            roles=key.roles,
            models=policy_pb.ModelList(names=key.models) if key.models is not None else None,
        )
        if key.expires_at is not None:
            request.expires_at.FromDatetime(key.expires_at)
        with translated_errors():
            answer = await self._stub.CreateKey(request, timeout=ADMIN_TIMEOUT_S)
        return _to_key_info(answer.key), answer.secret, answer.revision

    async def list_keys(self) -> tuple[list[KeyInfo], int]:
        """Return all live keys and their revision. Raises InferfluxError."""
        with translated_errors():
            answer = await self._stub.ListKeys(policy_pb.ListKeysRequest(), timeout=ADMIN_TIMEOUT_S)
        return [_to_key_info(key) for key in answer.keys], answer.revision

    async def revoke_key(self, key_id: str) -> int:
        """Revoke a key; returns the revision without it. Raises NotFound or another InferfluxError."""
        with translated_errors():
            answer = await self._stub.RevokeKey(policy_pb.RevokeKeyRequest(key_id=key_id), timeout=ADMIN_TIMEOUT_S)
        return int(answer.revision)

    async def rotate_key(self, key_id: str, grace_s: float, secret: str = "") -> tuple[KeyInfo, str, int]:
        """Give a key a new secret; returns as `create_key` does. Raises NotFound or another InferfluxError."""
        request = policy_pb.RotateKeyRequest(key_id=key_id, secret=secret)
        request.grace.FromMilliseconds(int(grace_s * 1000))
        with translated_errors():
            answer = await self._stub.RotateKey(request, timeout=ADMIN_TIMEOUT_S)
        return _to_key_info(answer.key), answer.secret, answer.revision

    def _to_policies(self, message: policy_pb.WatchSnapshotResponse) -> Policies | None:
        """Read a snapshot; None for one that must not be used."""
        if not self._verifier.is_valid(message.signature, message.snapshot):
            metrics.POLICY_REFUSED.labels("signature").inc()
            _log.error("refused a snapshot that the policy service did not sign")
            return None
        snapshot = policy_pb.PolicySnapshot.FromString(message.snapshot)
        candidate = _to_source(snapshot.candidate) if snapshot.HasField("candidate") else None
        try:
            keys, live = self._to_key_ring(snapshot), _to_source(snapshot.policy)
            return self._compiler.compile(snapshot.revision, keys, live, candidate)
        except PolicyInvalid:
            return None

    def _to_key_ring(self, snapshot: policy_pb.PolicySnapshot) -> KeyRing:
        """Make the ring, without what was ever revoked: a store may have forgotten it in a failover."""
        self._revoked.update(snapshot.revoked)
        records = (record for record in snapshot.keys if record.key_id not in self._revoked)
        keys = (key for record in records for key in self._to_keys(record))
        return KeyRing(
            snapshot.revision, {k.secret_hash: k for k in keys if key_id(k.secret_hash) not in self._revoked}
        )

    def _to_keys(self, record: policy_pb.KeyRecord) -> list[Key]:
        """Make the live secrets of a key: its own, and the one before the last rotation."""
        principal = Principal(
            key_id=record.key_id,
            tenant=record.tenant,
            scopes=frozenset(_scopes(record)),
            priority=record.priority,
            cache_salt=cache_salt(self._tenant_key, record.tenant),
            team=record.team,
        )
        expires_at = record.expires_at.ToMilliseconds() / 1000 if record.HasField("expires_at") else None
        key = Key(record.secret_hash, principal, expires_at, tuple(record.roles), _models(record))
        if not record.previous_hash:
            return [key]
        until = min(record.previous_until.ToMilliseconds() / 1000, expires_at or float("inf"))
        return [key, replace(key, secret_hash=record.previous_hash, expires_at=until)]


class RegistryClient:
    """Calls to the registry service."""

    def __init__(self, channel: grpc.aio.Channel, gateway_id: str) -> None:
        self._stub: Any = RegistryServiceStub(channel)
        self._gateway_id = gateway_id

    async def watch(self, revision: int) -> AsyncGenerator[ClusterView]:
        """Yield the current view and each later one. Raises InferfluxError when the stream ends badly."""
        request = registry_pb.WatchRegistryRequest(gateway_id=self._gateway_id, revision=revision)
        call = self._stub.WatchSnapshot(request)
        try:
            with translated_errors():
                async for message in call:
                    yield _to_view(message.snapshot)
        finally:
            call.cancel()


def _to_source(message: policy_pb.PolicyRevision) -> Source:
    """Convert a document; an unset message is that of a cluster without any."""
    share = message.share if message.stage == policy_pb.POLICY_STAGE_CANARY else 0.0
    is_live = message.stage in (policy_pb.POLICY_STAGE_LIVE, policy_pb.POLICY_STAGE_UNSPECIFIED)
    return Source(message.revision, message.document or EMPTY, 1.0 if is_live else share)


def _scopes(record: policy_pb.KeyRecord) -> list[Scope]:
    """Scopes that this gateway does not know grant nothing."""
    return [_SCOPES_FROM_PROTO[number] for number in record.scopes if number in _SCOPES_FROM_PROTO]


def _models(record: policy_pb.KeyRecord) -> tuple[str, ...] | None:
    return tuple(record.models.names) if record.HasField("models") else None


def _to_key_info(record: policy_pb.KeyRecord) -> KeyInfo:
    return KeyInfo(
        key_id=record.key_id,
        name=record.name,
        tenant=record.tenant,
        scopes=tuple(_scopes(record)),
        priority=record.priority,
        created_at=record.created_at.ToDatetime(UTC),
        expires_at=record.expires_at.ToDatetime(UTC) if record.HasField("expires_at") else None,
        team=record.team,
        roles=tuple(record.roles),
        models=_models(record),
        previous_until=record.previous_until.ToDatetime(UTC) if record.HasField("previous_until") else None,
    )


def _to_view(snapshot: registry_pb.RegistrySnapshot) -> ClusterView:
    """Workers of a role or state that this gateway does not know are not for it."""
    known = (w for w in snapshot.workers if w.role in ROLE_FROM_PROTO and w.state in STATE_FROM_PROTO)
    return ClusterView(
        revision=snapshot.revision,
        workers=tuple(_to_worker(record) for record in known),
        models=tuple(_to_model(record, snapshot.workers) for record in snapshot.models),
    )


def _to_worker(record: registry_pb.WorkerRecord) -> Worker:
    return Worker(
        worker_id=record.worker_id,
        incarnation=record.incarnation,
        role=ROLE_FROM_PROTO[record.role],
        model=record.model,
        address=record.address,
        state=STATE_FROM_PROTO[record.state],
        fingerprint=ModelFingerprint.from_proto(record.fingerprint),
        host_id=record.host_id,
        max_num_seqs=record.max_num_seqs,
        transports=frozenset(record.transports or ("shm",)),  # a worker of an earlier version says nothing of it
        adapters=frozenset(adapter.name for adapter in record.adapters),
    )


def _to_model(record: registry_pb.ModelRecord, workers: Iterable[registry_pb.WorkerRecord]) -> Model:
    failed = (w for w in workers if w.model == record.name and w.state == types_pb2.WORKER_STATE_FAILED)
    return Model(
        name=record.name,
        digest=record.digest,
        dtype=record.dtype,
        max_model_len=record.max_model_len,
        capabilities=tuple(record.capabilities),
        created_at=record.created_at.ToSeconds(),
        is_default=record.is_default,
        version=record.version,
        signed_by=record.signed_by,
        failed_workers=tuple(FailedWorker(worker.worker_id, worker.reason) for worker in failed),
        parent=record.parent,
        tenants=tuple(record.tenants),
    )
