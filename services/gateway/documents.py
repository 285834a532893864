"""JSON in and out of the routes that are rare and small."""

from __future__ import annotations

from typing import Any, TypeVar

import orjson
from fastapi import Request, Response
from pydantic import BaseModel, ValidationError

from inferflux.errors import InvalidRequest
from services.gateway import envelope
from services.gateway.asgi import header_map
from services.gateway.envelope import BodyLimits

M = TypeVar("M", bound=BaseModel)


def respond(document: dict[str, Any], status: int = 200) -> Response:
    """Answer with a JSON object."""
    return Response(orjson.dumps(document), status, media_type="application/json")


async def read(request: Request, kind: type[M], limits: BodyLimits) -> M:
    """Read a request's body and check it. Raises InvalidRequest, and what bodies that are too large or late raise."""
    data = await envelope.read_body(request.receive, header_map(request.headers.raw), limits)
    return validate(kind, envelope.parse_object(data, limits))


def validate(kind: type[M], document: dict[str, Any]) -> M:
    """Check a body. Raises InvalidRequest that names the first field that is wrong, without its value."""
    try:
        return kind.model_validate(document)
    except ValidationError as e:
        first = e.errors(include_input=False, include_url=False, include_context=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise InvalidRequest(f"{field}: {first['msg']}", param=field) from e
