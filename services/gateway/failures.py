"""Errors as clients see them: one body per error, in the shape that the clients of the path understand."""

from __future__ import annotations

import math
import random
import re
from contextlib import suppress
from typing import Any

import orjson

from inferflux.errors import InferfluxError, Internal, InvalidRequest, LimitExceeded
from inferflux.types import HttpAnswer, HttpHead
from services.gateway.asgi import RawHeaders
from services.gateway.endpoints import Dialect

MAX_SPREAD = 3.0
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


# How the application of vLLM begins an event stream when it has refused the request.
_REFUSAL = re.compile(rb'(?:id: 0\n)?(?:event: error\n)?data: (\{(?:"type": ?"error", ?)?"error": ?\{[^\n]*)')
_JSON = ("content-type", "application/json")


class MethodNotAllowed(InvalidRequest):
    """The path is there, the method isn't. `allowed`: as in the Allow header."""

    reason, http_status = "METHOD_NOT_ALLOWED", 405

    def __init__(self, allowed: str) -> None:
        super().__init__(f"use {allowed}")
        self.allowed = allowed


def shown(error: BaseException) -> InferfluxError:
    """Return the error that may be shown: ours as it is, anything else without its text."""
    return error if isinstance(error, InferfluxError) else Internal("internal error")


def body(error: InferfluxError, dialect: Dialect, request_id: str) -> bytes:
    """Serialize an error that is the whole response."""
    return orjson.dumps(document(error, dialect, request_id))


def document(error: InferfluxError, dialect: Dialect, request_id: str) -> dict[str, Any]:
    """Describe an error in a dialect."""
    if dialect is Dialect.ANTHROPIC:
        inner = {"type": _anthropic_type(error.http_status), "message": error.message}
        return {"type": "error", "error": inner, "request_id": request_id}
    kind, code = _openai_type(error.http_status), error.reason.lower()
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


def translated(answer: HttpAnswer, dialect: Dialect, request_id: str) -> HttpAnswer:
    """Put an error of a worker's application into the shape of all errors; what it says of itself (5xx) is left out."""
    status, said = answer.head.status, _said(answer.body)
    message = str(said.get("message") or "") if status < 500 else ""
    message = message or f"the model's application answered with status {status}"
    if dialect is Dialect.ANTHROPIC:
        inner: dict[str, Any] = {"type": _anthropic_type(status), "message": message}
        told: dict[str, Any] = {"type": "error", "error": inner, "request_id": request_id}
    else:
        param = said.get("param")
        inner = {"message": message, "type": _openai_type(status), "param": param if isinstance(param, str) else None}
        told = {"error": {**inner, "code": _code(status)}}
    others = tuple(pair for pair in answer.head.headers if pair[0] != "content-type")
    return HttpAnswer(HttpHead(status, (*others, _JSON)), orjson.dumps(told))


def refusal(data: bytes) -> HttpAnswer | None:
    """Return the answer that an event stream should have been which begins with an error; None: it doesn't."""
    if (match := _REFUSAL.match(data)) is None:
        return None
    code = _said(match[1]).get("code")
    status = code if type(code) is int and 400 <= code <= 599 else InvalidRequest.http_status
    return HttpAnswer(HttpHead(status, (_JSON,)), match[1])


def _said(body: bytes) -> dict[str, Any]:
    with suppress(orjson.JSONDecodeError):
        document = orjson.loads(body)
        if isinstance(document, dict) and isinstance(error := document.get("error"), dict):
            return error
    return {}


def _code(status: int) -> str:
    return "not_found" if status == 404 else "invalid_request" if status < 500 else "internal"


def headers(error: InferfluxError) -> RawHeaders:
    """Return the headers that belong to an error: how to authenticate, when to come back."""
    extra: RawHeaders = []
    if error.http_status == 401:
        extra.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowed):
        extra.append((b"allow", error.allowed.encode()))
    is_own = isinstance(error, LimitExceeded)
    if is_own or error.is_retryable or error.retry_after_s is not None:
        # Not the same for all: who was refused together must not come back together. A limit is a client's own.
        spread = 1.0 if is_own else random.uniform(1, MAX_SPREAD)  # noqa: S311 - spreads clients, guards nothing
        extra.append((b"retry-after", str(math.ceil((error.retry_after_s or 1) * spread)).encode()))
    return extra


def _openai_type(status: int) -> str:
    return _OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def _anthropic_type(status: int) -> str:
    return _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
