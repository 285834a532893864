"""All routes of the gateway. Each is public, or behind a gate that says which scopes it takes: there is no third kind.

Inference goes through one raw ASGI endpoint with a gate of its own; the rest is rare and small, and uses the framework.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route

from inferflux import ops
from inferflux.errors import InferfluxError, ModelNotFound, NotFound
from inferflux.lifecycle import Lifecycle
from inferflux.policy.identity import Allowance
from inferflux.telemetry import metrics
from services.gateway import failures
from services.gateway.asgi import AsgiScope, Message, Receive, Send, header_map
from services.gateway.auth import Authenticator, Principal
from services.gateway.documents import respond
from services.gateway.endpoints import ENDPOINTS, Dialect, Scope
from services.gateway.idempotency import Idempotency
from services.gateway.inference import Inference, new_request_id
from services.gateway.resumption import STREAMS, Resumption
from services.gateway.views import Model

Models = Callable[[Allowance, str | None], tuple[Model, ...]]
_log = logging.getLogger(__name__)
NAMED = ("/v1/models/", "/v1/admin/models/", "/v1/admin/adapters/")
_BY_PROXY = ("forwarded", "x-forwarded-for", "via")


@dataclass(frozen=True, slots=True)
class Gate:
    """Lets requests through whose key has one of the scopes.

    `is_open_to_loopback`: also those that come from this machine, unless a proxy here says that it passes them on.
    """

    auth: Authenticator
    scopes: tuple[Scope, ...]
    is_open_to_loopback: bool = False

    async def __call__(self, request: Request) -> None:
        """Raise Unauthenticated or PermissionDenied, or return."""
        if self.is_open_to_loopback and _is_loopback(request) and not _is_by_proxy(request):
            return
        request.state.principal = await self.auth.authorize(header_map(request.headers.raw), *self.scopes)


@dataclass(frozen=True, slots=True)
class Doorway:
    """What the server calls: sends inference requests past the framework, and stamps all other responses.

    The framework's layers would cost a request 50 us, and each of its events one more coroutine.
    """

    app: FastAPI
    inference: Inference
    idempotency: Idempotency
    resumption: Resumption

    def routes(self) -> list[str]:
        """List everything there is to ask for, e.g. `GET /v1/models`."""
        framework = [f"{method} {route.path}" for route in _routes(self.app) for method in route.methods or ()]
        return sorted([*framework, *(f"POST {path}" for path in ENDPOINTS), f"GET {STREAMS}{{request_id}}"])

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if b"%" in scope["raw_path"]:
            scope["path"] = _spelled(scope["path"], scope["raw_path"])
        if scope["path"] in ENDPOINTS:
            await self.idempotency(scope, receive, send)
            return
        if scope["path"].startswith(STREAMS):
            await self.resumption(scope, receive, send)
            return
        request_id, audit = new_request_id(), self.inference.audit
        headers = self.inference.response_headers(request_id)

        async def stamp(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *headers]
                if audit is not None:
                    audit.answered(scope, message["status"], request_id)
            await send(message)

        await self.app(scope, receive, stamp)


class AdminRoutes(Protocol):
    """A part of the admin API."""

    def router(self) -> APIRouter: ...


def create_app(idempotency: Idempotency, admin: Sequence[AdminRoutes], models: Models, lifecycle: Lifecycle) -> Doorway:
    """Put all routes together. `admin`: what only administrators reach."""
    inference = idempotency.inference
    auth = inference.auth
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.include_router(_health_routes(lifecycle))
    app.include_router(_metrics_routes(), dependencies=[Depends(Gate(auth, (Scope.READ,), is_open_to_loopback=True))])
    app.include_router(_model_routes(models), dependencies=[Depends(Gate(auth, (Scope.READ, Scope.GENERATE)))])
    gates = [Depends(Gate(auth, (Scope.ADMIN,)))]
    if inference.audit is not None:
        gates.append(Depends(inference.audit.intend))
    for api in admin:
        app.include_router(api.router(), dependencies=gates)
    for kind in (InferfluxError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)
    doorway = Doorway(app, inference, idempotency, Resumption(inference))
    _log.debug("routes", extra={"routes": doorway.routes()})
    return doorway


def _spelled(path: str, raw_path: bytes) -> str:
    """Return a path as it is written, unless that is the one way to write it: a filter in front of us knows only that.

    Names of models may have any characters, a slash as `%2F` among them.
    """
    written = raw_path.decode("latin-1")
    is_plain = quote(path, safe="/:@!$&'()*+,;=~") == written or written.startswith(NAMED)
    return path if is_plain else written


def _routes(app: FastAPI) -> list[Route]:
    return [route for route in app.routes if isinstance(route, Route)]


def _health_routes(lifecycle: Lifecycle) -> APIRouter:
    router = APIRouter()

    async def livez() -> Response:
        return Response("ok\n", media_type="text/plain")

    async def healthz() -> Response:
        return respond(ops.status(lifecycle))

    async def readyz() -> Response:
        status = ops.status(lifecycle)
        return respond(status, 200 if status["ready"] else 503)

    router.add_api_route("/livez", livez, methods=["GET"])
    router.add_api_route("/healthz", healthz, methods=["GET"])
    router.add_api_route("/readyz", readyz, methods=["GET"])
    return router


def _metrics_routes() -> APIRouter:
    router = APIRouter()

    async def exposition() -> Response:
        content_type, text = metrics.render()
        return Response(text, media_type=content_type)

    router.add_api_route("/metrics", exposition, methods=["GET"])
    return router


def _model_routes(models: Models) -> APIRouter:
    router = APIRouter()

    async def list_models(request: Request) -> Response:
        return respond({"object": "list", "data": [_model(model) for model in models(*_asker(request))]})

    async def get_model(request: Request, name: str) -> Response:
        for model in models(*_asker(request)):
            if model.name == name:
                return respond(_model(model))
        raise ModelNotFound(f"the model {name!r} does not exist", param="model")

    router.add_api_route("/v1/models", list_models, methods=["GET"])
    router.add_api_route("/v1/models/{name:path}", get_model, methods=["GET"])
    return router


def _asker(request: Request) -> tuple[Allowance, str | None]:
    """Who asks: what the key may use, and its tenant."""
    principal: Principal = request.state.principal
    return principal.allowance, principal.tenant


def _model(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_at,
        "owned_by": "inferflux",
        "max_model_len": model.max_model_len,
        "dtype": model.dtype,
        "digest": model.digest,
        "capabilities": list(model.capabilities),
        "is_default": model.is_default,
        "version": model.version or None,
        "signed_by": model.signed_by or None,
        "parent": model.parent or None,
        "failed_workers": [{"id": worker.worker_id, "reason": worker.reason} for worker in model.failed_workers],
    }


async def _answer_error(request: Request, error: Exception) -> Response:
    shown = _of_framework(error, request) if isinstance(error, HTTPException) else failures.shown(error)
    headers = {name.decode(): value.decode() for name, value in failures.headers(shown)}
    body = failures.body(shown, Dialect.OPENAI, request_id="")
    return Response(body, shown.http_status, headers, media_type="application/json")


def _of_framework(error: HTTPException, request: Request) -> InferfluxError:
    if error.status_code == 405:
        return failures.MethodNotAllowed((error.headers or {}).get("Allow", ""))
    return NotFound(f"there is nothing at {request.method} {request.url.path[:256]}")


def _is_loopback(request: Request) -> bool:
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


def _is_by_proxy(request: Request) -> bool:
    return any(name in request.headers for name in _BY_PROXY)
