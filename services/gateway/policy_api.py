"""The part of the admin API that is about the policy document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from inferflux.errors import InvalidRequest
from inferflux.policy.diff import diff
from inferflux.policy.document import EMPTY, MAX_BYTES, canonical, dump
from services.gateway import documents
from services.gateway.documents import M, respond
from services.gateway.envelope import BodyLimits
from services.gateway.policy_documents import PolicyChange, PolicyDocuments, PolicyRevision, PolicyState

LIMITS = BodyLimits(max_bytes=2 * MAX_BYTES, max_depth=32)
# A write reaches this gateway within 250 ms; an administrator may rely on what he wrote as soon as he has the answer.
OWN_WRITES_S = 1.0
MAX_LIMIT = 1000
Reached = Callable[[int, float], Awaitable[bool]]
Number = Annotated[int, Field(ge=0, lt=2**62)]


class TermsBody(BaseModel):
    """What POST /v1/admin/policy/promote takes. `share` and `max_error_excess` belong to canaries."""

    model_config = ConfigDict(extra="forbid", strict=True)

    reason: Annotated[str, Field(max_length=512)] = ""
    expected_revision: Number | None = None
    stage: Literal["live", "canary", "shadow"] = "live"
    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_error_excess: Annotated[float, Field(ge=0, le=1)] = 0.0


class ApplyBody(TermsBody):
    """What PUT /v1/admin/policy takes."""

    document: dict[str, Any]


class ValidateBody(BaseModel):
    """What POST /v1/admin/policy/validate takes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    document: dict[str, Any]


class RollbackBody(BaseModel):
    """What POST /v1/admin/policy/rollback takes. `revision`: whose document shall be in force again."""

    model_config = ConfigDict(extra="forbid", strict=True)

    revision: Number
    reason: Annotated[str, Field(max_length=512)] = ""
    expected_revision: Number | None = None


class PolicyApi:
    """Handlers of the routes. `reached` waits until this gateway uses a policy revision."""

    def __init__(self, documents: PolicyDocuments, reached: Reached) -> None:
        self._documents = documents
        self._reached = reached

    def router(self) -> APIRouter:
        """Make the routes."""
        router, path = APIRouter(), "/v1/admin/policy"
        router.add_api_route(path + "/revisions", self.history, methods=["GET"])
        router.add_api_route(path + "/revisions/{revision}", self.get_revision, methods=["GET"])
        router.add_api_route(path + "/validate", self.validate, methods=["POST"])
        router.add_api_route(path + "/promote", self.promote, methods=["POST"])
        router.add_api_route(path + "/rollback", self.rollback, methods=["POST"])
        router.add_api_route(path + "/status", self.status, methods=["GET"])
        router.add_api_route(path, self.get, methods=["GET"])
        router.add_api_route(path, self.put, methods=["PUT"])
        return router

    async def get(self) -> Response:
        return respond(_state(await self._documents.get()))

    async def history(self, request: Request) -> Response:
        revisions = await self._documents.history(0)
        return respond({"object": "list", "data": _with_changes(revisions)[: limit(request)]})

    async def get_revision(self, revision: str) -> Response:
        return respond(describe(await self._documents.revision(_number(revision))))

    async def validate(self, request: Request) -> Response:
        """Check a document; say what it would change in the one that is in force."""
        body = await read(ValidateBody, request)
        document = canonical(dump(body.document))
        live = (await self._documents.get()).live
        return respond({"object": "policy.validation", "valid": True, "changes": _changes(live.document, document)})

    async def put(self, request: Request) -> Response:
        body = await read(ApplyBody, request)
        return await self._apply(request, body, canonical(dump(body.document)))

    async def promote(self, request: Request) -> Response:
        """Let the candidate get further."""
        return await self._apply(request, await read(TermsBody, request), b"")

    async def rollback(self, request: Request) -> Response:
        body = await read(RollbackBody, request)
        made = await self._documents.rollback(body.revision, author(request), body.reason, body.expected_revision)
        return await self._used(made)

    async def status(self) -> Response:
        newest, replicas = await self._documents.replicas()
        return respond({"object": "list", "revision": newest, "data": [asdict(replica) for replica in replicas]})

    async def _apply(self, request: Request, terms: TermsBody, document: bytes) -> Response:
        change = PolicyChange(
            document=document,
            author=author(request),
            reason=terms.reason,
            expected=terms.expected_revision,
            stage=terms.stage,
            share=terms.share,
            max_error_excess=terms.max_error_excess,
        )
        return await self._used(await self._documents.apply(change))

    async def _used(self, made: PolicyRevision) -> Response:
        """Answer with a new revision when this gateway uses it."""
        await self._reached(made.revision, OWN_WRITES_S)
        return respond(describe(made))


async def read(kind: type[M], request: Request) -> M:
    """Read a body. Raises InvalidRequest."""
    return await documents.read(request, kind, LIMITS)


def author(request: Request) -> str:
    """Name who asks, by what has been proven and not by what is claimed."""
    return str(request.state.principal.key_id)


def limit(request: Request, default: int = 100) -> int:
    """Read the parameter `limit`. Raises InvalidRequest."""
    text = request.query_params.get("limit", str(default))
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= MAX_LIMIT):
        raise InvalidRequest(f"limit: {text[:64]!r} is not a number from 1 to {MAX_LIMIT}", param="limit")
    return int(text)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise InvalidRequest(f"{text[:64]!r} is not a revision", param="revision")
    return int(text)


def _with_changes(revisions: list[PolicyRevision]) -> list[dict[str, Any]]:
    """Render revisions, newest first, each with what it changed in what was live before it."""
    described = []
    for position, revision in enumerate(revisions):
        before = next((r.document for r in revisions[position + 1 :] if r.stage == "live"), EMPTY)
        described.append(describe(revision) | {"changes": _changes(before, revision.document)})
    return described


def _changes(before: bytes, after: bytes) -> list[dict[str, Any]]:
    return [asdict(change) for change in diff(orjson.loads(before), orjson.loads(after))]


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
