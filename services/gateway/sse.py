"""The one SSE event the gateway writes itself: the end of a stream that failed after its first byte.

All other events are the workers' bytes. A stream that ends with this event has no `[DONE]`, so no client can mistake it
for a complete answer.
"""

from __future__ import annotations

import orjson

from inferflux.errors import InferfluxError
from services.gateway import failures
from services.gateway.endpoints import Dialect


def error_event(error: InferfluxError, dialect: Dialect, request_id: str) -> bytes:
    """Serialize an error that ends a stream."""
    document = failures.document(error, dialect, request_id)
    document["type"] = "error"
    document["error"]["code"] = error.reason.lower()
    document["error"]["retryable"] = error.is_retryable
    document["error"]["request_id"] = request_id
    return b"event: error\ndata: " + orjson.dumps(document) + b"\n\n"
