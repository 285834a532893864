"""The part of the admin API that is about the policy document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from inferflux.policy.document import MAX_BYTES, canonical, dump
from services.gateway import envelope
from services.gateway.asgi import header_map
from services.gateway.documents import M, respond, validate
from services.gateway.envelope import BodyLimits
from services.gateway.policy_documents import PolicyChange, PolicyDocuments, PolicyRevision, PolicyState

LIMITS = BodyLimits(max_bytes=2 * MAX_BYTES, max_depth=32)
# A write reaches this gateway within 250 ms; an administrator may rely on what he wrote as soon as he has the answer.
OWN_WRITES_S = 1.0
Reached = Callable[[int, float], Awaitable[bool]]
Number = Annotated[int, Field(ge=0, lt=2**62)]


class ApplyBody(BaseModel):
    """What PUT /v1/admin/policy takes. `share` and `max_error_excess` belong to canaries."""

    model_config = ConfigDict(extra="forbid", strict=True)

    document: dict[str, Any]
    reason: Annotated[str, Field(max_length=512)] = ""
    expected_revision: Number | None = None
    stage: Literal["live", "canary", "shadow"] = "live"
    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_error_excess: Annotated[float, Field(ge=0, le=1)] = 0.0


class PolicyApi:
    """Handlers of the routes. `reached` waits until this gateway uses a policy revision."""

    def __init__(self, documents: PolicyDocuments, reached: Reached) -> None:
        self._documents = documents
        self._reached = reached

    def router(self) -> APIRouter:
        """Make the routes."""
        router, path = APIRouter(), "/v1/admin/policy"
        router.add_api_route(path, self.get, methods=["GET"])
        router.add_api_route(path, self.put, methods=["PUT"])
        return router

    async def get(self) -> Response:
        return respond(_state(await self._documents.get()))

    async def put(self, request: Request) -> Response:
        body = await read(ApplyBody, request)
        change = PolicyChange(
            document=canonical(dump(body.document)),
            author=author(request),
            reason=body.reason,
            expected=body.expected_revision,
            stage=body.stage,
            share=body.share,
            max_error_excess=body.max_error_excess,
        )
        return await self._used(await self._documents.apply(change))

    async def _used(self, made: PolicyRevision) -> Response:
        """Answer with a new revision when this gateway uses it."""
        await self._reached(made.revision, OWN_WRITES_S)
        return respond(describe(made))


async def read(kind: type[M], request: Request) -> M:
    """Read a body. Raises InvalidRequest."""
    data = await envelope.read_body(request.receive, header_map(request.headers.raw), LIMITS)
    return validate(kind, envelope.parse_object(data, LIMITS))


def author(request: Request) -> str:
    """Name who asks, by what has been proven and not by what is claimed."""
    return str(request.state.principal.key_id)


def _state(state: PolicyState) -> dict[str, Any]:
    candidate = describe(state.candidate) if state.candidate is not None else None
    return describe(state.live) | {"candidate": candidate, "newest": state.newest}


def describe(revision: PolicyRevision) -> dict[str, Any]:
    """Render a revision."""
    return {
        "object": "policy",
        "revision": revision.revision,
        "document": orjson.loads(revision.document),
        "author": revision.author,
        "reason": revision.reason,
        "created_at": int(revision.created_at.timestamp()) or None,
        "stage": revision.stage,
        "share": revision.share or None,
        "max_error_excess": revision.max_error_excess or None,
    }
