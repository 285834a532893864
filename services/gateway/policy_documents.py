"""The gateway's side of the policy document's administration: messages become our values here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import grpc

from inferflux.rpc.client import translated_errors
from inferflux.v1 import policy_service_pb2 as pb
from inferflux.v1.policy_service_pb2_grpc import PolicyServiceStub

TIMEOUT_S = 10.0
STAGES = {"live": pb.POLICY_STAGE_LIVE, "canary": pb.POLICY_STAGE_CANARY, "shadow": pb.POLICY_STAGE_SHADOW}
_STAGE_NAMES = {number: name for name, number in STAGES.items()}


@dataclass(frozen=True, slots=True)
class PolicyRevision:
    """One revision of the document; `revision` 0: there was none yet."""

    revision: int
    document: bytes
    author: str
    reason: str
    created_at: datetime
    stage: str
    share: float
    max_error_excess: float


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What is in force, what is being tried, and the newest revision of any kind."""

    live: PolicyRevision
    candidate: PolicyRevision | None
    newest: int


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """What to apply. `document` empty: the candidate's. `expected` None: whatever is there."""

    document: bytes
    author: str
    reason: str
    expected: int | None = None
    stage: str = "live"
    share: float = 0.0
    max_error_excess: float = 0.0


class PolicyDocuments:
    """Calls to the policy service. All of them raise InferfluxError."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = PolicyServiceStub(channel)

    async def get(self) -> PolicyState:
        """Read what is in force."""
        with translated_errors():
            answer = await self._stub.GetPolicy(pb.GetPolicyRequest(), timeout=TIMEOUT_S)
        candidate = _to_revision(answer.candidate) if answer.HasField("candidate") else None
        return PolicyState(_to_revision(answer.policy), candidate, answer.newest)

    async def revision(self, number: int) -> PolicyRevision:
        """Read one revision. Raises NotFound."""
        with translated_errors():
            answer = await self._stub.GetPolicy(pb.GetPolicyRequest(revision=number), timeout=TIMEOUT_S)
        return _to_revision(answer.policy)

    async def apply(self, change: PolicyChange) -> PolicyRevision:
        """Make a document the newest revision."""
        request = pb.ApplyPolicyRequest(
            document=change.document,
            author=change.author,
            reason=change.reason,
            expected_revision=change.expected,
            stage=STAGES[change.stage],
            share=change.share,
            max_error_excess=change.max_error_excess,
        )
        with translated_errors():
            answer = await self._stub.ApplyPolicy(request, timeout=TIMEOUT_S)
        return _to_revision(answer.policy)

    async def list(self, limit: int) -> list[PolicyRevision]:
        """List revisions, newest first."""
        with translated_errors():
            answer = await self._stub.ListRevisions(pb.ListRevisionsRequest(limit=limit), timeout=TIMEOUT_S)
        return [_to_revision(message) for message in answer.revisions]

    async def rollback(self, number: int, author: str, reason: str, expected: int | None) -> PolicyRevision:
        """Make the document of an earlier revision the newest one, live."""
        request = pb.RollbackPolicyRequest(revision=number, author=author, reason=reason, expected_revision=expected)
        with translated_errors():
            answer = await self._stub.RollbackPolicy(request, timeout=TIMEOUT_S)
        return _to_revision(answer.policy)


def _to_revision(message: pb.PolicyRevision) -> PolicyRevision:
    return PolicyRevision(
        revision=message.revision,
        document=message.document,
        author=message.author,
        reason=message.reason,
        created_at=message.created_at.ToDatetime(UTC),
        stage=_STAGE_NAMES.get(message.stage, "unknown"),
        share=message.share,
        max_error_excess=message.max_error_excess,
    )
