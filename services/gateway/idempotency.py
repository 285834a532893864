"""One execution, one bill, for all requests that carry the same Idempotency-Key.

The first request with a key begins an execution: the inference endpoint in a task of its own, its response recorded.
That request and its twins, sent in parallel or as retries, each get the recording from its beginning. An execution goes
on for a moment without anybody who listens, so that a client whose connection broke finds it when it comes back.

Idempotency keys are an API key's own, on one gateway. Answers that went well are kept for a while, within limits;
failures are not, so that a retry tries again.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from inferflux.clock import Clock
from inferflux.errors import IdempotencyKeyReused, InferfluxError, InvalidRequest
from inferflux.process import Tasks
from inferflux.telemetry import metrics
from services.gateway import envelope
from services.gateway.asgi import AsgiScope, ClientGone, Headers, Message, Receive, Send, header_map
from services.gateway.endpoints import ENDPOINTS
from services.gateway.inference import Inference
from services.gateway.lifeline import Lifeline

HEADER = b"idempotency-key"
REPLAYED = (b"idempotent-replayed", b"true")
ABANDONED_S = 5.0
"""How long an execution runs on when its last listener has left."""
_KEY = re.compile(rb"[\x21-\x7e]{1,255}")
Name = tuple[str, bytes]
"""Who asks, by API key or token, and the idempotency key."""


@dataclass(frozen=True, slots=True)
class RecordLimits:
    """How long answers are kept, in seconds, and how much of them in all, in bytes of their bodies."""

    ttl_s: float
    max_bytes: int


class Execution:
    """One run of a request and the recording of its response. `digest`: SHA-256 of what was asked."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.num_bytes = 0
        self.is_over = False
        self.is_abandoned = asyncio.Event()
        self.done_at = 0.0
        self._messages: list[Message] = []
        self._news = asyncio.Event()
        self._num_listeners = 0
        self._timer: asyncio.TimerHandle | None = None

    async def record(self, message: Message) -> None:
        """Take the next ASGI message of the response."""
        self._messages.append(message)
        self.num_bytes += len(message.get("body", b""))
        self._tell()

    def end(self, now: float) -> None:
        """Nothing more will come."""
        self.is_over, self.done_at = True, now
        self._tell()

    async def play(self, send: Send) -> None:
        """Send the whole response, as far as it is there and then as it comes."""
        num_sent = 0
        while True:
            for message in self._messages[num_sent:]:
                await send(message)
                num_sent += 1
            if num_sent == len(self._messages):
                if self.is_over:
                    return
                await self._news.wait()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keep the execution going inside the block, and for a moment after the last one."""
        self._num_listeners += 1
        if self._timer is not None:
            self._timer.cancel()
        try:
            yield
        finally:
            self._num_listeners -= 1
            if not self._num_listeners and not self.is_over:
                self._timer = asyncio.get_running_loop().call_later(ABANDONED_S, self.is_abandoned.set)

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


@dataclass(slots=True)
class Records:
    """Executions by name: those that run, and the answers of those that went well."""

    clock: Clock
    limits: RecordLimits
    _running: dict[Name, Execution] = field(default_factory=dict)
    _done: OrderedDict[Name, Execution] = field(default_factory=OrderedDict)
    _num_bytes: int = 0

    def find(self, name: Name) -> Execution | None:
        """Return what there is under a name."""
        self._expire()
        return self._running.get(name) or self._done.get(name)

    def begin(self, name: Name, execution: Execution) -> None:
        """Take in an execution that starts now."""
        self._running[name] = execution

    def end(self, name: Name, execution: Execution, *, is_kept: bool) -> None:
        """Note that an execution is over, and keep its answer if it is worth it."""
        execution.end(self.clock.monotonic())
        del self._running[name]
        if is_kept and execution.num_bytes <= self.limits.max_bytes:
            self._done[name] = execution
            self._num_bytes += execution.num_bytes
        self._expire()

    def _expire(self) -> None:
        """Drop what is too old or too much, oldest first."""
        oldest_at = self.clock.monotonic() - self.limits.ttl_s
        while self._done:
            execution = next(iter(self._done.values()))
            if execution.done_at > oldest_at and self._num_bytes <= self.limits.max_bytes:
                return
            self._done.popitem(last=False)
            self._num_bytes -= execution.num_bytes


@dataclass(frozen=True, slots=True)
class Idempotency:
    """The inference endpoint for requests with and without a key."""

    inference: Inference
    records: Records
    tasks: Tasks

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["method"] != "POST" or all(name != HEADER for name, _ in scope["headers"]):
            await self.inference(scope, receive, send)
            return
        try:
            execution, is_twin = await self._join(scope, receive)
        except InferfluxError as e:
            await self.inference.refuse(scope, send, e)
        except ClientGone:
            pass
        else:
            await self._follow(execution, receive, _marked(send) if is_twin else send)

    async def _join(self, scope: AsgiScope, receive: Receive) -> tuple[Execution, bool]:
        """Find the execution of a request, or begin it. Raises InferfluxError, ClientGone."""
        headers = header_map(scope["headers"])
        principal = await self.inference.auth.authorize(headers, ENDPOINTS[scope["path"]].scope)
        name = (principal.key_id, _key(headers))
        body = await envelope.read_body(receive, headers, self.inference.limits)
        digest = _digest(scope, body)
        execution = self.records.find(name)
        if execution is None:
            execution = Execution(digest)
            self.records.begin(name, execution)
            self.tasks.spawn(self._execute(name, execution, scope, body), "idempotent-request", may_return=True)
            return execution, False
        if execution.digest != digest:
            raise IdempotencyKeyReused("this idempotency-key was used for another request", param=HEADER.decode())
        metrics.IDEMPOTENT_HITS.labels("done" if execution.is_over else "running").inc()
        return execution, True

    async def _execute(self, name: Name, execution: Execution, scope: AsgiScope, body: bytes) -> None:
        """Run the endpoint with a client that is content with everything until it is gone."""
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await execution.is_abandoned.wait()
            return {"type": "http.disconnect"}

        is_good = False
        try:
            is_good = await self.inference({**scope, "extensions": {}}, receive, execution.record)
        finally:
            self.records.end(name, execution, is_kept=is_good)

    async def _follow(self, execution: Execution, receive: Receive, send: Send) -> None:
        """Pass a recording on for as long as its client is there."""
        patience_s = 2 * self.inference.timeout_s  # the execution has the request's deadline
        try:
            with execution.listening():
                async with Lifeline(receive, asyncio.get_running_loop().time() + patience_s):
                    await execution.play(send)
        except (ClientGone, InferfluxError):
            return


def _key(headers: Headers) -> bytes:
    key = headers[HEADER]
    if not _KEY.fullmatch(key):
        raise InvalidRequest(
            f"idempotency-key must be 1 to 255 visible ASCII characters, it has {len(key)}", param=HEADER.decode()
        )
    return key


def _digest(scope: AsgiScope, body: bytes) -> bytes:
    asked = hashlib.sha256()
    for part in (scope["path"].encode(), scope["query_string"], body):
        asked.update(len(part).to_bytes(8, "big") + part)
    return asked.digest()


def _marked(send: Send) -> Send:
    """Let a twin know that it is one."""

    async def mark(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], REPLAYED]}
        await send(message)

    return mark
