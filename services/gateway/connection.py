"""One client connection: uvicorn's HTTP/1.1 protocol with the limits that it lacks.

A client may not send headers without end, take forever to send them, leave a response unread for ever, or hold more
connections than its share. What is refused here never becomes a request.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from inferflux.errors import (
    HeadersTooLarge,
    InferfluxError,
    InvalidRequest,
    RequestTimeout,
    SlowConsumer,
    Unavailable,
)
from inferflux.telemetry import metrics
from services.gateway import failures
from services.gateway.asgi import WRITE_NOW
from services.gateway.endpoints import Dialect

# How much of a body, and for how long, is read and thrown away after its request was refused: a connection that is
# closed on a client in the middle of its sentence takes the answer with it.
LINGER_S = 2.0
LINGER_BYTES = 16 << 20


@dataclass(slots=True)
class ConnectionLimits:
    """The limits of all connections of a server, and how many there are. Times in seconds; see Settings for each."""

    max_header_bytes: int
    max_headers: int
    slow_client_s: float
    stalled_client_s: float
    max_connections: int
    max_connections_per_host: int
    num_open: int = 0
    num_by_host: Counter[str] = field(default_factory=Counter)

    def enter(self, host: str) -> bool:
        """Count a new connection; tells whether it is within the limits. Each needs one `leave`."""
        self.num_open += 1
        self.num_by_host[host] += 1
        metrics.CONNECTIONS.set(self.num_open)
        return self.num_open <= self.max_connections and self.num_by_host[host] <= self.max_connections_per_host

    def leave(self, host: str) -> None:
        """Stop counting a connection."""
        self.num_open -= 1
        self.num_by_host[host] -= 1
        if not self.num_by_host[host]:
            del self.num_by_host[host]
        metrics.CONNECTIONS.set(self.num_open)


class Connection(HttpToolsProtocol):
    """One connection. `_patience` runs while the client owes something, `_stall` while it doesn't read."""

    def __init__(
        self,
        limits: ConnectionLimits,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._host = ""
        self._is_in_head = True
        self._has_begun = False
        self._num_chunk_bytes = 0
        self._num_raw_bytes = 0
        self._num_head_bytes = 0
        self._num_discarded = 0
        self._refusal: InferfluxError = InvalidRequest("this is not a proper HTTP/1.1 request")
        self._patience: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    # --- the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._host = self.client[0] if self.client else ""
        self._expect(self._limits.slow_client_s, self._head_is_late)
        if not self._limits.enter(self._host):
            self._refuse(Unavailable("too many connections", retry_after_s=1))

    def connection_lost(self, exc: Exception | None) -> None:
        self._limits.leave(self._host)
        self._expect_nothing()
        self._forget_stall()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._num_chunk_bytes = len(data)
        super().data_received(data)
        owes_head = self._is_in_head and (self._has_begun or not self._is_answering())
        if owes_head and not self.transport.is_closing():
            self._wait_for_head()

    def _expect(self, timeout_s: float, on_late: Callable[[], None]) -> None:
        self._expect_nothing()
        self._patience = self.loop.call_later(timeout_s, on_late)

    def _expect_nothing(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    # --- the head of a request: limited in bytes, in number and in time

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_begun = True
        self._num_raw_bytes = -self._num_chunk_bytes  # the chunk may hold the end of the message before

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count_head(len(name) + len(value))

    def on_headers_complete(self) -> None:
        self._is_in_head = self._has_begun = False
        self._num_head_bytes = 0
        self._expect_nothing()
        self.scope["extensions"] = {WRITE_NOW: self.write_now}  # type: ignore[dict-item]
        super().on_headers_complete()

    def _count_head(self, num_bytes: int) -> None:
        """Count what the parser has understood; raising ends the parsing with `_refusal`."""
        limits = self._limits
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > limits.max_header_bytes:
            self._refusal = _headers_too_large(limits)
            raise self._refusal
        if len(self.headers) > limits.max_headers:
            self._refusal = HeadersTooLarge(f"there are more than {limits.max_headers} headers")
            raise self._refusal

    def _wait_for_head(self) -> None:
        """Count what came of a head that is not complete: the parser may hold a header of any size."""
        self._num_raw_bytes += self._num_chunk_bytes
        if self._num_raw_bytes > self._limits.max_header_bytes:
            self._refuse(_headers_too_large(self._limits))
        elif self._patience is None:
            self._expect(self._limits.slow_client_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._patience = None
        if self._has_begun:
            self._refuse(RequestTimeout("the headers came too slowly"))
        elif not self._is_answering():
            self.transport.close()

    # --- the rest of a body nobody reads: its request was refused

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Not so when the next request is in the line already: that one will be read.
        if self.cycle.response_complete and self.cycle.more_body and not self.transport.is_closing():
            self._expect(LINGER_S, self.transport.close)

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self.cycle.response_complete:
            self._num_discarded += len(body)
            if self._num_discarded > LINGER_BYTES:
                self.transport.close()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_in_head = True
        self._num_discarded = 0
        self._num_raw_bytes = -self._num_chunk_bytes  # the end of a body is no head
        self._expect_nothing()

    # --- a response, past the server's coroutines

    def write_now(self, data: bytes) -> bool:
        """Do what the server's `send` does for a chunk, when it need not wait: a third of the gateway's cost of one."""
        cycle = self.cycle
        if self.flow.write_paused or cycle.disconnected or cycle.response_complete or not cycle.chunked_encoding:
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    # --- a client that does not read

    def pause_writing(self) -> None:
        super().pause_writing()
        self._forget_stall()
        self._stall = self.loop.call_later(self._limits.stalled_client_s, self._is_stalled)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget_stall()

    def _is_stalled(self) -> None:
        """Give up on the client; it has not taken what was said before, so an error would not reach it either."""
        metrics.REJECT.labels(SlowConsumer.reason).inc()
        self.transport.abort()

    def _forget_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    # --- refusals

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser could not read; `msg` is uvicorn's."""
        self._refuse(self._refusal)

    def _refuse(self, error: InferfluxError) -> None:
        """Answer without a request and close. In the middle of another response there is only closing."""
        metrics.REJECT.labels(error.reason).inc()
        if not self._is_answering():
            self.transport.write(_response(error))
        self.transport.close()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete  # type: ignore[redundant-expr]


def _headers_too_large(limits: ConnectionLimits) -> HeadersTooLarge:
    return HeadersTooLarge(f"the request line and headers are larger than {limits.max_header_bytes} bytes")


def _response(error: InferfluxError) -> bytes:
    body = failures.body(error, Dialect.OPENAI, "")
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *failures.headers(error),
    ]
    lines = [name + b": " + value + b"\r\n" for name, value in headers]
    return b"".join([STATUS_LINE[error.http_status], *lines, b"\r\n", body])
