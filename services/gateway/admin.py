"""The admin API over HTTP, for administrators who reach the cluster only through its gateway: keys, fleet, KV paths."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from inferflux.errors import InvalidRequest
from services.gateway import envelope
from services.gateway.asgi import header_map
from services.gateway.control import KeyInfo, NewKey, PolicyClient
from services.gateway.documents import M, respond, validate
from services.gateway.endpoints import Scope
from services.gateway.envelope import BodyLimits
from services.gateway.fleet_api import FleetApi
from services.gateway.matrix import Matrix

LIMITS = BodyLimits(max_bytes=64 * 1024, max_depth=8)
# A write reaches this gateway within 250 ms; an administrator may use what he made as soon as he has the answer.
OWN_WRITES_S = 1.0
Reached = Callable[[int, float], Awaitable[bool]]


class NewKeyBody(BaseModel):
    """What POST /v1/admin/api_keys takes. `expires_at`: seconds since the epoch; None = never."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1, max_length=64)]
    scopes: Annotated[list[str], Field(max_length=8)] = []
    tenant: str = ""
    team: str = ""
    roles: Annotated[list[str], Field(max_length=64)] = []
    models: Annotated[list[str], Field(max_length=256)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] = 0
    expires_at: Annotated[int, Field(gt=0, lt=2**33)] | None = None
    secret: str = Field(default="", repr=False)


class RotationBody(BaseModel):
    """What POST /v1/admin/api_keys/{key_id}/rotate takes. `grace_s`: how long the old secret is good, too."""

    model_config = ConfigDict(extra="forbid", strict=True)

    grace_s: Annotated[float, Field(ge=0, le=90 * 86_400, allow_inf_nan=False)] = 3600.0
    secret: str = Field(default="", repr=False)


class AdminApi:
    """Handlers of the admin routes. `reached` waits until this gateway uses a policy revision."""

    def __init__(self, policy: PolicyClient, reached: Reached, fleet: FleetApi, matrix: Matrix) -> None:
        self._policy = policy
        self._reached = reached
        self._fleet = fleet
        self._matrix = matrix

    def router(self) -> APIRouter:
        """Make the routes."""
        router, path = APIRouter(), "/v1/admin/api_keys"
        router.add_api_route(path, self.list_keys, methods=["GET"])
        router.add_api_route(path, self.create_key, methods=["POST"])
        router.add_api_route(path + "/{key_id}", self.revoke_key, methods=["DELETE"])
        router.add_api_route(path + "/{key_id}/rotate", self.rotate_key, methods=["POST"])
        router.include_router(self._fleet.router())
        router.add_api_route("/v1/admin/paths", self.measure_paths, methods=["GET"])
        return router

    async def measure_paths(self) -> Response:
        return respond({"object": "list", "data": [asdict(path) for path in await self._matrix.measure()]})

    async def list_keys(self) -> Response:
        keys, revision = await self._policy.list_keys()
        return respond({"object": "list", "data": [_document(key) for key in keys], "revision": revision})

    async def create_key(self, request: Request) -> Response:
        body = await _read(request, NewKeyBody)
        key, secret, revision = await self._policy.create_key(_new_key(body))
        await self._reached(revision, OWN_WRITES_S)
        return respond(_document(key) | {"secret": secret, "revision": revision}, 201)

    async def rotate_key(self, request: Request, key_id: str) -> Response:
        body = await _read(request, RotationBody)
        key, secret, revision = await self._policy.rotate_key(key_id, body.grace_s, body.secret)
        await self._reached(revision, OWN_WRITES_S)
        return respond(_document(key) | {"secret": secret, "revision": revision})

    async def revoke_key(self, key_id: str) -> Response:
        revision = await self._policy.revoke_key(key_id)
        await self._reached(revision, OWN_WRITES_S)
        return respond({"id": key_id, "object": "api_key", "revoked": True, "revision": revision})


async def _read(request: Request, kind: type[M]) -> M:
    """Read a body; nothing at all is an empty object."""
    data = await envelope.read_body(request.receive, header_map(request.headers.raw), LIMITS)
    return validate(kind, envelope.parse_object(data or b"{}", LIMITS))


def _new_key(body: NewKeyBody) -> NewKey:
    if not body.scopes and not body.roles:
        raise InvalidRequest("a key needs at least one scope or role", param="scopes")
    return NewKey(
        name=body.name,
        scopes=tuple(_scope(name) for name in body.scopes),
        tenant=body.tenant,
        priority=body.priority,
        expires_at=datetime.fromtimestamp(body.expires_at, UTC) if body.expires_at is not None else None,
        secret=body.secret,
        team=body.team,
        roles=tuple(body.roles),
        models=tuple(body.models) if body.models is not None else None,
    )


def _scope(name: str) -> Scope:
    try:
        return Scope(name)
    except ValueError as e:
        raise InvalidRequest(f"scopes are {', '.join(Scope)}", param="scopes") from e


def _document(key: KeyInfo) -> dict[str, Any]:
    return {
        "id": key.key_id,
        "object": "api_key",
        "name": key.name,
        "tenant": key.tenant,
        "scopes": [scope.value for scope in key.scopes],
        "priority": key.priority,
        "created_at": int(key.created_at.timestamp()),
        "expires_at": int(key.expires_at.timestamp()) if key.expires_at is not None else None,
        "team": key.team,
        "roles": list(key.roles),
        "models": list(key.models) if key.models is not None else None,
        "previous_expires_at": int(key.previous_until.timestamp()) if key.previous_until is not None else None,
    }
