"""Requests that lose their workers, against services under the test's control: what moves, what waits, what is refused.

Real processes and real kills are in test_resume_cluster.py; here is what needs a worker that fails on command.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from inferflux.errors import Unavailable
from inferflux.v1 import decode_service_pb2 as decode_pb
from inferflux.v1 import types_pb2 as pb
from tests.support.fake_cluster import (
    JSON_HEAD,
    MODEL,
    SSE_HEAD,
    FakeClient,
    FakeCluster,
    FakeDecode,
    Job,
    Script,
    end,
    failed,
    fake_cluster,
    running_gateway,
    until,
)

NUM_EVENTS = 6
WHOLE = "".join(f"data: {i}\n\n" for i in range(NUM_EVENTS))


async def steadily(job: Job) -> None:
    """Answer with NUM_EVENTS events of a token each, but those that the client has."""
    job.emit(head=SSE_HEAD)
    for i in range(job.start.num_events, NUM_EVENTS):
        job.emit(data=b"data: %d\n\n" % i, choices=[decode_pb.ChoiceTokens(index=i % 2, token_ids=[i])])
        await asyncio.sleep(0.02)
    usage = pb.Usage(prompt_tokens=3, completion_tokens=NUM_EVENTS)
    job.emit(end=decode_pb.End(finish_reason="stop", usage=usage))


def then(num_events: int, fail: Callable[[Job], object]) -> Script:
    """Answer as `steadily`, and fail once the client has so many events."""

    async def script(job: Job) -> None:
        job.emit(head=SSE_HEAD)
        for i in range(job.start.num_events, num_events):
            job.emit(data=b"data: %d\n\n" % i, choices=[decode_pb.ChoiceTokens(index=i % 2, token_ids=[i])])
        await asyncio.sleep(0.05)  # the gateway takes them
        fail(job)
        await asyncio.sleep(60)

    return script


@asynccontextmanager
async def decodes(num_workers: int, **settings) -> AsyncIterator[tuple[FakeCluster, list[FakeDecode], FakeClient]]:
    """Decode workers that answer steadily, and a gateway that is connected to all of them."""
    async with fake_cluster() as cluster:
        workers = [await cluster.add_decode(f"decode-{i}") for i in range(num_workers)]
        for worker in workers:
            worker.script = steadily
        async with running_gateway(cluster, **settings) as gateway:
            await gateway.ready()
            await until(lambda: all(worker.hellos for worker in workers))
            await asyncio.sleep(0.1)  # the first pulses
            yield cluster, workers, gateway


def where(job: Job, workers: list[FakeDecode]) -> FakeDecode:
    return next(worker for worker in workers if job in worker.jobs)


def error_of(text: str) -> dict:
    name, data = text.strip().rsplit("\n\n", 1)[-1].split("\n")
    assert name == "event: error"
    return json.loads(data.removeprefix("data: "))["error"]


def jobs_of(workers: list[FakeDecode]) -> list[Job]:
    return [job for worker in workers for job in worker.jobs]


# --- one stream, whatever happens to its workers


@pytest.mark.parametrize("num_events", [0, 1, 3, NUM_EVENTS])
@pytest.mark.parametrize("kind", ["cut", "WORKER_LOST", "DRAINING", "ENGINE_FAILED"])
async def test_a_stream_goes_on_where_its_worker_was_lost(kind, num_events):
    """The client sees one stream; the next worker gets the tokens in their order and grouping."""
    async with decodes(2) as (_, workers, gateway):

        def fail(job: Job) -> None:
            for worker in workers:
                worker.script = steadily
            if kind == "cut":
                where(job, workers).cut()
            else:
                job.emit(end=failed(kind, 503, is_retryable=True))

        for worker in workers:
            worker.script = then(num_events, fail)
        completion = 'inferflux_tokens_total{kind="completion"'
        before = await gateway.metric(completion)
        response = await gateway.chat(stream=True)
        first, moved = sorted((job.start for job in jobs_of(workers)), key=lambda start: start.num_events)

        assert response.text == WHOLE
        assert [len(worker.jobs) for worker in workers] == [1, 1]
        assert moved.num_events == num_events
        assert [(c.index, list(c.token_ids)) for c in moved.delivered] == [(i % 2, [i]) for i in range(num_events)]
        assert moved.context.created == first.context.created > 0
        assert moved.context.request_id == first.context.request_id
        assert await gateway.metric(completion) == before + NUM_EVENTS
        assert await gateway.metric("inferflux_resume_seconds_count") >= (num_events < NUM_EVENTS)


async def test_a_whole_answer_is_begun_again():
    """Nothing of it has left the gateway, so there is nothing to continue."""
    async with decodes(2) as (_, workers, gateway):

        async def die(job: Job) -> None:
            for worker in workers:
                worker.script = answer
            job.emit(head=JSON_HEAD, data=b'{"ha', choices=[decode_pb.ChoiceTokens(token_ids=[1, 2])])
            await asyncio.sleep(0.05)
            where(job, workers).cut()

        async def answer(job: Job) -> None:
            assert not job.start.delivered
            assert not job.start.num_events
            job.emit(head=JSON_HEAD, data=b'{"a": 1}', end=end())

        for worker in workers:
            worker.script = die

        assert (await gateway.chat()).json() == {"a": 1}


async def test_a_stream_that_is_answered_differently_ends_with_an_error():
    """Another worker's refusal is no part of a stream that has begun."""
    async with decodes(2) as (_, workers, gateway):

        async def refuse(job: Job) -> None:
            job.emit(head=JSON_HEAD, data=b'{"error": "no"}', end=end())

        def die(job: Job) -> None:
            for worker in workers:
                worker.script = refuse
            where(job, workers).cut()

        for worker in workers:
            worker.script = then(2, die)
        response = await gateway.chat(stream=True)

        assert response.text.startswith("data: 0\n\ndata: 1\n\nevent: error\n")
        assert error_of(response.text)["code"] == "internal"
        assert await gateway.metric('inferflux_resume_refused_total{reason="answer"}') >= 1


async def test_a_worker_that_says_it_failed_loses_what_it_has():
    """The frontend of an engine that hangs: its requests move and are cancelled there; nobody hears it any more."""
    async with decodes(2) as (_, workers, gateway):
        late: list[Job] = []

        def hang(job: Job) -> None:
            for worker in workers:
                worker.script = steadily
            where(job, workers).state = pb.WORKER_STATE_FAILED
            late.append(job)

        for worker in workers:
            worker.script = then(2, hang)
        response = await gateway.chat(stream=True)
        sick = where(late[0], workers)
        await until(late[0].is_cancelled.is_set)
        fenced = await gateway.metric("inferflux_fenced_writes_total")
        late[0].emit(data=b"data: ghost\n\n")
        async with asyncio.timeout(5):
            while await gateway.metric("inferflux_fenced_writes_total") == fenced:
                await asyncio.sleep(0.01)

        assert response.text == WHOLE
        assert [cancel.why for cancel in sick.cancels] == ["lost"]


async def test_a_silent_worker_loses_its_streams_and_nobody_else_does():
    """It hangs with its connection open; its late tokens change nothing."""
    async with decodes(2, worker_dead_s=1.0) as (_, workers, gateway):

        def hang(job: Job) -> None:
            for worker in workers:
                worker.script = steadily
            where(job, workers).is_silent = True

        workers[0].script = workers[1].script = then(3, hang)
        response = await gateway.chat(stream=True)

        assert response.text == WHOLE


# --- how often, and how long it waits


async def test_two_moves_are_all_that_a_stream_gets():
    """The third lost worker ends it, with an error that says it may be tried again."""
    async with decodes(4) as (_, workers, gateway):

        async def advance_and_fail(job: Job) -> None:
            await then(job.start.num_events + 1, lambda j: j.emit(end=failed("ENGINE_FAILED", 500)))(job)

        for worker in workers:
            worker.script = advance_and_fail
        response = await gateway.chat(stream=True)
        error = error_of(response.text)

        assert response.text.startswith("data: 0\n\ndata: 1\n\ndata: 2\n\nevent: error\n")
        assert (error["code"], error["retryable"]) == ("engine_failed", True)
        assert len(jobs_of(workers)) == 3
        assert await gateway.metric('inferflux_resume_refused_total{reason="moves"}') >= 1


async def test_leaving_a_draining_worker_costs_no_move():
    """Rolling restarts end no stream, however many there are."""
    async with decodes(2) as (_, workers, gateway):

        async def advance_and_drain(job: Job) -> None:
            if job.start.num_events == NUM_EVENTS - 1:
                await steadily(job)
            await then(job.start.num_events + 1, lambda j: j.emit(end=failed("DRAINING", 503)))(job)

        for worker in workers:
            worker.script = advance_and_drain

        assert (await gateway.chat(stream=True)).text == WHOLE


async def test_a_stream_waits_for_a_worker_and_a_new_request_does_not():
    """The pool is empty for a moment: what has begun goes on when a worker is back."""
    async with decodes(1) as (cluster, workers, gateway):
        begun = asyncio.Event()
        workers[0].script = then(2, lambda _: begun.set())
        request = asyncio.ensure_future(gateway.chat(stream=True))
        await begun.wait()
        await cluster.kill("decode-0")
        await until(lambda: not gateway.lifecycle.readiness().ready)
        refused = await gateway.chat(stream=True)
        new = await cluster.add_decode("decode-0")
        new.script = steadily

        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_worker")
        assert "retry-after" in refused.headers
        assert (await request).text == WHOLE


async def test_a_waiting_stream_ends_at_its_deadline():
    """It waits no longer than its client would."""
    async with decodes(1, request_timeout_s=0.5) as (cluster, workers, gateway):
        workers[0].script = then(2, lambda _: cluster.kill_soon("decode-0"))
        response = await gateway.chat(stream=True)

        assert error_of(response.text)["code"] == "deadline_exceeded"


# --- poison


def killer(cluster: FakeCluster, workers: list[FakeDecode], num_events: int) -> Script:
    """A worker that dies of any request with the word "poison", and answers all others."""

    async def script(job: Job) -> None:
        if "poison" not in job.body:
            await steadily(job)
            return
        if job.start.num_events < num_events:
            job.emit(head=SSE_HEAD, data=b"data: 0\n\n", choices=[decode_pb.ChoiceTokens(token_ids=[0])])
            await asyncio.sleep(0.05)
        cluster.kill_soon(where(job, workers).worker_id)
        await asyncio.sleep(60)

    return script


@pytest.mark.parametrize("num_events", [0, 1])
async def test_a_request_that_kills_two_workers_is_refused_and_its_neighbours_go_on(num_events):
    """With poison_request, and for its tenant again when it comes back; others don't notice."""
    async with decodes(4) as (cluster, workers, gateway):
        for worker in workers:
            worker.script = killer(cluster, workers, num_events)
        neighbours = [asyncio.ensure_future(gateway.chat(stream=True, seed=i)) for i in range(8)]
        await until(lambda: len(jobs_of(workers)) == 8)
        poisoned = await gateway.chat(stream=True, poison=1)
        again = await gateway.chat(stream=True, poison=1)

        assert [r.text for r in await asyncio.gather(*neighbours)] == [WHOLE] * 8
        error = error_of(poisoned.text) if num_events else poisoned.json()["error"]
        assert error["code"] == "poison_request"
        assert poisoned.status_code == (200 if num_events else 500)
        assert (again.status_code, again.json()["error"]["code"]) == (500, "poison_request")
        assert 2 <= sum(1 for worker in workers if any("poison" in job.body for job in worker.jobs)) <= 3
        assert (await gateway.chat(stream=True)).text == WHOLE


async def test_a_request_whose_connections_broke_is_not_poison():
    """Workers that come back as the same start had not died of anything."""
    async with decodes(3) as (_, workers, gateway):
        num_cuts = 0

        async def cut_twice(job: Job) -> None:
            nonlocal num_cuts
            num_cuts += 1
            if num_cuts > 2:
                await steadily(job)
            else:
                where(job, workers).cut()

        for worker in workers:
            worker.script = cut_twice
        response = await gateway.chat(stream=True)

        assert response.text == WHOLE
        assert num_cuts == 3


# --- prefill


async def test_a_lost_prefill_worker_is_replaced_by_another():
    """One more prefill, and the ticket is the second one's."""
    async with fake_cluster() as cluster:
        prefills = [await cluster.add_prefill(f"prefill-{i}") for i in range(2)]
        decode = await cluster.add_decode()
        async with running_gateway(cluster) as gateway:
            await gateway.ready()
            await until(lambda: all(prefill.watches for prefill in prefills))
            await asyncio.sleep(0.1)
            for prefill in prefills:
                prefill.hold.clear()
            request = asyncio.ensure_future(gateway.chat(stream=True))
            await until(lambda: any(prefill.num_running for prefill in prefills))
            lost, other = sorted(prefills, key=lambda prefill: -prefill.num_running)
            other.hold.set()
            await cluster.kill(lost.worker_id)

            assert (await request).status_code == 200
            assert [prompt.ticket.ticket_id for prompt in decode.jobs[0].start.prompts] == ["ticket-0"]
            assert len(other.requests) == 1
            assert (
                await gateway.metric('inferflux_failover_total{reason="UNAVAILABLE",stage="prefill"}')
                + (await gateway.metric('inferflux_failover_total{reason="WORKER_LOST",stage="prefill"}'))
                >= 1
            )


async def test_a_degraded_cluster_refuses_if_it_is_told_to():
    """Before any work, when there is no prefill worker; and after a prefill that failed."""
    async with fake_cluster() as cluster:
        decode = await cluster.add_decode()
        async with running_gateway(cluster, admission_fail_closed_on_disagg_degraded=True) as gateway:
            await gateway.ready()
            none = await gateway.chat()
            prefill = await cluster.add_prefill()
            prefill.error = Unavailable("it failed")
            await until(lambda: prefill.watches)
            await asyncio.sleep(0.2)
            failing = await gateway.chat()

            for response in (none, failing):
                assert response.status_code == 503
                assert response.json()["error"]["code"] == "distributed_kv_transport_degraded"
                assert "retry-after" in response.headers
            assert not decode.jobs
            assert prefill.requests


async def test_short_prompts_are_computed_where_they_are_decoded():
    """And long ones are not."""
    async with fake_cluster() as cluster:
        prefill, decode = await cluster.add_prefill(), await cluster.add_decode()
        async with running_gateway(cluster, local_prefill_max_bytes=200) as gateway:
            await gateway.ready()
            await until(lambda: prefill.watches)
            await asyncio.sleep(0.1)
            await gateway.chat(model=MODEL)
            await gateway.chat(padding="x" * 200)

            assert [len(job.start.prompts) for job in decode.jobs] == [0, 1]
            assert await gateway.metric('inferflux_prefills_total{result="local",why="short"}') >= 1
