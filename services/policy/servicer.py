"""PolicyService on the wire: checks what comes in, calls the keeper, and is the only place with protobuf messages."""

# ruff: noqa: N802 - methods have the names that the protos give them

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc

from inferflux.errors import InvalidRequest
from inferflux.policy.identity import Scope
from inferflux.policy.signature import Signer
from inferflux.v1 import policy_service_pb2 as pb
from services.policy.audit_log import AuditLog
from services.policy.book import KeyBook
from services.policy.document_servicer import DocumentServicer, to_revision
from services.policy.keeper import Keeper
from services.policy.keys import Key, hash_secret, new_key, new_secret
from services.policy.pepper import Pepper
from services.policy.replicas import Replicas

log = logging.getLogger(__name__)

SERVICE = "/inferflux.v1.PolicyService/"
CALLERS = {
    SERVICE: frozenset({"operator", "gateway"}),
    SERVICE + "WatchSnapshot": frozenset({"gateway"}),
    SERVICE + "ReportPolicy": frozenset({"gateway"}),
    SERVICE + "AppendAudit": frozenset({"gateway"}),
}
SCOPES = {
    Scope.GENERATE: pb.SCOPE_GENERATE,
    Scope.READ: pb.SCOPE_READ,
    Scope.ADMIN: pb.SCOPE_ADMIN,
}
MAX_GRACE_MS = 90 * 86_400_000
SCOPES_FROM_PROTO = {number: scope for scope, number in SCOPES.items()}

Context = grpc.aio.ServicerContext[Any, Any]


class PolicyServicer(DocumentServicer):
    """Callers are authorised by the server (see CALLERS) before anything here runs."""

    def __init__(self, keeper: Keeper, replicas: Replicas, audit: AuditLog, pepper: Pepper, signer: Signer) -> None:
        super().__init__(keeper, replicas, audit)
        self._pepper = pepper
        self._signer = signer
        self._signed = pb.WatchSnapshotResponse()
        self._signed_revision = 0

    async def WatchSnapshot(
        self, request: pb.WatchSnapshotRequest, context: Context
    ) -> AsyncIterator[pb.WatchSnapshotResponse]:
        log.info("watch opened", extra={"gateway_id": request.gateway_id, "gateway_revision": request.revision})
        await self._keeper.overtake(request.revision, request.revoked)
        async for _, book in self._keeper.feed.watch(at_least=request.revision):
            yield self._sign(book)

    async def CreateKey(self, request: pb.CreateKeyRequest, context: Context) -> pb.CreateKeyResponse:
        now_ms, secret = self._keeper.now_ms(), request.secret or new_secret()
        key = new_key(
            secret,
            self._pepper,
            name=request.name,
            scopes=[_scope(number) for number in request.scopes],
            tenant=request.tenant,
            expires_at_ms=request.expires_at.ToMilliseconds() if request.HasField("expires_at") else None,
            priority=request.priority,
            team=request.team,
            roles=request.roles,
            models=request.models.names if request.HasField("models") else None,
            now_ms=now_ms,
        )
        await self._will(context, "CreateKey", key.key_id)
        book = await self._keeper.change(lambda stored: stored.add(key, now_ms))
        log.info("key created", extra={"key_id": key.key_id, "tenant": key.tenant, "revision": book.revision})
        return pb.CreateKeyResponse(key=_to_record(key), secret=secret, revision=book.revision)

    async def ListKeys(self, request: pb.ListKeysRequest, context: Context) -> pb.ListKeysResponse:
        book = self._keeper.book()
        keys = [_to_record(key) for key in book.live(self._keeper.now_ms())]
        return pb.ListKeysResponse(keys=keys, revision=book.revision)

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Context) -> pb.RevokeKeyResponse:
        now_ms = self._keeper.now_ms()
        await self._will(context, "RevokeKey", request.key_id)
        book = await self._keeper.change(lambda stored: stored.revoke(request.key_id, now_ms))
        log.info("key revoked", extra={"key_id": request.key_id, "revision": book.revision})
        return pb.RevokeKeyResponse(revision=book.revision)

    async def RotateKey(self, request: pb.RotateKeyRequest, context: Context) -> pb.RotateKeyResponse:
        now_ms, secret = self._keeper.now_ms(), request.secret or new_secret()
        secret_hash, grace_ms = hash_secret(secret, self._pepper), request.grace.ToMilliseconds()
        if not 0 <= grace_ms <= MAX_GRACE_MS:
            raise InvalidRequest(f"grace must be 0 to {MAX_GRACE_MS // 1000} seconds", param="grace_s")
        until_ms = now_ms + grace_ms
        await self._will(context, "RotateKey", request.key_id)
        book = await self._keeper.change(lambda stored: stored.rotate(request.key_id, secret_hash, until_ms, now_ms))
        log.info("key rotated", extra={"key_id": request.key_id, "grace_ms": grace_ms, "revision": book.revision})
        return pb.RotateKeyResponse(key=_to_record(book.keys[request.key_id]), secret=secret, revision=book.revision)

    def _sign(self, book: KeyBook) -> pb.WatchSnapshotResponse:
        """Convert and sign a book once for all watchers."""
        if self._signed_revision != book.revision:
            snapshot = self._to_snapshot(book).SerializeToString(deterministic=True)
            self._signed = pb.WatchSnapshotResponse(snapshot=snapshot, signature=self._signer.sign(snapshot))
            self._signed_revision = book.revision
        return self._signed

    def _to_snapshot(self, book: KeyBook) -> pb.PolicySnapshot:
        keys = [_to_record(key, with_hash=True) for key in book.live(self._keeper.now_ms())]
        snapshot = pb.PolicySnapshot(revision=book.revision, keys=keys, revoked=sorted(book.revoked))
        if book.history.revisions:
            snapshot.policy.CopyFrom(to_revision(book.history.live))
        if book.history.candidate is not None:
            snapshot.candidate.CopyFrom(to_revision(book.history.candidate))
        return snapshot


def _scope(number: int) -> Scope:
    if number not in SCOPES_FROM_PROTO:
        raise InvalidRequest(f"unknown scope {number}", param="scopes")
    return SCOPES_FROM_PROTO[pb.Scope.ValueType(number)]


def _to_record(key: Key, *, with_hash: bool = False) -> pb.KeyRecord:
    record = pb.KeyRecord(
        key_id=key.key_id,
        secret_hash=key.secret_hash if with_hash else b"",
        name=key.name,
        tenant=key.tenant,
        scopes=[SCOPES[scope] for scope in sorted(key.scopes)],
        priority=key.priority,
        team=key.team,
        roles=sorted(key.roles),
        models=pb.ModelList(names=key.models) if key.models is not None else None,
        previous_hash=key.previous_hash if with_hash else b"",
    )
    if key.previous_hash:
        record.previous_until.FromMilliseconds(key.previous_until_ms)
    record.created_at.FromMilliseconds(key.created_at_ms)
    if key.expires_at_ms is not None:
        record.expires_at.FromMilliseconds(key.expires_at_ms)
    return record
