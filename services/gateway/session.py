"""All requests of this gateway on one decode worker, over one stream.

One message from the worker carries the news of many requests, so what is done here per delta is the gateway's cost per
token: find the stream, pass its bytes to the client.

A broken stream loses its requests: each of them ends with WorkerLost and goes on elsewhere from its journal. When the
stream is open again the worker is told to drop what it may still compute for them, before it hears of anything new;
what it still says about them is counted and dropped.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from itertools import count
from time import monotonic
from types import TracebackType
from typing import Any, Self

import grpc

from inferflux import failpoints
from inferflux.errors import Draining, InferfluxError, Internal, SlowConsumer, WorkerLost
from inferflux.rpc.client import error_of, translated_errors
from inferflux.telemetry import metrics
from inferflux.telemetry.tracing import Span
from inferflux.types import End, HttpHead, KvReport, Usage, end_from_proto, kv_from_proto
from inferflux.v1 import decode_service_pb2 as pb
from inferflux.v1.decode_service_pb2_grpc import DecodeServiceStub
from services.gateway.asgi import WriteNow
from services.gateway.call import Call
from services.gateway.heart import Heart
from services.gateway.link import Link
from services.gateway.poison import Inquest
from services.gateway.prefill import Tickets
from services.gateway.reply import Reply, is_event_stream
from services.gateway.views import Worker

RECALL_S = 5.0
OnKv = Callable[[KvReport], None]
_log = logging.getLogger(__name__)


class TokenStream:
    """One request's response as it arrives. Use it in a `with` block: leaving it early tells the worker to stop.

    `relay` passes the response on. While it waits, bytes go to the client as they come in; what comes while the client
    is slow waits here, and goes as one piece.
    """

    __slots__ = (
        "_chunks",
        "_end",
        "_error",
        "_has_ids",
        "_head",
        "_journal",
        "_last_at",
        "_num_waiting",
        "_on_kv",
        "_session",
        "_waiter",
        "_write_now",
        "call",
        "handle",
    )

    def __init__(self, session: DecodeSession, handle: int, call: Call, on_kv: OnKv) -> None:
        self.handle = handle
        self.call = call
        self._journal = call.journal
        self._session = session
        self._on_kv = on_kv
        self._write_now: WriteNow = _not_now
        self._head: HttpHead | None = None
        self._has_ids = False
        self._end: End | None = None
        self._error: InferfluxError | None = None
        self._chunks: list[bytes] = []
        self._num_waiting = 0
        self._last_at = 0.0
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close(self)

    @property
    def usage(self) -> Usage:
        """What the request cost: as its worker says, or else (it is lost, or tells a failure) the tokens that came."""
        usage = self._end.usage if self._end is not None else Usage()
        return usage if usage != Usage() else Usage(completion_tokens=self._journal.num_tokens)

    async def relay(self, reply: Reply) -> None:
        """Pass the whole response on. Raises WorkerLost, SlowConsumer, or the error that the worker reported."""
        reply.begin()
        while await self._has_data():
            chunks, self._chunks, self._num_waiting = self._chunks, [], 0
            await reply.write(self._head, b"".join(chunks))
            if reply.is_streaming:
                self._write_now = reply.write_now
        await reply.finish(self._head)

    def feed(self, delta: pb.Delta, now: float) -> None:
        """Take one delta of a batch; `flush` once after the last. `now` is the same for all of them."""
        if data := delta.data:
            if self._last_at:
                self._session.gaps.observe(now - self._last_at)
            else:
                self._session.begun(self, now)
            self._last_at = now
            if self._head is None and delta.HasField("head"):
                self._take_head(delta)
            if self._has_ids:
                data = b"id: %d\n%b" % (self._journal.num_events, data)
            self._journal.num_events += 1
            self._keep(data)
        for tokens in delta.choices:
            self._journal.take(tokens.index, tokens.token_ids)
        # Per request rather than per token, and cheap to rule out.
        if delta.HasField("head") or delta.kv or delta.HasField("end"):
            self._feed_rest(delta)

    def flush(self) -> None:
        """Pass on what a batch brought: straight to the client if it can take it now, else through the relay."""
        # While the relay waits, nothing is before these bytes.
        if self._chunks and self._waiter is not None and self._write_now(b"".join(self._chunks)):
            self._chunks.clear()
            self._num_waiting = 0
        if self._chunks or self._end is not None:
            self._wake()

    def fail(self, error: InferfluxError) -> None:
        """End the stream; what is kept is still delivered, unless its reader is the problem."""
        if isinstance(error, SlowConsumer):
            self._chunks.clear()
        self._error = self._error or error
        self._wake()

    async def _has_data(self) -> bool:
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._end is not None:
                return False
            self._waiter = self._session.loop.create_future()
            await self._waiter
        return True

    def _keep(self, data: bytes) -> None:
        if self._num_waiting > self._session.max_buffered_bytes:
            # The worker is told now, the client when it reads again: its relay waits for that.
            self._session.close(self)
            self.fail(SlowConsumer(f"the client left {self._num_waiting} bytes of the response waiting"))
            return
        self._chunks.append(data)
        self._num_waiting += len(data)

    def _feed_rest(self, delta: pb.Delta) -> None:
        if self._head is None and delta.HasField("head"):
            self._take_head(delta)
        for report in delta.kv:
            self._on_kv(kv_from_proto(report))
        if delta.HasField("end"):
            self._session.forget(self)
            self._end = end_from_proto(delta.end)
            if (error := self._end.error) is not None:
                self._session.failed(self, error_of(error.reason, error.message))

    def _take_head(self, delta: pb.Delta) -> None:
        self._head = HttpHead.from_proto(delta.head)
        self._has_ids = self._session.has_event_ids and is_event_stream(self._head)

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class DecodeSession(Link):
    """The stream to one worker that answers: a decode worker, or a pooling worker."""

    def __init__(
        self,
        worker: Worker,
        channel: grpc.aio.Channel,
        heart: Heart,
        inquest: Inquest,
        hello: pb.Hello,
        *,
        max_buffered_bytes: int,
        has_event_ids: bool = True,
    ) -> None:
        super().__init__(worker, channel, heart, inquest)
        self.role = worker.role
        self.loop = asyncio.get_running_loop()
        self.max_buffered_bytes = max_buffered_bytes
        self.has_event_ids = has_event_ids
        self._stub: Any = DecodeServiceStub(channel)
        self._hello = hello
        self.gaps = metrics.ITL.labels(worker.model)
        self._phases = {
            phase: metrics.PHASES.labels(phase, self.role.value, self.worker_id) for phase in ("prefill", "decode")
        }
        self._handles = count(1)
        self._streams: dict[int, TokenStream] = {}
        self._abandoned: set[int] = set()
        self._last_lost = 0
        self._locals: set[int] = set()
        self._speaker = ""
        self._outbox: deque[pb.SessionCommand] = deque()
        self._has_mail = asyncio.Event()

    @property
    def num_local_prefills(self) -> int:
        """See Link."""
        return len(self._locals)

    @property
    def has_suspects(self) -> bool:
        """Whether a request runs here under which a worker died and that got no further since."""
        return any(stream.call.losses.deaths for stream in self._streams.values())

    def start(self, call: Call, span: Span, tickets: Tickets) -> TokenStream:
        """Start a request, or go on with one from its journal. Its tickets hear at once what became of each.

        Raises Draining or WorkerLost when the worker has changed since it was chosen.
        """
        if not self.heart.is_ready:
            raise (Draining if self.heart.is_up else WorkerLost)("the decode worker takes no requests any more")
        stream = TokenStream(self, next(self._handles), call, tickets.settle)
        self._streams[stream.handle] = stream
        start = pb.Start(handle=stream.handle, context=call.context(span), call=call.http, prompts=tickets.prompts)
        start.num_events = call.journal.num_events
        for index, token_ids in call.journal.groups():
            start.delivered.add(index=index, token_ids=token_ids)
        self._send(pb.SessionCommand(start=start))
        self._count(stream, tickets)
        if call.losses.deaths:
            self._inquest.watch(call)
        return stream

    def _count(self, stream: TokenStream, tickets: Tickets) -> None:
        self._phases["decode"].inc()
        if stream.call.needs_prefill and not tickets.prompts:
            self._phases["prefill"].inc()
            metrics.PREFILLS.labels("local", tickets.why_local).inc()
            self._locals.add(stream.handle)

    def begun(self, stream: TokenStream, now: float) -> None:
        """Hear of the first data of a request from this worker."""
        self._locals.discard(stream.handle)
        losses = stream.call.losses
        if losses.lost_at:
            metrics.RESUME_SECONDS.observe(now - losses.lost_at)
            losses.lost_at = 0.0
        if losses.deaths:
            self._inquest.clear(stream.call)

    def failed(self, stream: TokenStream, error: InferfluxError) -> None:
        """Hear that a request failed here; when its engine died, so did all of them."""
        if isinstance(error, Draining):
            self.heart.refuse()
        if isinstance(error, WorkerLost):
            self._streams[stream.handle] = stream
            self._lost(is_death=True)
        stream.fail(error)

    async def recall(self, request: pb.RecallRequest) -> pb.RecallResponse:
        """Take back what the worker knows of a request, and end it there. Raises NotFound, Unavailable."""
        with translated_errors():
            response: pb.RecallResponse = await self._stub.Recall(request, timeout=RECALL_S)
            return response

    def close(self, stream: TokenStream) -> None:
        """End a stream; the worker is told unless it has ended it itself. Idempotent."""
        if self.forget(stream):
            self._send(_cancel(stream.handle, "closed"))

    def forget(self, stream: TokenStream) -> bool:
        """Expect nothing more for a stream that the worker has ended; tells whether anything was."""
        self._locals.discard(stream.handle)
        if stream.call.losses.deaths:
            self._inquest.news.ring()
        return self._streams.pop(stream.handle, None) is not None

    def _send(self, command: pb.SessionCommand) -> None:
        self._outbox.append(command)
        self._has_mail.set()

    async def _converse(self) -> None:
        # The worker's session outlives the stream: it must still hear what was not sent.
        self._abandoned.update(command.cancel.handle for command in self._outbox if command.HasField("cancel"))
        self._outbox.clear()
        self._send(pb.SessionCommand(hello=self._hello))
        for handle in self._abandoned:
            self._send(_cancel(handle, "lost"))
        self._speaker = ""
        call = self._call = self._stub.Session()
        writer = asyncio.create_task(self._write(call), name=f"session-writer-{self.worker_id}")
        writer.add_done_callback(lambda _: call.cancel())
        try:
            async for batch in call:
                self._receive(batch)
        finally:
            writer.cancel()
            call.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _write(self, call: Any) -> None:
        """The only writer: two concurrent writes would break the stream. The reader sees a broken stream as well."""
        while True:
            while self._outbox:
                await call.write(self._outbox[0])
                self._outbox.popleft()
            self._has_mail.clear()
            await self._has_mail.wait()

    def _receive(self, batch: pb.StepBatch) -> None:
        if batch.incarnation != self._speaker and not self._is_first(batch.incarnation):
            return
        if failpoints.ON and batch.deltas:
            failpoints.hit("gateway.batch")
        now = monotonic()
        touched: dict[int, TokenStream] = {}
        for delta in batch.deltas:
            handle = delta.handle
            stream = self._streams.get(handle)
            if stream is not None:
                touched[handle] = stream
                try:
                    stream.feed(delta, now)
                except Exception as e:  # noqa: BLE001 - one request's trouble must not end the others'
                    _log.error("delta not taken", exc_info=e, extra={"worker": self.worker_id})
                    stream.fail(Internal("internal error"))
            elif handle <= self._last_lost:
                metrics.FENCED_WRITES.inc()
        # All of it before any of the system calls, which leave the processor's caches cold for our code.
        for stream in touched.values():
            stream.flush()
        if batch.HasField("pulse"):
            self._take_pulse(batch.pulse)
            self._abandoned.clear()

    def _is_first(self, incarnation: str) -> bool:
        """Whether a stream's worker says who it is; that can be older than what the registry knows, but not change."""
        who = {"worker": self.worker_id, "incarnation": incarnation}
        if self._speaker:
            metrics.VERSION_REGRESSION.labels("worker").inc()
            _log.error("batch of another incarnation refused", extra={**who, "expected": self._speaker})
            return False
        if incarnation < self.incarnation:
            _log.warning("worker has an older incarnation than registered", extra={**who, "expected": self.incarnation})
        self._speaker = incarnation
        return True

    def _lost(self, *, is_death: bool) -> None:
        streams, self._streams = self._streams, {}
        if not streams:
            return
        self._last_lost = max(streams)
        self._locals.clear()
        self._abandon(streams)
        if is_death:
            self._inquest.died(self.incarnation, [stream.call for stream in streams.values()])
        for stream in streams.values():
            stream.fail(WorkerLost("the decode worker was lost"))

    def _abandon(self, handles: Iterable[int]) -> None:
        """Have the worker told to stop: now if it hears us, and when its stream is open again."""
        self._abandoned.update(handles)
        if self.heart.is_up:
            for handle in handles:
                self._send(_cancel(handle, "lost"))


def _not_now(_: bytes) -> bool:
    """Stand in for a client that can't be written to without waiting."""
    return False


def _cancel(handle: int, why: str) -> pb.SessionCommand:
    return pb.SessionCommand(cancel=pb.Cancel(handle=handle, why=why))
