"""Sessions on a real (simulated) engine, without gRPC."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inferflux.clock import SystemClock
from inferflux.engine import create
from inferflux.engine.base import Engine
from inferflux.errors import InvalidRequest, WorkerLost
from inferflux.lifecycle import Lifecycle
from inferflux.process import Tasks
from inferflux.types import (
    ChoiceTokens,
    End,
    Frame,
    HttpCall,
    HttpHead,
    KvReport,
    PrefilledPrompt,
    RequestContext,
    Role,
    SignedTicket,
    State,
)
from inferflux.worker.answering import Answerer, DecodeRequest
from inferflux.worker.drain import Drain
from inferflux.worker.main import watch
from inferflux.worker.meter import Meter
from inferflux.worker.model import LoadableModel
from inferflux.worker.progress import Progress
from inferflux.worker.sessions import MAX_BATCH_BYTES, MAX_FRAME_BYTES, Batch, Session, Sessions
from inferflux.worker.settings import WorkerSettings
from inferflux.worker.work import Work
from inferflux.worker.worker import Worker
from tests.support.service import until

GRACE_S = 0.2


@asynccontextmanager
async def a_worker(**settings: Any) -> AsyncIterator[Worker]:
    own = WorkerSettings(instance_id="decode-0", model="m", engine="sim", kv_cache_bytes=16 << 20, **settings)
    engine = create("sim", own.engine_options(Role.DECODE, LoadableModel()), None)
    lifecycle = Lifecycle("decode", "decode-0")
    info = await engine.start()
    lifecycle.set_ready()
    work, drain = Work(lifecycle), Drain(lifecycle, 0)
    try:
        yield Worker(
            Role.DECODE,
            own,
            lifecycle,
            engine,
            info,
            work,
            drain,
            "host",
            b"k" * 32,
            Progress(SystemClock(), own.wedge_s),
            Meter(SystemClock()),
        )
    finally:
        await engine.close()


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[tuple[Worker, Sessions]]:
    async with a_worker(**settings) as worker, Tasks() as tasks:
        sessions = Sessions(Answerer(worker), tasks, worker.pulse, GRACE_S)
        yield worker, sessions
        await sessions.close("drained")


def request(handle: int = 1, **fields: Any) -> DecodeRequest:
    body = {"model": "m", "prompt": "hi", "max_tokens": 10, "stream": True, **fields}
    return DecodeRequest(
        handle, RequestContext(f"r-{handle}"), HttpCall("POST", "/v1/completions", json.dumps(body).encode())
    )


class Reader:
    """Reads a session's stream; remembers what came."""

    def __init__(self, session: Session) -> None:
        self.stream = session.attach()
        self.batches: list[Batch] = []

    def frames(self, handle: int = 1) -> list[Frame]:
        return [frame for batch in self.batches for h, frame in batch.frames if h == handle]

    def end(self, handle: int = 1) -> End | None:
        return next((frame.end for frame in self.frames(handle) if frame.end), None)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Reader]:
        task = asyncio.create_task(self._read())
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _read(self) -> None:
        async with aclosing(self.stream.batches()) as batches:
            async for batch in batches:
                self.batches.append(batch)


async def test_a_stream_starts_with_a_pulse_and_repeats_it() -> None:
    async with serving() as (worker, sessions), Reader(sessions.open("s")).reading() as reader:
        await until(lambda: len(reader.batches) >= 3)

        assert all(batch.pulse.incarnation == worker.lifecycle.incarnation for batch in reader.batches)
        assert not any(batch.frames for batch in reader.batches)


async def test_what_one_engine_step_produces_travels_in_one_batch() -> None:
    async with serving() as (worker, sessions), Reader(session := sessions.open("s")).reading() as reader:
        for handle in range(32):
            session.start(request(handle, seed=handle, max_tokens=20))
        await until(lambda: all(reader.end(handle) for handle in range(32)))

        num_with_tokens = sum(any(f.choices for _, f in batch.frames) for batch in reader.batches)
        assert worker.engine.load().step <= num_with_tokens <= worker.engine.load().step + 3


async def test_order_within_a_request_is_kept_and_its_end_is_last() -> None:
    async with serving() as (_, sessions), Reader(session := sessions.open("s")).reading() as reader:
        session.start(request())
        await until(lambda: reader.end() is not None)

        assert reader.frames()[0].head is not None
        assert reader.frames()[-1].end == reader.end()
        assert reader.end().usage.completion_tokens == 10


async def test_a_cancelled_request_ends_and_frees_everything() -> None:
    async with serving() as (worker, sessions), Reader(session := sessions.open("s")).reading() as reader:
        session.start(request(max_tokens=3000))
        await until(lambda: any(frame.choices for frame in reader.frames()))

        session.cancel(1, "disconnected")
        session.cancel(99, "unknown handles are ignored")

        await until(lambda: reader.end() is not None)
        assert reader.end().finish_reason == "abort"
        assert worker.engine.load().num_free_blocks == worker.engine.load().num_blocks
        assert worker.work.num_running == 0


async def test_a_deadline_ends_a_request_with_an_error() -> None:
    async with serving() as (worker, sessions), Reader(session := sessions.open("s")).reading() as reader:
        late = request(max_tokens=3000)
        session.start(replace(late, context=replace(late.context, time_left_s=0.05)))

        await until(lambda: reader.end() is not None)
        assert (reader.end().error.reason, reader.end().error.http_status) == ("DEADLINE_EXCEEDED", 504)
        assert worker.engine.load().num_running == 0


async def test_requests_of_a_lost_session_run_on_for_the_grace_then_stop() -> None:
    async with serving() as (worker, sessions):
        session = sessions.open("s")
        with sessions.leases.open("s"):
            async with Reader(session).reading():
                session.start(request(max_tokens=3000))
                await until(lambda: worker.engine.load().num_running == 1)

        await asyncio.sleep(GRACE_S / 2)
        assert worker.engine.load().num_running == 1
        await until(lambda: worker.work.num_running == 0)
        assert worker.engine.load().num_free_blocks == worker.engine.load().num_blocks
        assert sessions.open("s") is not session


async def test_a_session_that_reconnects_gets_what_came_meanwhile() -> None:
    async with serving() as (_, sessions):
        with sessions.leases.open("s"):
            async with Reader(session := sessions.open("s")).reading() as first:
                session.start(request(max_tokens=300))
                await until(lambda: len(first.frames()) > 3)
        with sessions.leases.open("s"):
            assert sessions.open("s") is session
            async with Reader(session).reading() as second:
                await until(lambda: second.end() is not None)

        ids = [i for r in (first, second) for f in r.frames() for choice in f.choices for i in choice.token_ids]
        assert len(ids) == 300


async def test_a_newer_stream_takes_over() -> None:
    async with serving() as (_, sessions):
        session = sessions.open("s")
        async with Reader(session).reading() as old, Reader(session).reading() as new:
            await until(lambda: bool(new.batches))
            session.start(request())
            await until(lambda: new.end() is not None)

            assert old.frames() == []


async def test_a_handle_in_use_is_refused() -> None:
    async with serving() as (_, sessions):
        session = sessions.open("s")
        session.start(request())

        with pytest.raises(InvalidRequest, match="handle 1"):
            session.start(request())


async def test_a_forged_ticket_is_reported_and_the_answer_is_right_all_the_same() -> None:
    async with serving() as (_, sessions), Reader(session := sessions.open("s")).reading() as reader:
        forged = PrefilledPrompt(b"d" * 16, 2, (1,), SignedTicket("t-1", b"payload", b"mac"))
        session.start(replace(request(1), prompts=(forged,)))
        session.start(request(2))
        await until(lambda: reader.end(1) is not None and reader.end(2) is not None)

        (report,) = [report for frame in reader.frames(1) for report in frame.kv]
        assert (report.ticket_id, report.result, report.reason) == ("t-1", "recomputed", "mac")
        tokens = [[f.choices for f in reader.frames(h) if f.choices] for h in (1, 2)]
        assert tokens[0] == tokens[1]


async def test_a_worker_that_is_not_ready_refuses() -> None:
    async with serving() as (worker, sessions), Reader(session := sessions.open("s")).reading() as reader:
        worker.lifecycle.begin_drain()
        session.start(request())

        await until(lambda: reader.end() is not None)
        assert (reader.end().error.reason, reader.end().error.is_retryable) == ("DRAINING", True)


async def test_a_worker_whose_readiness_is_vetoed_says_draining_and_takes_nothing_until_that_is_over() -> None:
    async with serving() as (worker, sessions), Reader(session := sessions.open("s")).reading() as reader:
        why: list[str] = ["wedged"]
        worker.lifecycle.add_readiness("engine", lambda: why[0] if why else None)
        await until(lambda: bool(reader.batches) and reader.batches[-1].pulse.state is State.DRAINING)
        assert worker.lifecycle.state is State.READY

        session.start(request(1))
        await until(lambda: reader.end(1) is not None)
        assert (reader.end(1).error.reason, reader.end(1).error.is_retryable) == ("DRAINING", True)

        why.clear()
        assert worker.pulse().state is State.READY
        session.start(request(2))
        await until(lambda: reader.end(2) is not None)
        assert reader.end(2).error is None


async def test_closing_a_draining_session_ends_its_requests_retryably_and_then_the_stream() -> None:
    async with serving() as (worker, sessions), Reader(session := sessions.open("s")).reading() as reader:
        session.start(request(max_tokens=3000))
        await until(lambda: worker.engine.load().num_running == 1)
        worker.lifecycle.begin_drain()

        await sessions.close("drained")

        await until(lambda: reader.end() is not None)
        assert (reader.end().error.reason, reader.end().error.is_retryable) == ("DRAINING", True)


async def test_a_worker_that_fails_ends_its_requests_with_an_error_not_as_if_they_were_complete() -> None:
    async with a_worker() as worker:
        async with Tasks() as tasks:
            session = Sessions(Answerer(worker), tasks, worker.pulse).open("s")
            session.start(request(max_tokens=3000))
            await until(lambda: worker.engine.load().num_running == 1)

        _, last = session.take()[-1]
        assert last.end is not None
        assert (last.end.error.reason, last.end.error.is_retryable) == ("WORKER_LOST", True)


async def test_an_engine_that_stays_wedged_ends_the_worker(tmp_path: Path) -> None:
    profile = tmp_path / "wedged.json"
    profile.write_text('{"step_ms": 3600000}')
    async with serving(sim_profile=profile, wedge_s=0.5) as (worker, sessions):
        sessions.open("s").start(request())

        with pytest.raises(WorkerLost, match="wedged: work but no step for"):
            await watch(worker)
        assert not worker.lifecycle.readiness().ready


async def test_the_death_of_the_engine_ends_the_worker() -> None:
    async with a_worker() as worker:
        await worker.engine.close()

        with pytest.raises(WorkerLost):
            await watch(worker)


async def test_a_worker_whose_engine_is_wedged_or_dead_says_that_it_failed() -> None:
    """Also while it drains: what it has is to be moved at once, not to be waited for."""
    async with a_worker() as worker:
        assert worker.state is State.READY
        worker.progress.objection = "no step"
        assert worker.state is State.FAILED
        worker.lifecycle.begin_drain()
        assert worker.state is State.FAILED
        worker.progress.objection = None
        assert worker.state is State.DRAINING
        await worker.engine.close()
        assert worker.state is State.FAILED


async def test_a_request_that_comes_again_waits_until_it_has_left() -> None:
    """A gateway that was cut off tells its lost request to stop and starts it again: never two of one at a time."""
    async with serving() as (worker, sessions), Reader(session := sessions.open("s")).reading() as reader:
        session.start(request(1, max_tokens=3000))
        await until(lambda: worker.engine.load().num_running == 1)
        session.cancel(1, "lost")
        session.start(request(2))
        await until(lambda: reader.end(2) is not None)

        assert (reader.end(1).finish_reason, reader.end(2).error) == ("abort", None)
        ends = [handle for batch in reader.batches for handle, frame in batch.frames if frame.end is not None]
        assert ends == [1, 2]


async def test_a_request_that_waits_for_itself_can_be_cancelled() -> None:
    async with serving() as (worker, sessions), Reader(session := sessions.open("s")).reading() as reader:
        session.start(request(1, max_tokens=3000))
        await until(lambda: worker.engine.load().num_running == 1)
        session.start(request(2))
        await asyncio.sleep(0)
        session.cancel(2, "closed")
        await until(lambda: reader.end(2) is not None)

        assert reader.end(2).finish_reason == "abort"
        session.cancel(1, "closed")
        await until(lambda: reader.end(1) is not None)


HUGE = Frame(
    HttpHead(200),
    bytes(range(256)) * 40_000,
    (ChoiceTokens(0, (1, 2), "text"),),
    (KvReport("t-1", "unneeded"),),
    End("stop"),
)


class OddEngine(Engine):
    """Generates nothing, in the ways a real engine's application could."""

    def __init__(self, engine: Engine, how: str) -> None:
        self._engine = engine
        self._how = how

    async def generate(self, context: RequestContext, *args: Any) -> AsyncGenerator[Frame]:  # type: ignore[override]
        if self._how == "raises":
            raise ValueError("prompt text: my password is hunter2")
        if self._how == "ends":
            return
        if self._how == "huge":
            yield HUGE
            return
        if self._how == "late":
            for _ in range(int(context.request_id.removeprefix("r-")) % 4):
                await asyncio.sleep(0)
            yield Frame(end=End("stop"))
            return
        yield Frame()

    start = check_numerics = prefill = close = load_adapter = drop_adapter = None  # type: ignore[assignment]

    def load(self) -> Any:
        return self._engine.load()


@asynccontextmanager
async def oddly_serving(how: str) -> AsyncIterator[Session]:
    async with a_worker() as worker, Tasks() as tasks:
        odd = replace(worker, engine=OddEngine(worker.engine, how))
        sessions = Sessions(Answerer(odd), tasks, odd.pulse)
        yield sessions.open("s")
        await sessions.close("drained")


async def test_what_reaches_its_requests_a_few_turns_later_still_travels_together() -> None:
    """An application passes what one engine step produced through several layers."""
    async with oddly_serving("late") as session, Reader(session).reading() as reader:
        await until(lambda: bool(reader.batches))
        for handle in range(16):
            session.start(request(handle))
        await until(lambda: reader.end(0) is not None)

        assert [len(batch.frames) for batch in reader.batches if batch.frames] == [16]


async def test_a_huge_body_travels_in_portions() -> None:
    """Its head and sideband first, its end last, and others' tokens in between."""
    async with oddly_serving("huge") as session, Reader(session).reading() as reader:
        for handle in range(3):
            session.start(request(handle))
        await until(lambda: all(reader.end(handle) for handle in range(3)))

        for frames in map(reader.frames, range(3)):
            assert b"".join(frame.data for frame in frames) == HUGE.data
            assert max(len(frame.data) for frame in frames) <= MAX_FRAME_BYTES
            first, *others = frames
            assert (first.head, first.choices, first.kv, first.end) == (HUGE.head, HUGE.choices, HUGE.kv, None)
            assert not any(frame.head or frame.choices or frame.kv for frame in others)
            assert [frame.end for frame in others] == [None] * (len(others) - 1) + [HUGE.end]
        assert max(sum(len(f.data) for _, f in batch.frames) for batch in reader.batches) <= MAX_BATCH_BYTES


async def test_a_body_of_exactly_one_portion_is_one_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferflux.worker.sessions.MAX_FRAME_BYTES", len(HUGE.data))
    async with oddly_serving("huge") as session, Reader(session).reading() as reader:
        session.start(request())
        await until(lambda: reader.end() is not None)

        assert reader.frames() == [HUGE]


@pytest.mark.parametrize("how", ["raises", "ends", "says nothing"])
async def test_a_broken_engine_ends_the_request_without_leaking_text(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with oddly_serving(how) as session, Reader(session).reading() as reader:
        session.start(request())
        await until(lambda: reader.end() is not None)

        error = reader.end().error
        assert (error.reason, error.http_status) == ("INTERNAL", 500)
        assert "hunter2" not in error.message


async def test_a_gateway_that_does_not_read_stops_its_own_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on."""
    monkeypatch.setattr("inferflux.worker.sessions.MAX_OUTBOX_BYTES", 2000)
    async with serving() as (worker, sessions):
        slow = sessions.open("slow")
        slow.start(request(max_tokens=500))
        async with Reader(quick := sessions.open("quick")).reading() as reader:
            quick.start(request(max_tokens=500))
            await until(lambda: reader.end() is not None)
            assert worker.work.num_running == 1

        async with Reader(slow).reading() as reader:
            await until(lambda: reader.end() is not None)
            assert reader.end().usage.completion_tokens == 500


def test_paths_of_the_settings_stay_paths() -> None:
    assert isinstance(WorkerSettings(instance_id="d", model="m", engine="sim").arena_socket, Path)
