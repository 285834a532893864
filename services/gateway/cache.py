"""The prefix caches of prefill workers, for administrators: look, warm, pin.

A prefix is given as a call whose prompt it is, and belongs to a tenant: the administrator's own, unless the body names
another. It is computed on one worker after the other; on one host all but the first read it from the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from inferflux.errors import InferfluxError, InvalidRequest, NotFound, NoWorker
from services.gateway import envelope
from services.gateway.asgi import header_map
from services.gateway.auth import Authenticator
from services.gateway.documents import respond, validate
from services.gateway.endpoints import Scope
from services.gateway.envelope import BodyLimits
from services.gateway.pool import Pool
from services.gateway.prefill import PrefillLink, Prefix

LIMITS = BodyLimits(max_bytes=4 << 20, max_depth=32)
PATHS = {"messages": "/v1/chat/completions", "prompt": "/v1/completions"}


class PrefixBody(BaseModel):
    """What a body says besides the call itself."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: Annotated[str, Field(max_length=envelope.MAX_MODEL_NAME)] | None = None
    tenant: Annotated[str, Field(min_length=1, max_length=64)] | None = None


class PinBody(PrefixBody):
    """What a pin says besides its call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class CacheApi:
    """Handlers of the cache routes. `salt_of` makes a tenant's salt."""

    def __init__(self, auth: Authenticator, pool: Pool, salt_of: Callable[[str], str]) -> None:
        self._auth = auth
        self._pool = pool
        self._salt_of = salt_of

    def router(self) -> APIRouter:
        """Make the routes."""
        router, path = APIRouter(), "/v1/admin/cache"
        router.add_api_route(path, self.show, methods=["GET"])
        router.add_api_route(path + "/warm", self.warm, methods=["POST"])
        router.add_api_route(path + "/pins", self.pin, methods=["POST"])
        router.add_api_route(path + "/pins/{name}", self.unpin, methods=["DELETE"])
        return router

    async def show(self) -> Response:
        """Show the store of every prefill worker that answers."""
        return respond({"object": "list", "data": [await _status(link) for link in self._pool.prefills()]})

    async def warm(self, request: Request) -> Response:
        """Have a prefix computed on all prefill workers of its model."""
        prefix, links = await self._prefix(request, PrefixBody)
        return respond({"object": "cache.prefix", "model": prefix.model, "workers": await _warm(links, prefix)})

    async def pin(self, request: Request) -> Response:
        """Pin a prefix on all prefill workers of its model, or on none."""
        prefix, links = await self._prefix(request, PinBody)
        try:
            workers = await _warm(links, prefix)
        except InferfluxError:
            for link in links:
                with suppress(InferfluxError):  # a worker that is gone took its pins along
                    await link.unpin(prefix.pin)
            raise
        return respond({"object": "cache.pin", "name": prefix.pin, "model": prefix.model, "workers": workers}, 201)

    async def unpin(self, name: str) -> Response:
        """Let a pin go wherever it is."""
        were_pinned = [await link.unpin(name) for link in self._pool.prefills()]
        if not any(were_pinned):
            raise NotFound(f"no prefix is pinned as {name[:64]!r}")
        return respond({"object": "cache.pin", "name": name, "unpinned": True})

    async def _prefix(self, request: Request, kind: type[PrefixBody]) -> tuple[Prefix, Sequence[PrefillLink]]:
        """Read a body and find the workers it is for."""
        headers = header_map(request.headers.raw)
        principal = await self._auth.authorize(headers, Scope.ADMIN)
        document = envelope.parse_object(await envelope.read_body(request.receive, headers, LIMITS), LIMITS)
        body = validate(kind, document)
        path = next((path for field, path in PATHS.items() if field in document), None)
        if path is None:
            raise InvalidRequest("the body has neither messages nor prompt", param="messages")
        model = self._pool.resolve(body.model, principal.allowance)
        call = {key: value for key, value in document.items() if key not in ("name", "tenant")} | {"model": model}
        salt = principal.cache_salt if body.tenant is None else self._salt_of(body.tenant)
        name = body.name if isinstance(body, PinBody) else ""
        links = self._pool.prefills(model)
        if not links:
            raise NoWorker(f"no prefill worker of model {model!r} is up", retry_after_s=1)
        return Prefix(path, orjson.dumps(call), model, body.tenant or principal.tenant, salt, name), links


async def _warm(links: Sequence[PrefillLink], prefix: Prefix) -> list[dict[str, Any]]:
    return [{"worker": link.worker_id, "num_tokens": await link.warm(prefix)} for link in links]


async def _status(link: PrefillLink) -> dict[str, Any]:
    try:
        return {"worker": link.worker_id, **await link.cache()}
    except InferfluxError as e:
        return {"worker": link.worker_id, "error": e.reason}
