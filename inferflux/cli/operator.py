"""What the operator may do without an API key: manage keys over gRPC, with the certificate in the home."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from inferflux.paths import Home
from inferflux.rpc.client import open_channel, translated_errors
from inferflux.rpc.mtls import Identity
from inferflux.v1 import policy_service_pb2 as pb
from inferflux.v1.policy_service_pb2_grpc import PolicyServiceStub
from inferflux.v1.worker_admin_service_pb2 import GetStatusRequest
from inferflux.v1.worker_admin_service_pb2_grpc import WorkerAdminServiceStub

TIMEOUT_S = 10.0
SCOPES = {"generate": pb.SCOPE_GENERATE, "read": pb.SCOPE_READ, "admin": pb.SCOPE_ADMIN}
SCOPE_NAMES = {number: name for name, number in SCOPES.items()}
T = TypeVar("T")


def list_keys(home: Home) -> list[dict[str, Any]]:
    """List live keys."""
    reply = call(home, lambda stub: stub.ListKeys(pb.ListKeysRequest(), timeout=TIMEOUT_S))
    return [to_document(record) for record in reply.keys]


def create_key(
    home: Home,
    name: str,
    scopes: Sequence[str] = (),
    tenant: str = "",
    expires_at: int | None = None,
    team: str = "",
    roles: Sequence[str] = (),
    models: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Create a key; the document has its `secret`, which exists nowhere else. `expires_at`: seconds since 1970."""
    granted = [SCOPES[scope] for scope in scopes]
    request = pb.CreateKeyRequest(name=name, tenant=tenant, team=team, scopes=granted, roles=roles)
    if models is not None:
        request.models.names.extend(models)
    if expires_at is not None:
        request.expires_at.FromSeconds(expires_at)
    reply = call(home, lambda stub: stub.CreateKey(request, timeout=TIMEOUT_S))
    return {**to_document(reply.key), "secret": reply.secret}


def rotate_key(home: Home, key_id: str, grace_s: float) -> dict[str, Any]:
    """Give a key a new secret; the document has it as its `secret`."""
    request = pb.RotateKeyRequest(key_id=key_id)
    request.grace.FromMilliseconds(int(grace_s * 1000))
    reply = call(home, lambda stub: stub.RotateKey(request, timeout=TIMEOUT_S))
    return {**to_document(reply.key), "secret": reply.secret}


def revoke_key(home: Home, key_id: str) -> None:
    """Revoke a key."""
    call(home, lambda stub: stub.RevokeKey(pb.RevokeKeyRequest(key_id=key_id), timeout=TIMEOUT_S))


def num_running(home: Home, worker_id: str, role: str) -> int:
    """Ask a worker how many requests it runs."""

    async def run() -> int:
        identity = Identity.load(home.pki, "operator")
        async with open_channel(home.socket(worker_id), identity, role) as channel:
            stub: Any = WorkerAdminServiceStub(channel)
            with translated_errors():
                reply = await stub.GetStatus(GetStatusRequest(), timeout=TIMEOUT_S)
            return int(reply.pulse.num_running + reply.pulse.num_waiting)

    return asyncio.run(run())


def call(home: Home, method: Callable[[Any], Awaitable[T]]) -> T:
    """Make one call as the operator. Raises InferfluxError."""

    async def run() -> T:
        identity = Identity.load(home.pki, "operator")
        async with open_channel(home.socket("policy"), identity, "policy") as channel:
            with translated_errors():
                return await method(PolicyServiceStub(channel))

    return asyncio.run(run())


def to_document(record: pb.KeyRecord) -> dict[str, Any]:
    """Render a key as the HTTP API does."""
    return {
        "id": record.key_id,
        "name": record.name,
        "tenant": record.tenant,
        "scopes": [SCOPE_NAMES[scope] for scope in record.scopes if scope in SCOPE_NAMES],
        "created_at": int(record.created_at.seconds),
        "expires_at": int(record.expires_at.seconds) if record.HasField("expires_at") else None,
        "team": record.team,
        "roles": list(record.roles),
        "models": list(record.models.names) if record.HasField("models") else None,
        "previous_expires_at": int(record.previous_until.seconds) if record.HasField("previous_until") else None,
    }
