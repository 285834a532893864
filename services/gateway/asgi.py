"""The few ASGI shapes the hot path uses, typed. Inference requests never become framework objects."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from inferflux.errors import InvalidRequest

AsgiScope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = dict[bytes, bytes]
# Our server's extension of ASGI, in scope["extensions"]: writes the next chunk of a response at once, or returns False
# when that is not possible now. Only between the start of a streamed response and its end.
WRITE_NOW = "inferflux.write_now"
WriteNow = Callable[[bytes], bool]
RawHeaders = list[tuple[bytes, bytes]]

# Two of these in one request are an attempt to make two readers see two requests.
_SINGLE = frozenset(
    (
        b"authorization",
        b"x-api-key",
        b"content-length",
        b"content-type",
        b"content-encoding",
        b"host",
        b"idempotency-key",
    )
)


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


def header_map(raw: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Map lower-case names to values. Raises InvalidRequest when a header that must be single comes twice."""
    headers: Headers = {}
    for name, value in raw:
        if name in headers and name in _SINGLE:
            raise InvalidRequest(f"more than one {name.decode()} header", param=name.decode())
        headers.setdefault(name, value)
    return headers


def encode_headers(pairs: Iterable[tuple[str, str]]) -> RawHeaders:
    """Encode names and values as they go on the wire."""
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in pairs]
