"""vLLM's own HTTP application, called in process: no port, no second implementation of its API."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from inferflux.types import HttpAnswer, HttpHead

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, MutableMapping

    from inferflux.types import ChoiceTokens, HttpCall

    Stamp = Callable[[bytes], tuple[ChoiceTokens, ...]]

CLOSE_GRACE_S = 1.0
MAX_BUFFERED_MESSAGES = 256
CHOICES = "inferflux.choices"


class Exchange:
    """One ASGI call: feeds the request, collects the response, can be closed at any time.

    `stamp` says which tokens a piece of the body brings; it is asked when the application writes it.
    """

    def __init__(self, app: Any, call: HttpCall, request_id: str, stamp: Stamp = lambda _: ()) -> None:
        self._app = app
        self._call = call
        self._scope = _scope(call, request_id)
        self._stamp = stamp
        self._messages: deque[MutableMapping[str, Any]] = deque()
        self._has_news = asyncio.Event()
        self._has_room = asyncio.Event()
        self._is_sent = False
        self.is_json = False
        """Whether the response is one JSON document; known from its head on."""
        self._is_disconnected = asyncio.Event()

    async def messages(self) -> AsyncGenerator[MutableMapping[str, Any], None]:
        """Run the application and yield its ASGI messages; None as a nudge when `wake` was called.

        Closing the generator disconnects the client from the application's view, then cancels what is left.
        """
        task = asyncio.create_task(self._app(self._scope, self._receive, self._send))
        task.add_done_callback(lambda _: self._has_news.set())
        try:
            while True:
                await self._has_news.wait()
                self._has_news.clear()
                while self._messages:
                    yield self._messages.popleft()
                self._has_room.set()
                yield {"type": "inferflux.wake"}
                if task.done() and not self._messages:
                    break
            task.result()
        finally:
            await self._close(task)

    def wake(self) -> None:
        """Let `messages` yield once although the application sent nothing."""
        self._has_news.set()

    async def _close(self, task: asyncio.Task[None]) -> None:
        """The application frees its engine requests when it sees the disconnect."""
        self._is_disconnected.set()
        self._has_room.set()
        if not task.done():
            await asyncio.wait([task], timeout=CLOSE_GRACE_S)
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
        if not task.cancelled():
            task.exception()

    async def _receive(self) -> dict[str, Any]:
        if not self._is_sent:
            self._is_sent = True
            return {"type": "http.request", "body": self._call.body, "more_body": False}
        await self._is_disconnected.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.is_json = (b"content-type", b"application/json") in message["headers"]
        if data := message.get("body"):
            message[CHOICES] = self._stamp(data)
        self._messages.append(message)
        self._has_news.set()
        while len(self._messages) > MAX_BUFFERED_MESSAGES and not self._is_disconnected.is_set():
            self._has_room.clear()
            await self._has_room.wait()


async def answer(app: Any, call: HttpCall, request_id: str) -> HttpAnswer:
    """Run one call to its end and collect the response."""
    head, body = HttpHead(500), bytearray()
    messages = Exchange(app, call, request_id).messages()
    async for message in messages:
        if message["type"] == "http.response.start":
            head = response_head(message)
        elif message["type"] == "http.response.body":
            body += message.get("body", b"")
    return HttpAnswer(head, bytes(body))


def response_head(message: MutableMapping[str, Any]) -> HttpHead:
    """Status and headers of an ASGI response start."""
    headers = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in message.get("headers", ()))
    return HttpHead(message["status"], headers)


def _scope(call: HttpCall, request_id: str) -> dict[str, Any]:
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in call.headers]
    headers = [(name, value) for name, value in headers if name not in (b"x-request-id", b"content-length")]
    headers += [(b"x-request-id", request_id.encode()), (b"content-length", str(len(call.body)).encode())]
    if not any(name == b"content-type" for name, _ in headers):
        headers.append((b"content-type", b"application/json"))
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": call.query.encode(),
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 0),
        "server": ("worker", 80),
        "state": {},
    }
