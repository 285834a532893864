"""PolicyService on the wire: checks what comes in, calls the keeper, and is the only place with protobuf messages."""

# ruff: noqa: N802 - methods have the names that the protos give them

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from inferflux.errors import InvalidRequest, PolicyPersistFailed, Unavailable
from inferflux.policy.document import canonical
from inferflux.policy.signature import Signer
from inferflux.v1 import policy_service_pb2 as pb
from inferflux.v1.policy_service_pb2_grpc import PolicyServiceServicer
from services.policy.book import KeyBook
from services.policy.history import History, Revision, Stage, draft
from services.policy.keeper import Keeper
from services.policy.keys import Key, Scope, new_key, new_secret
from services.policy.pepper import Pepper

log = logging.getLogger(__name__)

SERVICE = "/inferflux.v1.PolicyService/"
CALLERS = {
    SERVICE: frozenset({"operator", "gateway"}),
    SERVICE + "WatchSnapshot": frozenset({"gateway"}),
}
SCOPES = {
    Scope.GENERATE: pb.SCOPE_GENERATE,
    Scope.READ: pb.SCOPE_READ,
    Scope.ADMIN: pb.SCOPE_ADMIN,
}
SCOPES_FROM_PROTO = {number: scope for scope, number in SCOPES.items()}

STAGES = {
    Stage.LIVE: pb.POLICY_STAGE_LIVE,
    Stage.CANARY: pb.POLICY_STAGE_CANARY,
    Stage.SHADOW: pb.POLICY_STAGE_SHADOW,
}
STAGES_FROM_PROTO = {number: stage for stage, number in STAGES.items()}

Context = grpc.aio.ServicerContext[Any, Any]


class PolicyServicer(PolicyServiceServicer):
    """Callers are authorised by the server (see CALLERS) before anything here runs."""

    def __init__(self, keeper: Keeper, pepper: Pepper, signer: Signer) -> None:
        self._keeper = keeper
        self._pepper = pepper
        self._signer = signer
        self._signed = pb.WatchSnapshotResponse()
        self._signed_revision = 0

    async def WatchSnapshot(
        self, request: pb.WatchSnapshotRequest, context: Context
    ) -> AsyncIterator[pb.WatchSnapshotResponse]:
        log.info("watch opened", extra={"gateway_id": request.gateway_id, "gateway_revision": request.revision})
        await self._keeper.overtake(request.revision)
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
            now_ms=now_ms,
        )
        book = await self._keeper.change(lambda stored: stored.add(key, now_ms))
        log.info("key created", extra={"key_id": key.key_id, "tenant": key.tenant, "revision": book.revision})
        return pb.CreateKeyResponse(key=_to_record(key), secret=secret, revision=book.revision)

    async def ListKeys(self, request: pb.ListKeysRequest, context: Context) -> pb.ListKeysResponse:
        book = self._keeper.book()
        keys = [_to_record(key) for key in book.live(self._keeper.now_ms())]
        return pb.ListKeysResponse(keys=keys, revision=book.revision)

    async def RevokeKey(self, request: pb.RevokeKeyRequest, context: Context) -> pb.RevokeKeyResponse:
        now_ms = self._keeper.now_ms()
        book = await self._keeper.change(lambda stored: stored.revoke(request.key_id, now_ms))
        log.info("key revoked", extra={"key_id": request.key_id, "revision": book.revision})
        return pb.RevokeKeyResponse(revision=book.revision)

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Context) -> pb.GetPolicyResponse:
        book = self._keeper.book()
        history = book.history
        answer = pb.GetPolicyResponse(revision=book.revision, newest=history.newest.revision)
        answer.policy.CopyFrom(_to_revision(history.get(request.revision) if request.revision else history.live))
        if history.candidate is not None and not request.revision:
            answer.candidate.CopyFrom(_to_revision(history.candidate))
        return answer

    async def ApplyPolicy(self, request: pb.ApplyPolicyRequest, context: Context) -> pb.ApplyPolicyResponse:
        stage = _stage(request.stage)
        document = canonical(request.document) if request.document else None
        expected = request.expected_revision if request.HasField("expected_revision") else None

        def make(history: History) -> Revision:
            return draft(
                history.tried() if document is None else document,
                request.author,
                request.reason,
                stage,
                share=request.share,
                max_error_excess=request.max_error_excess,
            )

        return pb.ApplyPolicyResponse(policy=await self._apply(make, expected))

    async def ListRevisions(self, request: pb.ListRevisionsRequest, context: Context) -> pb.ListRevisionsResponse:
        revisions = self._keeper.book().history.list(request.limit)
        return pb.ListRevisionsResponse(revisions=[_to_revision(revision) for revision in revisions])

    async def RollbackPolicy(self, request: pb.RollbackPolicyRequest, context: Context) -> pb.RollbackPolicyResponse:
        expected = request.expected_revision if request.HasField("expected_revision") else None

        def back(history: History) -> Revision:
            return draft(history.get(request.revision).document, request.author, request.reason)

        return pb.RollbackPolicyResponse(policy=await self._apply(back, expected))

    async def _apply(self, make: Callable[[History], Revision], expected: int | None) -> pb.PolicyRevision:
        """Write what `make` makes of the history; None of it stays when the store does not take it."""
        now_ms = self._keeper.now_ms()
        try:
            book = await self._keeper.change(lambda stored: stored.apply(make(stored.history), now_ms, expected))
        except Unavailable as e:
            raise PolicyPersistFailed(f"the policy was not changed: {e.message}", retry_after_s=1.0) from e
        revision = book.history.get(book.revision)
        fields = {"revision": revision.revision, "author": revision.author, "stage": revision.stage}
        log.info("policy changed", extra=fields)
        return _to_revision(revision)

    def _sign(self, book: KeyBook) -> pb.WatchSnapshotResponse:
        """Convert and sign a book once for all watchers."""
        if self._signed_revision != book.revision:
            snapshot = self._to_snapshot(book).SerializeToString(deterministic=True)
            self._signed = pb.WatchSnapshotResponse(snapshot=snapshot, signature=self._signer.sign(snapshot))
            self._signed_revision = book.revision
        return self._signed

    def _to_snapshot(self, book: KeyBook) -> pb.PolicySnapshot:
        keys = [_to_record(key, with_hash=True) for key in book.live(self._keeper.now_ms())]
        snapshot = pb.PolicySnapshot(revision=book.revision, keys=keys)
        if book.history.revisions:
            snapshot.policy.CopyFrom(_to_revision(book.history.live))
        if book.history.candidate is not None:
            snapshot.candidate.CopyFrom(_to_revision(book.history.candidate))
        return snapshot


def _stage(number: int) -> Stage:
    if number not in STAGES_FROM_PROTO:
        raise InvalidRequest(f"unknown stage {number}", param="stage")
    return STAGES_FROM_PROTO[pb.PolicyStage.ValueType(number)]


def _to_revision(revision: Revision) -> pb.PolicyRevision:
    message = pb.PolicyRevision(
        revision=revision.revision,
        document=revision.document,
        author=revision.author,
        reason=revision.reason,
        stage=STAGES[revision.stage],
        share=revision.share,
        max_error_excess=revision.max_error_excess,
    )
    message.created_at.FromMilliseconds(revision.created_at_ms)
    return message


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
    )
    record.created_at.FromMilliseconds(key.created_at_ms)
    if key.expires_at_ms is not None:
        record.expires_at.FromMilliseconds(key.expires_at_ms)
    return record
