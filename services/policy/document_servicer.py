"""The part of PolicyService that is about the policy document, its revisions and the gateways that use them."""

# ruff: noqa: N802 - methods have the names that the protos give them

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc

from inferflux.errors import InvalidRequest, Unavailable
from inferflux.policy.document import canonical
from inferflux.v1 import policy_service_pb2 as pb
from services.policy.audit_log import AuditLog
from services.policy.audit_servicer import AuditServicer
from services.policy.history import SERVICE, History, Revision, Stage, draft
from services.policy.keeper import Keeper
from services.policy.replicas import Replica, Replicas, Report
from services.policy.trial import Outcomes, objection

log = logging.getLogger(__name__)

STAGES = {
    Stage.LIVE: pb.POLICY_STAGE_LIVE,
    Stage.CANARY: pb.POLICY_STAGE_CANARY,
    Stage.SHADOW: pb.POLICY_STAGE_SHADOW,
}
STAGES_FROM_PROTO = {number: stage for stage, number in STAGES.items()}

Context = grpc.aio.ServicerContext[Any, Any]


class DocumentServicer(AuditServicer):
    """Callers are authorised by the server before anything here runs."""

    def __init__(self, keeper: Keeper, replicas: Replicas, audit: AuditLog) -> None:
        super().__init__(audit)
        self._keeper = keeper
        self._replicas = replicas

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Context) -> pb.GetPolicyResponse:
        book = self._keeper.book()
        history = book.history
        answer = pb.GetPolicyResponse(revision=book.revision, newest=history.newest.revision)
        answer.policy.CopyFrom(to_revision(history.get(request.revision) if request.revision else history.live))
        if history.candidate is not None and not request.revision:
            answer.candidate.CopyFrom(to_revision(history.candidate))
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

        await self._will(context, "ApplyPolicy", stage)
        return pb.ApplyPolicyResponse(policy=await self._apply(make, expected))

    async def ListRevisions(self, request: pb.ListRevisionsRequest, context: Context) -> pb.ListRevisionsResponse:
        revisions = self._keeper.book().history.list(request.limit)
        return pb.ListRevisionsResponse(revisions=[to_revision(revision) for revision in revisions])

    async def RollbackPolicy(self, request: pb.RollbackPolicyRequest, context: Context) -> pb.RollbackPolicyResponse:
        expected = request.expected_revision if request.HasField("expected_revision") else None

        def back(history: History) -> Revision:
            return draft(history.get(request.revision).document, request.author, request.reason)

        await self._will(context, "RollbackPolicy", str(request.revision))
        return pb.RollbackPolicyResponse(policy=await self._apply(back, expected))

    async def ReportPolicy(self, request: pb.ReportPolicyRequest, context: Context) -> pb.ReportPolicyResponse:
        self._replicas.take(_to_report(request))
        await self._judge()
        return pb.ReportPolicyResponse()

    async def ListReplicas(self, request: pb.ListReplicasRequest, context: Context) -> pb.ListReplicasResponse:
        replicas = [_to_replica(replica) for replica in self._replicas.all()]
        return pb.ListReplicasResponse(replicas=replicas, revision=self._keeper.book().revision)

    async def _apply(self, make: Callable[[History], Revision], expected: int | None) -> pb.PolicyRevision:
        made = await self._keeper.apply(make, expected)
        fields = {"revision": made.revision, "author": made.author, "stage": made.stage}
        log.info("policy changed", extra=fields)
        return to_revision(made)

    async def _judge(self) -> None:
        """Revert the candidate when it is bad. While the store is away, the next report tries again."""
        candidate = self._keeper.book().history.candidate
        if candidate is None or not (reason := self._objection(candidate)):
            return
        log.warning("policy reverted", extra={"revision": candidate.revision, "reason": reason})
        now_ms = self._keeper.now_ms()
        with suppress(Unavailable):
            await self._audit.act(SERVICE, "revert", str(candidate.revision))
        with suppress(Unavailable):  # even if it can't be written down: the candidate does harm
            await self._keeper.change(lambda stored: stored.revert(candidate.revision, reason, now_ms))

    def _objection(self, candidate: Revision) -> str:
        reports = self._replicas.of_candidate(candidate.revision)
        if refused := [report.gateway_id for report in reports if report.is_candidate_refused]:
            return f"{', '.join(refused)} can't read it"
        if candidate.stage is not Stage.CANARY:
            return ""
        tried = sum((report.candidate for report in reports), Outcomes())
        others = sum((report.live for report in reports), Outcomes())
        return objection(tried, others, candidate.max_error_excess)


def _stage(number: int) -> Stage:
    if number not in STAGES_FROM_PROTO:
        raise InvalidRequest(f"unknown stage {number}", param="stage")
    return STAGES_FROM_PROTO[pb.PolicyStage.ValueType(number)]


def to_revision(revision: Revision) -> pb.PolicyRevision:
    """Convert a revision with its document."""
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


def _to_report(message: pb.ReportPolicyRequest) -> Report:
    return Report(
        gateway_id=message.gateway_id,
        revision=message.revision,
        policy_revision=message.policy_revision,
        candidate_revision=message.candidate_revision,
        is_candidate_refused=message.is_candidate_refused,
        live=Outcomes(message.live.num_requests, message.live.num_failures),
        candidate=Outcomes(message.candidate.num_requests, message.candidate.num_failures),
    )


def _to_replica(replica: Replica) -> pb.Replica:
    report = replica.report
    message = pb.ReportPolicyRequest(
        gateway_id=report.gateway_id,
        revision=report.revision,
        policy_revision=report.policy_revision,
        candidate_revision=report.candidate_revision,
        is_candidate_refused=report.is_candidate_refused,
        live=pb.Outcomes(num_requests=report.live.num_requests, num_failures=report.live.num_failures),
        candidate=pb.Outcomes(num_requests=report.candidate.num_requests, num_failures=report.candidate.num_failures),
    )
    return pb.Replica(report=message, age_s=replica.age_s, lag_s=replica.lag_s)
