"""POST /v1/admin/policy/simulate: what a document would have done with recorded requests, beside the one in force."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from inferflux.errors import Conflict, InferfluxError, Unavailable
from inferflux.policy.document import canonical, dump
from services.gateway import envelope
from services.gateway.documents import read, respond
from services.gateway.envelope import BodyLimits
from services.gateway.guardrails.referees import Referees
from services.gateway.policy import Policies, Policy, Source, compile_policy
from services.gateway.rehearsal import Opinion, Recorded, Rehearsal

MAX_RECORDS = 1000
LIMITS = BodyLimits(max_bytes=16 << 20, max_depth=40)


class Record(BaseModel):
    """A record of the audit log; what is not needed here is ignored. `prompt`: the body, as `debug_mode` keeps it."""

    model_config = ConfigDict(extra="ignore", strict=True)

    path: Annotated[str, Field(max_length=256)] = ""
    tenant: Annotated[str, Field(max_length=64)] = ""
    key_id: Annotated[str, Field(max_length=256)] = ""
    team: Annotated[str, Field(max_length=64)] = ""
    model: Annotated[str, Field(max_length=256)] = ""
    at: Annotated[str, Field(max_length=64)] = ""
    request_id: Annotated[str, Field(max_length=64)] = ""
    prompt: str = ""
    prompt_tokens: Annotated[int, Field(ge=0, lt=2**32)] = 0
    completion_tokens: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def recorded(self) -> Recorded:
        """Return the request. A prompt that is not whole counts as unknown."""
        body = self.prompt.encode()
        try:
            envelope.parse_object(body, LIMITS)
        except InferfluxError:
            body = b""
        return Recorded(
            path=self.path,
            body=body,
            model=self.model,
            tenant=self.tenant,
            key_id=self.key_id,
            team=self.team,
            at=_seconds(self.at),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
        )


class SimulateBody(BaseModel):
    """What the route takes. `document` None: the candidate's. `records`: in the order in which they were written."""

    model_config = ConfigDict(extra="forbid", strict=True)

    document: dict[str, Any] | None = None
    records: Annotated[list[Record], Field(min_length=1, max_length=MAX_RECORDS)]


class RehearsalApi:
    """Handler of the route."""

    def __init__(self, policies: Callable[[], Policies | None], referees: Referees) -> None:
        self._policies = policies
        self._referees = referees

    def router(self) -> APIRouter:
        """Make the route."""
        router = APIRouter()
        router.add_api_route("/v1/admin/policy/simulate", self.simulate, methods=["POST"])
        return router

    async def simulate(self, request: Request) -> Response:
        """Judge all records by both policies."""
        body = await read(request, SimulateBody, LIMITS)
        live, tried = (Rehearsal(policy, self._referees) for policy in self._chosen(body.document))
        pairs, num_unread = [], 0
        for record in body.records:
            recorded = record.recorded()
            num_unread += not recorded.body
            pairs.append((record, await live.judge(recorded), await tried.judge(recorded)))
            await asyncio.sleep(0)  # streams go on between two records
        summary = {"records": len(pairs), "without_text": num_unread} | _summary((b, a) for _, b, a in pairs)
        changes = [_change(*pair) for pair in pairs if pair[1] != pair[2]]
        return respond({"object": "policy.simulation", "summary": summary, "changes": changes})

    def _chosen(self, document: dict[str, Any] | None) -> tuple[Policy, Policy]:
        """Return the policy in force and the one to compare it with. Raises PolicyInvalid, Conflict, Unavailable."""
        if (policies := self._policies()) is None:
            raise Unavailable("the gateway has no policy yet", retry_after_s=1)
        if document is not None:
            return policies.live, compile_policy(Source(document=canonical(dump(document))))
        if policies.candidate is None:
            raise Conflict("nothing is being tried: give a document")
        return policies.live, policies.candidate


def _summary(pairs: Iterable[tuple[Opinion, Opinion]]) -> dict[str, int]:
    counts = {"changed": 0, "newly_refused": 0, "newly_allowed": 0, "newly_redacted": 0}
    for before, after in pairs:
        counts["changed"] += before != after
        counts["newly_refused"] += bool(after.refusal) and not before.refusal
        counts["newly_allowed"] += bool(before.refusal) and not after.refusal
        counts["newly_redacted"] += after.is_redacted and not before.is_redacted
    return counts


def _change(record: Record, before: Opinion, after: Opinion) -> dict[str, Any]:
    who = {"request_id": record.request_id, "tenant": record.tenant, "key_id": record.key_id, "path": record.path}
    return who | {"before": asdict(before), "after": asdict(after)}


def _seconds(text: str) -> float:
    """Read a time in ISO 8601; 0 for none."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return 0.0
    return (at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp()
