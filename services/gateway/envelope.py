"""The little that the gateway reads of a request: the body within limits, and the envelope of its JSON.

The body itself goes to the workers byte for byte. All limits are enforced before any work is done for the request.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from inferflux.errors import BodyTooLarge, InvalidRequest, RequestTimeout
from services.gateway import bounds, capabilities, media, schemas, strict_json
from services.gateway.asgi import ClientGone, Headers, Receive
from services.gateway.bounds import Price
from services.gateway.capabilities import Wants

MAX_MODEL_NAME = 256
# A body must keep arriving at this rate after the grace time; a phone on a bad link sends faster.
SLOWEST_BODY_BYTES_PER_S = 16 * 1024


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """`grace_s`: a body may be silent this long in all, plus the time its bytes earn at the slowest rate.

    `max_sequences`: prompts times choices of one request. `max_schema_bytes`: of all its schemas together.
    """

    max_bytes: int = 32 << 20
    max_depth: int = 64
    grace_s: float = 10.0
    max_sequences: int = 128
    max_schema_bytes: int = 256 << 10
    max_schema_depth: int = 32


@dataclass(frozen=True, slots=True)
class Envelope:
    """What must be known about a call before it is routed. `model` None: the cluster's default."""

    model: str | None = None
    price: Price = field(default_factory=Price)
    wants: Wants = field(default_factory=Wants)


async def read_body(receive: Receive, headers: Headers, limits: BodyLimits) -> bytes:
    """Read the whole body. Raises BodyTooLarge, RequestTimeout or ClientGone."""
    _check_declared(headers, limits)
    chunks: list[bytes] = []
    num_bytes = 0
    started_at = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(started_at + limits.grace_s) as clock:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                chunk = message.get("body", b"")
                chunks.append(chunk)
                num_bytes += len(chunk)
                if num_bytes > limits.max_bytes:
                    raise _too_large(num_bytes, limits)
                if not message.get("more_body"):
                    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
                clock.reschedule(started_at + limits.grace_s + num_bytes / SLOWEST_BODY_BYTES_PER_S)
    except TimeoutError as e:
        raise RequestTimeout(f"the body came too slowly: {num_bytes} bytes so far") from e


def _check_declared(headers: Headers, limits: BodyLimits) -> None:
    encoding = headers.get(b"content-encoding", b"identity")
    if encoding.lower() != b"identity":
        raise InvalidRequest("compressed bodies are not supported", param="content-encoding")
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared[:20]) > limits.max_bytes:
        raise _too_large(int(declared[:20]), limits)


def _too_large(num_bytes: int, limits: BodyLimits) -> BodyTooLarge:
    return BodyTooLarge(f"the body has at least {num_bytes} bytes, the limit is {limits.max_bytes}")


def parse(body: bytes, limits: BodyLimits) -> Envelope:
    """Read the envelope of a JSON object. Raises InvalidRequest, also for what no worker may be asked for."""
    document = parse_object(body, limits)
    model = document.get("model")
    if model is not None and not (isinstance(model, str) and 0 < len(model) <= MAX_MODEL_NAME):
        raise InvalidRequest(f"model must be a string of 1 to {MAX_MODEL_NAME} characters", param="model")
    if document.get("cache_salt") is not None:
        raise InvalidRequest("cache_salt is not a client's to choose: caches are a tenant's own", param="cache_salt")
    media.refuse_addresses(body, document)
    schemas.check(document, limits.max_schema_bytes, limits.max_schema_depth)
    return Envelope(model, bounds.price(document, limits.max_sequences), capabilities.read(document))


def parse_object(body: bytes, limits: BodyLimits) -> dict[str, Any]:
    """Parse a JSON object that is not nested too deeply. Raises InvalidRequest."""
    return strict_json.parse_object(body, limits.max_depth)
