"""The gateway's side of the policy document's administration: messages become our values here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import grpc

from inferflux.rpc.client import translated_errors
from inferflux.v1 import policy_service_pb2 as pb
from inferflux.v1.policy_service_pb2_grpc import PolicyServiceStub
from services.gateway.policy import Policies
from services.gateway.policy_report import Outcomes, Trial

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


@dataclass(frozen=True, slots=True)
class Replica:
    """One gateway: what it uses, for how long there has been something newer, when it reported, in seconds.

    `num_tried`, `num_failed`: requests that the candidate has decided on, and those that ended in an error; in shadow:
    those it was asked about, and those it would have refused and the live one did not.
    """

    gateway_id: str
    revision: int
    policy_revision: int
    candidate_revision: int
    is_candidate_refused: bool
    num_tried: int
    num_failed: int
    lag_s: float
    age_s: float


class PolicyDocuments:
    """Calls to the policy service. All of them raise InferfluxError."""

    def __init__(self, channel: grpc.aio.Channel, gateway_id: str) -> None:
        self._stub: Any = PolicyServiceStub(channel)
        self._gateway_id = gateway_id

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

    async def history(self, limit: int) -> list[PolicyRevision]:
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

    async def report(self, policies: Policies, trial: Trial) -> None:
        """Tell what this gateway uses."""
        request = pb.ReportPolicyRequest(
            gateway_id=self._gateway_id,
            revision=policies.revision,
            policy_revision=policies.live.revision,
            candidate_revision=policies.candidate_revision,
            is_candidate_refused=bool(policies.candidate_revision) and policies.candidate is None,
            live=_to_outcomes(trial.live),
            candidate=_to_outcomes(trial.candidate),
        )
        with translated_errors():
            await self._stub.ReportPolicy(request, timeout=TIMEOUT_S)

    async def replicas(self) -> tuple[int, list[Replica]]:
        """Return the newest revision of the snapshot, and all gateways."""
        with translated_errors():
            answer = await self._stub.ListReplicas(pb.ListReplicasRequest(), timeout=TIMEOUT_S)
        return answer.revision, [_to_replica(message) for message in answer.replicas]


def _to_outcomes(outcomes: Outcomes) -> pb.Outcomes:
    return pb.Outcomes(num_requests=outcomes.num_requests, num_failures=outcomes.num_failures)


def _to_replica(message: pb.Replica) -> Replica:
    report = message.report
    return Replica(
        gateway_id=report.gateway_id,
        revision=report.revision,
        policy_revision=report.policy_revision,
        candidate_revision=report.candidate_revision,
        is_candidate_refused=report.is_candidate_refused,
        num_tried=report.candidate.num_requests,
        num_failed=report.candidate.num_failures,
        lag_s=message.lag_s,
        age_s=message.age_s,
    )


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
