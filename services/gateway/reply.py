"""The client's side of one request: the only writer of its response.

The head waits for the first byte of the body, so that everything which fails before it is still a proper HTTP error.
Event streams then flow byte for byte; every other response is sent as one piece when it is complete.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from inferflux.errors import InferfluxError, Internal
from inferflux.types import HttpAnswer, HttpHead
from services.gateway import failures, losses, sse
from services.gateway.asgi import RawHeaders, Send, WriteNow, encode_headers
from services.gateway.endpoints import Dialect
from services.gateway.guardrails.guard import OutputGuard

# Of the connection between worker and gateway, or set by the gateway itself.
_NOT_FORWARDED = frozenset(
    ("connection", "keep-alive", "transfer-encoding", "content-length", "date", "server", "set-cookie", "x-request-id")
)
_SSE_HEADERS: RawHeaders = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class Reply:
    """One response. `headers` go on it, whatever it becomes. `write_now`: see WRITE_NOW; None = not to be had.

    `status` 0: nothing is written yet. `first_at`: when the first byte was, in the loop's time.
    """

    def __init__(
        self,
        send: Send,
        request_id: str,
        dialect: Dialect,
        headers: RawHeaders,
        write_now: WriteNow | None = None,
    ) -> None:
        self.status = 0
        self.first_at = 0.0
        self.num_bytes = 0
        self.is_streaming = False
        self.error: InferfluxError | None = None
        self._head: HttpHead | None = None
        self._send = send
        self._request_id = request_id
        self.dialect = dialect
        self._headers = headers
        self._write_now = write_now
        self._held: list[bytes] = []
        self._refusal: HttpAnswer | None = None
        self._guard: OutputGuard | None = None

    def guard(self, guard: OutputGuard) -> None:
        """Have everything that workers say looked at; nothing is written past the guard."""
        self._guard = guard
        self._write_now = None

    @property
    def has_started(self) -> bool:
        """Whether anything has been written: then the status can't change any more."""
        return self.status != 0

    def stamp(self, headers: RawHeaders) -> None:
        """Put more headers on the response, whatever it becomes; too late once it has started."""
        self._headers = [*self._headers, *headers]

    def begin(self) -> None:
        """Forget what a worker said that was lost before the client heard any of it."""
        self._held.clear()
        self._refusal = None

    async def write(self, head: HttpHead | None, data: bytes) -> None:
        """Take the next bytes of the body of a worker's response."""
        if self.is_streaming:
            if head is not self._head:
                self._go_on(head)
            if self._guard is not None and not (data := await self._passed(self._guard.feed(data))):
                return
            self.num_bytes += len(data)
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
        elif head is not None and is_event_stream(head):
            self._refusal = self._refusal or failures.refusal(data)
            if self._refusal is not None:
                return  # whatever the stream could still say after it
            self.is_streaming, self._head = True, head
            await self._start(head, _SSE_HEADERS)
            await self.write(head, data)
        else:
            self._held.append(data)

    def write_now(self, data: bytes) -> bool:
        """Write the next bytes of an event stream unless they would have to wait for the client; tells whether it did.

        Saves the wake-up of the request's own task, and so a third of what a token costs.
        """
        if self._write_now is None or not self._write_now(data):
            return False
        self.num_bytes += len(data)
        return True

    async def finish(self, head: HttpHead | None) -> None:
        """End the response of a worker that has sent everything. Raises Internal when that is nothing."""
        if self.is_streaming:
            await self._end(await self._passed(self._guard.finish()) if self._guard is not None else b"")
        elif self._refusal is not None:
            await self.answer(self._refusal)
        elif head is None or is_event_stream(head):
            raise Internal("the worker ended the request without an answer")
        else:
            await self.answer(HttpAnswer(head, b"".join(self._held)))

    def _go_on(self, head: HttpHead | None) -> None:
        """Take the rest of an event stream from another worker. Raises Internal when that answers differently."""
        if head is None or not is_event_stream(head):
            raise losses.not_continued()
        self._head = head

    async def answer(self, answer: HttpAnswer) -> None:
        """Send a complete response of a worker. Raises Internal when another one has begun differently."""
        if self.has_started:
            raise losses.not_continued()
        if is_event_stream(answer.head):
            answer = failures.refusal(answer.body) or answer
        if answer.head.status >= 400:
            answer = failures.translated(answer, self.dialect, self._request_id)
        if self._guard is not None:
            answer = await self._allowed(self._guard, answer)
        await self._start(answer.head, [(b"content-length", str(len(answer.body)).encode())])
        await self._end(answer.body)

    async def _passed(self, passing: Awaitable[bytes]) -> bytes:
        """Return what the guard lets pass of an event stream. Raises the error with which it has ended the stream."""
        try:
            data = await passing
        except InferfluxError as e:
            self.error = e
            raise
        if self._guard is not None and self._guard.error is not None:
            self.error = self._guard.error
            self.is_streaming = False
            await self._end(data)
            raise self._guard.error
        return data

    async def _allowed(self, guard: OutputGuard, answer: HttpAnswer) -> HttpAnswer:
        try:
            return await guard.answer(answer)
        except InferfluxError as e:
            self.error = e
            raise

    async def fail(self, error: InferfluxError) -> None:
        """End the response with an error: as its status and body, or as the last event of a stream that has begun."""
        self.error = error
        if self.is_streaming:
            await self._end(sse.error_event(error, self.dialect, self._request_id))
        elif not self.has_started:
            body = failures.body(error, self.dialect, self._request_id)
            length = (b"content-length", str(len(body)).encode())
            json = (b"content-type", b"application/json")
            await self._start(HttpHead(error.http_status), [json, length, *failures.headers(error)])
            await self._end(body)

    async def _start(self, head: HttpHead, extra: RawHeaders) -> None:
        self.status = head.status
        self.first_at = asyncio.get_running_loop().time()
        theirs = encode_headers((name, value) for name, value in head.headers if name not in _NOT_FORWARDED)
        headers = [*theirs, *extra, *self._headers]
        await self._send({"type": "http.response.start", "status": head.status, "headers": headers})

    async def _end(self, data: bytes) -> None:
        self.num_bytes += len(data)
        await self._send({"type": "http.response.body", "body": data})


def is_event_stream(head: HttpHead) -> bool:
    """Whether a response is a stream of server-sent events."""
    return any(name == "content-type" and value.startswith("text/event-stream") for name, value in head.headers)
