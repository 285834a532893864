"""Gateway sessions of a decode worker: many requests over one stream, one batch per engine step.

Each request runs in a task of its own and puts its frames into the session's outbox; one writer per stream empties it.
The writer waits until a turn of the event loop brings nothing new, so what one engine step produced travels together.
A session without a stream keeps running for a grace, then its requests are cancelled; frames of that time wait for the
gateway's return.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from inferflux.clock import until_tick
from inferflux.errors import InvalidRequest
from inferflux.process import Tasks
from inferflux.telemetry import metrics
from inferflux.types import ChoiceTokens, End, Frame, Pulse
from inferflux.worker.answering import BY_GATEWAY, TAKEN_OVER, Answerer, DecodeRequest
from inferflux.worker.leases import GRACE_S, SessionLeases
from inferflux.worker.parking import ParkingLot, Record

PULSE_S = 0.25
# An engine step reaches its requests in a few turns of the loop; more only delays the first of them.
MAX_SETTLE_TURNS = 8
# A gateway that reads too slowly stops its own requests here, not the engine's other ones.
MAX_OUTBOX_BYTES = 4 << 20
# A body that is not streamed comes in one piece of any size, but has to travel beside the tokens of others, within the
# limit of a message, and in portions that a gateway is ready to keep for a client.
MAX_FRAME_BYTES = 1 << 20
MAX_BATCH_BYTES = 2 << 20
# Of an engine that takes longer to let go of a request than this, nothing better is to be expected.
PREDECESSOR_S = 2.0
CANCEL_REASONS = ("disconnected", "deadline", "moved", "closed", "lost")  # bounded: gateways choose the text


Running = dict[str, asyncio.Task[None]]
"""What runs on the worker, by request id."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one stream sends at once: frames by request handle, in order."""

    frames: list[tuple[int, Frame]]
    pulse: Pulse | None


class Stream:
    """One gRPC stream of a session; a newer one takes over from it."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._is_over = False

    def end(self) -> None:
        """Stop sending, e.g. because the gateway stopped talking. Idempotent."""
        self._is_over = True
        self._session.wake()

    async def batches(self) -> AsyncGenerator[Batch]:
        """What to send, until `end` or the session's close. Starts with a pulse."""
        loop = asyncio.get_running_loop()
        pulse_at = loop.time()
        while await self._wait_until(pulse_at):
            pulse = None
            if loop.time() >= pulse_at:
                pulse, pulse_at = self._session.pulse(), loop.time() + until_tick(PULSE_S)
            frames = self._session.take()
            if frames or pulse:
                yield Batch(frames, pulse)
            elif self._session.is_closed:
                return

    async def _wait_until(self, at: float) -> bool:
        if not self._is_over:
            await self._session.wait_until(at)
        return not self._is_over


class Session:
    """One gateway's requests on this worker."""

    def __init__(
        self, answerer: Answerer, tasks: Tasks, pulse: Callable[[], Pulse], running: Running, lot: ParkingLot
    ) -> None:
        self.pulse = pulse
        self.is_closed = False
        self._running = running
        self._lot = lot
        self._answerer = answerer
        self._tasks = tasks
        self._requests: dict[int, asyncio.Task[None]] = {}
        self._stream: Stream | None = None
        self._outbox: list[tuple[int, Frame]] = []
        self._num_bytes = 0
        self._due = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()

    def attach(self) -> Stream:
        """Return a new stream; the one before it, if any, ends."""
        if self._stream is not None:
            self._stream.end()
        self._stream = Stream(self)
        return self._stream

    def start(self, request: DecodeRequest) -> None:
        """Start a request. Raises InvalidRequest when its handle is in use."""
        if request.handle in self._requests:
            raise InvalidRequest(f"handle {request.handle} is in use")
        request_id = request.context.request_id
        before = self._running.get(request_id)
        record = self._lot.enter(request)
        task = self._tasks.spawn(self._serve(request, before, record), f"request-{request_id}", may_return=True)
        self._requests[request.handle] = self._running[request_id] = task
        task.add_done_callback(lambda _: self._forget(request, record))

    def _forget(self, request: DecodeRequest, record: Record) -> None:
        self._lot.park(record)
        task = self._requests.pop(request.handle)
        if self._running.get(request.context.request_id) is task:
            del self._running[request.context.request_id]

    def cancel(self, handle: int, why: str) -> None:
        """Stop a request; its last frame says so. Unknown handles are ignored."""
        if (task := self._requests.get(handle)) is not None:
            metrics.CANCELLED.labels(why if why in CANCEL_REASONS else "other").inc()
            task.cancel(BY_GATEWAY)

    async def close(self, why: str) -> None:
        """Cancel all requests and end the stream after their last frames. Idempotent."""
        requests = list(self._requests.values())
        for task in requests:
            metrics.CANCELLED.labels(why).inc()
            task.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        self.is_closed = True
        self.wake()

    def wake(self) -> None:
        """Let the stream look whether there is something to do."""
        self._due.set()

    async def wait_until(self, at: float) -> None:
        """Wait until an engine step's frames are here, or for the time `at` on the loop's clock."""
        if not self._outbox and not self.is_closed:
            self._due.clear()
            timer = asyncio.get_running_loop().call_at(at, self._due.set)
            try:
                await self._due.wait()
            finally:
                timer.cancel()
        await self._settle()

    def take(self) -> list[tuple[int, Frame]]:
        """Take the oldest frames out of the outbox: all, or as many as one batch may carry."""
        if self._num_bytes <= MAX_BATCH_BYTES:
            frames, self._outbox, self._num_bytes = self._outbox, [], 0
        else:
            frames = self._portion()
        if self._num_bytes <= MAX_OUTBOX_BYTES:
            self._has_room.set()
        return frames

    def _portion(self) -> list[tuple[int, Frame]]:
        sizes = list(accumulate(_size(frame) for _, frame in self._outbox))
        n = max(1, bisect_right(sizes, MAX_BATCH_BYTES))
        frames, self._outbox = self._outbox[:n], self._outbox[n:]
        self._num_bytes -= sizes[n - 1]
        return frames

    async def _serve(self, request: DecodeRequest, before: asyncio.Task[None] | None, record: Record) -> None:
        """Answer a request; when it has been here before, e.g. cut off by the network, not beside itself."""
        if before is not None:
            try:
                await asyncio.wait([before], timeout=PREDECESSOR_S)
            except asyncio.CancelledError:
                self._put(request.handle, Frame(end=End("abort")))
                raise

        async def post(frame: Frame) -> None:
            record.take(frame)
            self._put(request.handle, frame)
            await self._has_room.wait()

        await self._answerer.answer(request, post, lambda end: self._put(request.handle, Frame(end=end)))

    def _put(self, handle: int, frame: Frame) -> None:
        if len(frame.data) > MAX_FRAME_BYTES:
            self._outbox += [(handle, part) for part in _split(frame)]
        else:
            self._outbox.append((handle, frame))
        self._num_bytes += _size(frame)
        if self._num_bytes > MAX_OUTBOX_BYTES:
            self._has_room.clear()
        self._due.set()

    async def _settle(self) -> None:
        for _ in range(MAX_SETTLE_TURNS):
            num_frames = len(self._outbox)
            await asyncio.sleep(0)
            if len(self._outbox) == num_frames:
                return


def _split(frame: Frame) -> Iterator[Frame]:
    """Frames of at most MAX_FRAME_BYTES of data: what else it carries goes first, its end last."""
    first, *middle, last = (frame.data[i : i + MAX_FRAME_BYTES] for i in range(0, len(frame.data), MAX_FRAME_BYTES))
    yield replace(frame, data=first, end=None)
    yield from (Frame(data=part) for part in middle)
    yield Frame(data=last, end=frame.end)


def _size(frame: Frame) -> int:
    """About what a frame takes on the wire."""
    return len(frame.data) + sum(map(_choice_size, frame.choices))


def _choice_size(tokens: ChoiceTokens) -> int:
    return 4 * (len(tokens.text) + len(tokens.token_ids))


class Sessions:
    """All sessions of a decode worker, by the ids that gateways chose."""

    def __init__(self, answerer: Answerer, tasks: Tasks, pulse: Callable[[], Pulse], grace_s: float = GRACE_S) -> None:
        self._answerer = answerer
        self._tasks = tasks
        self._pulse = pulse
        self._sessions: dict[str, Session] = {}
        self._running: Running = {}
        self._lot = ParkingLot()
        self.leases = SessionLeases(self._lose, grace_s)

    def open(self, session_id: str) -> Session:
        """Return the session of this id, a new one unless it is within its grace. Wrap its use in `leases.open`."""
        if session_id not in self._sessions:
            self._sessions[session_id] = Session(self._answerer, self._tasks, self._pulse, self._running, self._lot)
        return self._sessions[session_id]

    async def recall(self, request_id: str, tenant: str) -> Record:
        """End a request here and give what is known of it. Raises NotFound."""
        record = self._lot.find(request_id, tenant)
        if (task := self._running.get(request_id)) is not None:
            task.cancel(TAKEN_OVER)
            await asyncio.wait([task], timeout=PREDECESSOR_S)
        return record

    async def close(self, why: str) -> None:
        """Close all sessions."""
        self.leases.close()
        await asyncio.gather(*(session.close(why) for session in self._sessions.values()))
        self._lot.close()

    def _lose(self, session_id: str) -> None:
        session = self._sessions.pop(session_id)
        self._tasks.spawn(session.close("lost"), f"lost-{session_id}", may_return=True)
