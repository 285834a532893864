"""The walk of a request and all its ways out, against services under the test's control (real gRPC, real certificates).

What the tests look at is what the other services saw: tickets that came back, requests that were told to stop.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import httpx
import pytest

from inferflux.errors import ArenaFull, WorkerLost
from inferflux.v1 import decode_service_pb2 as decode_pb
from inferflux.v1 import types_pb2 as pb
from tests.support.fake_cluster import (
    ADMIN_KEY,
    FINGERPRINT,
    GENERATE_KEY,
    JSON_HEAD,
    MODEL,
    READ_KEY,
    SSE_HEAD,
    FakeClient,
    FakeCluster,
    FakeDecode,
    FakePrefill,
    committed,
    end,
    failed,
    fake_cluster,
    head,
    new_policy,
    running_gateway,
    two_tokens,
    until,
)

TWO_TOKENS = 'data: {"t": 1}\n\ndata: {"t": 2}\n\ndata: [DONE]\n\n'


@asynccontextmanager
async def pair(**settings) -> AsyncIterator[tuple[FakeCluster, FakePrefill, FakeDecode, FakeClient]]:
    """One prefill worker, one decode worker, one gateway."""
    async with fake_cluster() as cluster:
        prefill, decode = await cluster.add_prefill(), await cluster.add_decode()
        async with running_gateway(cluster, **settings) as gateway:
            await gateway.ready()
            await until(lambda: prefill.watches)
            await asyncio.sleep(0.1)  # the first pulse of the prefill worker
            yield cluster, prefill, decode, gateway


@asynccontextmanager
async def decode_only(**settings) -> AsyncIterator[tuple[FakeCluster, FakeDecode, FakeClient]]:
    """One decode worker, one gateway."""
    async with fake_cluster() as cluster:
        decode = await cluster.add_decode()
        async with running_gateway(cluster, **settings) as gateway:
            await gateway.ready()
            yield cluster, decode, gateway


def event(text: str) -> dict:
    """Parse the error event that ends a broken stream."""
    name, data = text.strip().rsplit("\n\n", 1)[-1].split("\n")
    assert name == "event: error"
    assert "[DONE]" not in text
    return json.loads(data.removeprefix("data: "))["error"]


# --- an answer


async def test_a_stream_goes_through_prefill_and_decode_byte_for_byte():
    """The client gets the worker's bytes; the workers get the client's; the ticket comes back once it was read."""
    async with pair() as (_, prefill, decode, gateway):
        response = await gateway.chat(stream=True)

        assert response.status_code == 200
        assert response.text == TWO_TOKENS
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["x-request-id"] == decode.jobs[0].start.context.request_id
        assert response.headers["x-inferflux-policy-rev"] == "3"
        assert prefill.requests[0].call == decode.jobs[0].start.call
        assert decode.jobs[0].body["messages"] == [{"role": "user", "content": "hi"}]
        assert [prompt.ticket.ticket_id for prompt in decode.jobs[0].start.prompts] == ["ticket-0"]
        await until(lambda: prefill.released == {"ticket-0": "committed"})


async def test_a_whole_answer_has_a_length():
    """What is no event stream is sent as one piece."""
    async with pair() as (_, prefill, _, gateway):
        response = await gateway.chat()

        assert response.json() == {"text": "one two"}
        assert response.headers["content-length"] == str(len(response.content))
        await until(lambda: not prefill.live)


async def test_workers_get_a_context_and_no_credentials():
    """Tenant, salt and deadline come from the gateway; of the headers only harmless ones pass."""
    async with pair() as (_, prefill, decode, gateway):
        await gateway.http.post(
            "/v1/messages",
            json={"model": MODEL},
            headers={
                "x-api-key": GENERATE_KEY,
                "cookie": "c=1",
                "anthropic-version": "2023-06-01",
                "x-forwarded-for": "1.2.3.4",
                "x-inferflux-timeout-ms": "5000",
                "traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01",
            },
        )
        context, call = decode.jobs[0].start.context, decode.jobs[0].start.call

        assert context.tenant == "default"
        assert len(context.cache_salt) == 64
        assert 3 < context.time_left.ToTimedelta().total_seconds() <= 5
        assert context.traceparent.split("-")[1] == "a" * 32
        assert {header.name for header in call.headers} == {
            "content-type",
            "accept",
            "user-agent",
            "anthropic-version",
        }
        assert prefill.requests[0].context.cache_salt == context.cache_salt


async def test_metrics_prove_who_computed_what():
    """Prefill on a prefill worker, KV by ticket, decode on a decode worker; readable here without a key."""
    async with pair() as (_, _, _, gateway):
        await gateway.chat(stream=True)
        await gateway.chat()

        assert await gateway.metric('inferflux_phases_total{phase="prefill",role="prefill",worker="prefill-0"}') >= 2
        assert await gateway.metric('inferflux_phases_total{phase="decode",role="decode",worker="decode-0"}') >= 2
        assert await gateway.metric('inferflux_kv_transfer_bytes_total{transport="nixl"}') >= 2000
        assert await gateway.metric('inferflux_kv_transfer_seconds_count{transport="shm"}') >= 2
        assert await gateway.metric('inferflux_prefills_total{result="remote"') >= 2
        assert await gateway.metric("inferflux_ttft_seconds_count") >= 1
        assert await gateway.metric("inferflux_itl_seconds_count") >= 1
        assert await gateway.metric('inferflux_tokens_total{kind="completion"') >= 4
        assert await gateway.metric('inferflux_requests_total{code="200",endpoint="/v1/chat/completions"') >= 2


async def test_utility_calls_go_straight_to_a_decode_worker():
    """Nothing to prefill, nobody asked."""
    async with pair() as (_, prefill, decode, gateway):
        response = await gateway.http.post("/tokenize", json={"model": MODEL, "prompt": "x"})

        assert response.status_code == 200
        assert decode.jobs[0].start.call.path == "/tokenize"
        assert not prefill.requests


async def test_two_clients_never_see_each_others_bytes():
    """A hundred requests at once over one session; each gets its own."""

    async def echo(job):
        me = str(job.body["seed"]).encode()
        job.emit(head=SSE_HEAD, data=b"data: " + me + b"\n\n")
        for _ in range(3):
            await asyncio.sleep(0.001 * (job.body["seed"] % 5))
            job.emit(data=b"data: " + me + b"\n\n")
        job.emit(end=end())

    async with pair() as (_, prefill, decode, gateway):
        decode.script = echo
        responses = await asyncio.gather(*(gateway.chat(stream=True, seed=n) for n in range(100)))

        assert [r.text for r in responses] == [f"data: {n}\n\n" * 4 for n in range(100)]
        await until(lambda: not prefill.live)


# --- prefill


async def test_what_the_application_refuses_in_prefill_is_the_answer():
    """A bad request never reaches a decode worker."""
    async with pair() as (_, prefill, decode, gateway):
        prefill.answer = pb.HttpAnswer(head=head(400), body=b'{"error": {"message": "bad"}}')
        response = await gateway.chat()

        assert (response.status_code, response.json()) == (400, {"error": {"message": "bad"}})
        assert not decode.jobs


@pytest.mark.parametrize("kind", [WorkerLost, ArenaFull, RuntimeError])
async def test_a_failed_prefill_is_done_by_decode(kind):
    """The client notices nothing, and the metrics do."""
    async with pair() as (_, prefill, decode, gateway):
        prefill.error = kind("it failed")
        response = await gateway.chat(stream=True)

        assert response.text == TWO_TOKENS
        assert not decode.jobs[0].start.prompts
        assert await gateway.metric('inferflux_prefills_total{result="failed"') >= 1
        assert await gateway.metric('inferflux_phases_total{phase="prefill",role="decode",worker="decode-0"}') >= 1


async def test_without_a_prefill_worker_decode_does_it():
    """A cluster of decode workers alone serves."""
    async with decode_only() as (_, decode, gateway):
        assert (await gateway.chat()).status_code == 200
        assert not decode.jobs[0].start.prompts


async def test_a_prefill_worker_of_another_layout_is_not_used():
    """Blocks that the decode worker can't read are not worth computing."""
    async with fake_cluster() as cluster:
        prefill, _ = await cluster.add_prefill(), await cluster.add_decode()
        record = prefill.record(pb.WORKER_ROLE_PREFILL)
        record.fingerprint.layout = "other"
        cluster.registry.put(record)
        async with running_gateway(cluster) as gateway:
            await gateway.ready()
            await until(lambda: prefill.watches)

            assert (await gateway.chat()).status_code == 200
            assert not prefill.requests
            assert record.fingerprint != FINGERPRINT


# --- tickets come back


@pytest.mark.parametrize("result", ["RECOMPUTED", "UNNEEDED"])
async def test_tickets_come_back_whatever_decode_did_with_them(result):
    """A ticket that decode could not or need not use is given back as soon as it says so."""
    proceed = asyncio.Event()

    async def report(job):
        number = decode_pb.KvResult.Value(f"KV_RESULT_{result}")
        job.emit(kv=[decode_pb.KvReport(ticket_id="ticket-0", result=number, reason="stale")])
        await proceed.wait()
        await two_tokens(job)

    async with pair() as (_, prefill, decode, gateway):
        decode.script = report
        request = asyncio.ensure_future(gateway.chat(stream=True))
        await until(lambda: prefill.released == {"ticket-0": result.lower()})
        proceed.set()

        assert (await request).text == TWO_TOKENS


async def test_tickets_come_back_when_decode_refuses_the_request():
    """A rejection after prefill strands nothing."""

    async def reject(job):
        job.emit(head=head(422), data=b'{"error": "no"}', end=end())

    async with pair() as (_, prefill, decode, gateway):
        decode.script = reject
        response = await gateway.chat(stream=True)

        assert (response.status_code, response.json()) == (422, {"error": "no"})
        await until(lambda: prefill.released == {"ticket-0": "rejected"}, timeout_s=0.5)


async def test_tickets_come_back_when_decode_fails():
    """So does an error."""

    async def fail(job):
        job.emit(end=failed("INTERNAL", 500))

    async with pair() as (_, prefill, decode, gateway):
        decode.script = fail
        assert (await gateway.chat()).status_code == 500
        await until(lambda: prefill.released == {"ticket-0": "failed"})


async def test_a_cancelled_prefill_leaves_no_ticket_even_if_its_answer_was_on_its_way():
    """The gateway gives back by request what it never saw by ticket."""
    async with pair() as (_, prefill, _, gateway):
        prefill.hold.clear()
        request = asyncio.ensure_future(gateway.chat())
        await until(lambda: prefill.num_running)
        # The worker has just issued a ticket, and its answer is lost.
        prefill.live["ticket-lost"] = prefill.requests[0].context.request_id
        request.cancel()

        await until(lambda: prefill.released == {"ticket-lost": "cancelled"})
        await until(lambda: prefill.num_aborted == 1)


# --- a worker is lost


async def test_a_decode_worker_lost_before_the_first_byte_costs_nothing():
    """The request goes to another worker, with a new prefill."""
    async with fake_cluster() as cluster:
        prefill = await cluster.add_prefill()
        decodes = [await cluster.add_decode("decode-0"), await cluster.add_decode("decode-1")]

        async def die(job):
            next(d for d in decodes if job in d.jobs).cut()

        async with running_gateway(cluster) as gateway:
            await gateway.ready()
            await until(lambda: prefill.watches and all(d.hellos for d in decodes))
            await asyncio.sleep(0.1)
            decodes[0].script = die
            responses = [await gateway.chat(stream=True) for _ in range(2)]

            assert [r.text for r in responses] == [TWO_TOKENS] * 2
            assert decodes[0].jobs
            assert await gateway.metric('inferflux_failover_total{reason="WORKER_LOST",stage="decode"}') >= 1
            await until(lambda: not prefill.live)


async def test_half_an_answer_of_a_lost_worker_is_forgotten():
    """A response that is sent as one piece has no part of two workers' answers."""
    async with fake_cluster() as cluster:
        decodes = [await cluster.add_decode("decode-0"), await cluster.add_decode("decode-1")]

        async def die(job):
            job.emit(head=JSON_HEAD, data=b'{"text": "on')
            await asyncio.sleep(0.05)
            decodes[0].cut()

        async with running_gateway(cluster) as gateway:
            await gateway.ready()
            await until(lambda: all(d.hellos for d in decodes))
            await asyncio.sleep(0.1)
            decodes[0].script = die

            assert [(await gateway.chat()).json() for _ in range(2)] == [{"text": "one two"}] * 2
            assert decodes[0].jobs


async def test_a_draining_worker_that_refuses_is_not_the_last_word():
    """A refusal that crossed with the request is retried elsewhere too."""

    async def refuse(job):
        job.emit(end=failed("DRAINING", 503, is_retryable=True))

    async with fake_cluster() as cluster:
        first, second = await cluster.add_decode("decode-0"), await cluster.add_decode("decode-1")
        first.script = refuse
        async with running_gateway(cluster) as gateway:
            await gateway.ready()
            await until(lambda: first.hellos and second.hellos)
            await asyncio.sleep(0.1)

            assert [(await gateway.chat()).status_code for _ in range(2)] == [200, 200]
            assert first.jobs


async def test_two_moves_are_all():
    """When the third worker fails as well the client learns it, with a hint to come back."""
    async with fake_cluster() as cluster:
        decodes = [await cluster.add_decode(f"decode-{n}") for n in range(4)]

        async def fail(job):
            job.emit(end=failed("ENGINE_FAILED", 500, is_retryable=True))

        for decode in decodes:
            decode.script = fail
        async with running_gateway(cluster) as gateway:
            await gateway.ready()
            await until(lambda: all(d.hellos for d in decodes))
            await asyncio.sleep(0.1)
            response = await gateway.chat()

            assert response.status_code == 500
            assert response.json()["error"]["code"] == "engine_failed"
            assert int(response.headers["retry-after"]) >= 1
            assert sorted(len(d.jobs) for d in decodes) == [0, 1, 1, 1]


async def test_a_stream_that_finds_no_other_worker_ends_with_an_error_event():
    """After the first byte there is an event, and no [DONE]; what came before it was delivered."""

    async def die(job):
        job.emit(head=SSE_HEAD, data=b'data: {"t": 1}\n\n', kv=committed(job))
        await asyncio.sleep(0.05)
        cluster.kill_soon("decode-0")

    async with pair(resume_wait_s=0.2) as (cluster, prefill, decode, gateway):
        decode.script = die
        response = await gateway.chat(stream=True)
        error = event(response.text)

        assert response.status_code == 200
        assert response.text.startswith('data: {"t": 1}\n\n')
        assert (error["code"], error["retryable"]) == ("no_worker", True)
        assert error["request_id"] == response.headers["x-request-id"]
        await until(lambda: not prefill.live)


async def test_what_a_lost_worker_said_is_not_in_the_answer_of_the_next():
    """A whole answer is of one worker, however far the one before it got."""
    async with fake_cluster() as cluster:
        decodes = [await cluster.add_decode("decode-0"), await cluster.add_decode("decode-1")]

        async def die_once(job):
            for decode in decodes:
                decode.script = two_tokens
            job.emit(head=JSON_HEAD, data=b'{"text": "half')
            await asyncio.sleep(0.05)  # the bytes reach the gateway
            next(d for d in decodes if job in d.jobs).cut()

        for decode in decodes:
            decode.script = die_once
        async with running_gateway(cluster) as gateway:
            await gateway.ready()
            await until(lambda: all(d.hellos for d in decodes))
            await asyncio.sleep(0.1)
            response = await gateway.chat()

            assert response.content == b'{"text": "one two"}'
            assert [len(d.jobs) for d in decodes] == [1, 1]


async def test_a_prefill_worker_that_goes_silent_holds_nobody_up():
    """Its requests go to decode as soon as it is given up, and their calls are cancelled."""
    async with pair(worker_dead_s=1.5) as (_, prefill, decode, gateway):
        prefill.hold.clear()
        request = asyncio.ensure_future(gateway.chat(stream=True))
        await until(lambda: prefill.num_running)
        prefill.is_silent = True
        response = await asyncio.wait_for(request, 5)

        assert response.text == TWO_TOKENS
        assert not decode.jobs[0].start.prompts
        await until(lambda: prefill.num_aborted == 1)


async def test_a_prefill_worker_that_was_replaced_holds_nobody_up():
    """Dropping the connection to its old start is no cancellation of the requests on it."""
    async with pair() as (cluster, prefill, decode, gateway):
        prefill.hold.clear()
        request = asyncio.ensure_future(gateway.chat(stream=True))
        await until(lambda: prefill.num_running)
        record = prefill.record(pb.WORKER_ROLE_PREFILL)
        record.incarnation = "f" * 16
        cluster.registry.put(record)
        response = await asyncio.wait_for(request, 5)

        assert response.text == TWO_TOKENS
        assert not decode.jobs[0].start.prompts


async def test_tokens_of_a_broken_stream_are_counted():
    """Nobody reports the usage of a request whose worker is gone; what came is counted."""

    async def die(job):
        tokens = [decode_pb.ChoiceTokens(index=i, token_ids=[5, 6, 7]) for i in range(2)]
        job.emit(head=SSE_HEAD, data=b"data: 1\n\n", choices=tokens)
        await asyncio.sleep(0.05)
        cluster.kill_soon("decode-0")

    async with decode_only(resume_wait_s=0.2) as (cluster, decode, gateway):
        decode.script = die
        before = await gateway.metric('inferflux_tokens_total{kind="completion"')
        await gateway.chat(stream=True)

        assert await gateway.metric('inferflux_tokens_total{kind="completion"') == before + 6


async def test_a_lost_worker_is_told_to_forget_and_used_again():
    """After the stream is open again the worker hears which requests nobody waits for."""

    async def hang(job):
        job.emit(head=SSE_HEAD, data=b"data: 1\n\n")
        await asyncio.sleep(60)

    async def go_on(job):
        assert [c.why for c in decode.cancels] == ["lost"]  # before it is begun again here
        job.emit(head=SSE_HEAD, data=b"data: 2\n\n", end=end())

    async with decode_only() as (_, decode, gateway):
        decode.script = hang
        request = asyncio.ensure_future(gateway.chat(stream=True))
        await until(lambda: decode.jobs)
        await asyncio.sleep(0.05)
        decode.script = go_on
        decode.cut()

        assert (await request).text == "data: 1\n\ndata: 2\n\n"
        assert decode.cancels[0].handle == decode.jobs[0].start.handle != decode.jobs[1].start.handle
        assert decode.hellos[0].session_id == decode.hellos[1].session_id
        assert decode.jobs[1].start.num_events == 1


async def test_a_silent_worker_is_given_up():
    """A worker whose connection stands but whose pulses stop is as good as gone."""

    async def hang(job):
        decode.is_silent = True
        await asyncio.sleep(60)

    async with decode_only(worker_dead_s=0.5, resume_wait_s=0.2) as (_, decode, gateway):
        decode.script = hang
        response = await gateway.chat()

        assert response.status_code == 503
        assert gateway.lifecycle.readiness().reason == "workers: no decode worker is ready"


async def test_a_restarted_worker_replaces_the_old_one():
    """A newer incarnation in the registry ends the link to the old one at once."""
    async with decode_only() as (cluster, decode, gateway):
        await cluster.kill("decode-0")
        new = await cluster.add_decode("decode-0")
        await until(lambda: new.hellos)
        await gateway.ready()

        assert (await gateway.chat(stream=True)).text == TWO_TOKENS
        assert (len(decode.jobs), len(new.jobs)) == (0, 1)


async def test_late_frames_of_an_older_incarnation_are_dropped():
    """A zombie's tokens never reach a client."""

    async def zombie(job):
        old = decode_pb.Delta(handle=job.start.handle, head=SSE_HEAD, data=b"data: ghost\n\n")
        decode.send(decode_pb.StepBatch(incarnation="000000000000-old", deltas=[old]))
        await two_tokens(job)

    async with decode_only() as (_, decode, gateway):
        decode.script = zombie
        assert (await gateway.chat(stream=True)).text == TWO_TOKENS


async def test_a_worker_started_again_under_an_older_clock_is_used():
    """Whoever answers a new stream is believed, whatever the registry still says."""
    async with fake_cluster() as cluster:
        decode = await cluster.add_decode()
        record = decode.record(pb.WORKER_ROLE_DECODE)
        record.incarnation = "f" * 16
        cluster.registry.put(record)
        async with running_gateway(cluster) as gateway:
            await gateway.ready()

            assert (await gateway.chat(stream=True)).text == TWO_TOKENS


# --- never an empty 200


@pytest.mark.parametrize("status_line", [SSE_HEAD, None])
async def test_an_answer_without_content_is_an_error(status_line):
    """A worker that ends a request without saying anything is not believed."""

    async def nothing(job):
        job.emit(**({"head": status_line} if status_line else {}), end=end())

    async with decode_only() as (_, decode, gateway):
        decode.script = nothing
        response = await gateway.chat(stream=True)

        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"


async def test_an_error_before_the_first_byte_keeps_its_status():
    """The engine's refusal reaches the client as HTTP, even for a stream whose head was ready."""

    async def refuse(job):
        job.emit(head=SSE_HEAD)
        job.emit(end=failed("INVALID_REQUEST", 400))

    async with decode_only() as (_, decode, gateway):
        decode.script = refuse
        response = await gateway.chat(stream=True)

        assert response.status_code == 400
        assert response.json()["error"]["message"] == "it failed"


async def test_nonsense_from_a_worker_hurts_one_request_only():
    """A delta that can't be understood ends its own request; the session goes on."""

    async def nonsense(job):
        if job.body.get("bad"):
            job.emit(kv=[decode_pb.KvReport(ticket_id="t")])
        else:
            await two_tokens(job)

    async with decode_only() as (_, decode, gateway):
        decode.script = nonsense
        good, bad = await asyncio.gather(gateway.chat(stream=True), gateway.chat(stream=True, bad=1))

        assert (good.text, bad.status_code) == (TWO_TOKENS, 500)
        assert len(decode.hellos) == 1


# --- the client leaves, or the deadline passes


async def test_a_client_that_leaves_in_prefill_stops_it():
    """The prefill worker's call is aborted at once."""
    async with pair() as (_, prefill, decode, gateway):
        prefill.hold.clear()
        request = asyncio.ensure_future(gateway.chat())
        await until(lambda: prefill.num_running)
        request.cancel()

        await until(lambda: prefill.num_aborted == 1, timeout_s=1)
        assert not decode.jobs
        assert await gateway.metric('inferflux_cancelled_total{phase="prefill"}') >= 1


@pytest.mark.parametrize("phase", ["decode", "stream"])
async def test_a_client_that_leaves_later_stops_decode_and_frees_the_ticket(phase):
    """Both owners hear of it."""

    async def slow(job):
        if phase == "stream":
            job.emit(head=SSE_HEAD, data=b"data: 1\n\n")
        await asyncio.sleep(60)

    async with pair() as (_, prefill, decode, gateway):
        decode.script = slow
        request = asyncio.ensure_future(gateway.chat(stream=True))
        await until(lambda: decode.jobs)
        await asyncio.sleep(0.05)
        request.cancel()

        await until(decode.jobs[0].is_cancelled.is_set, timeout_s=1)
        await until(lambda: prefill.released == {"ticket-0": "cancelled"}, timeout_s=1)
        assert await gateway.metric(f'inferflux_cancelled_total{{phase="{phase}"}}') >= 1


@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_a_deadline_before_the_first_byte_is_a_504(phase):
    """And everybody is told."""

    async def slow(_job):
        await asyncio.sleep(60)

    async with pair() as (_, prefill, decode, gateway):
        decode.script = slow
        if phase == "prefill":
            prefill.hold.clear()
        response = await gateway.http.post(
            "/v1/chat/completions", json={"model": MODEL}, headers={"x-inferflux-timeout-ms": "200"}
        )

        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
        if phase == "prefill":
            await until(lambda: prefill.num_aborted == 1)
        else:
            await until(decode.jobs[0].is_cancelled.is_set)


async def test_a_deadline_in_a_stream_is_an_error_event():
    """The same deadline, later."""

    async def slow(job):
        job.emit(head=SSE_HEAD, data=b"data: 1\n\n")
        await asyncio.sleep(60)

    async with decode_only(request_timeout_s=0.3) as (_, decode, gateway):
        decode.script = slow
        response = await gateway.chat(stream=True)

        assert event(response.text)["code"] == "deadline_exceeded"
        await until(decode.jobs[0].is_cancelled.is_set)


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "soon", "9" * 30])
async def test_a_deadline_must_be_a_number_of_milliseconds(value):
    """Anything else is refused before any work."""
    async with decode_only() as (_, decode, gateway):
        headers = {"x-inferflux-timeout-ms": value}
        response = await gateway.http.post("/v1/chat/completions", json={"model": MODEL}, headers=headers)

        assert response.status_code == 400
        assert not decode.jobs


async def test_a_client_that_reads_too_slowly_is_given_up():
    """What waits for it is bounded; others notice nothing."""

    async def flood(job):
        job.emit(head=SSE_HEAD, data=b"data: start\n\n")
        for _ in range(2000):
            job.emit(data=b"data: " + b"x" * 10_000 + b"\n\n")
            await asyncio.sleep(0)
        await asyncio.sleep(60)

    async with decode_only(max_buffered_bytes=1 << 20, stalled_client_s=60) as (_, decode, gateway):
        decode.script = flood
        body = json.dumps({"model": MODEL, "stream": True})
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1024)
        head_lines = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {GENERATE_KEY}\r\n"
        writer.write(f"{head_lines}content-length: {len(body)}\r\n\r\n{body}".encode())
        await until(lambda: decode.jobs)
        await until(decode.jobs[0].is_cancelled.is_set)
        decode.script = two_tokens

        assert (await gateway.chat(stream=True)).text == TWO_TOKENS
        writer.close()


# --- models, policy, registry


async def test_unknown_models_are_404_and_a_missing_name_is_the_default():
    """Before any work."""
    async with decode_only() as (_, decode, gateway):
        unknown = await gateway.chat(model="nope")
        default = await gateway.http.post("/v1/completions", json={"prompt": "x"})

        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        assert unknown.json()["error"]["param"] == "model"
        assert default.status_code == 200
        assert len(decode.jobs) == 1


async def test_anthropic_clients_get_their_own_errors():
    """The shape follows the path."""
    async with decode_only() as (_, _, gateway):
        response = await gateway.http.post("/v1/messages", json={"model": "nope"})

        assert response.status_code == 404
        assert response.json()["error"]["type"] == "not_found_error"
        assert response.json()["request_id"] == response.headers["x-request-id"]


async def test_no_ready_worker_is_a_503_with_a_hint():
    """A worker that drains gets nothing new, and its last requests end in peace."""
    async with decode_only() as (_, decode, gateway):
        decode.state = pb.WORKER_STATE_DRAINING
        await until(lambda: not gateway.lifecycle.readiness().ready)
        response = await gateway.chat()

        assert (response.status_code, response.json()["error"]["code"]) == (503, "no_worker")
        assert response.headers["retry-after"]
        assert not decode.jobs


@pytest.mark.parametrize("state", ["STARTING", "FAILED", "UNSPECIFIED", "DRAINING"])
async def test_a_worker_that_says_it_is_not_ready_gets_nothing_new(state):
    """Until it says otherwise; its connection stands."""
    async with fake_cluster() as cluster:
        first, second = await cluster.add_decode("decode-0"), await cluster.add_decode("decode-1")
        async with running_gateway(cluster) as gateway:
            await gateway.ready()
            await until(lambda: first.hellos and second.hellos)
            first.state = pb.WorkerState.Value(f"WORKER_STATE_{state}")
            await asyncio.sleep(0.2)  # some pulses
            responses = [await gateway.chat(stream=True) for _ in range(4)]

            assert [r.text for r in responses] == [TWO_TOKENS] * 4
            assert (len(first.jobs), len(first.hellos), len(second.jobs)) == (0, 1, 4)


async def test_a_worker_that_fails_during_prefill_is_passed_by():
    """It was chosen when all was well; the request goes to another."""
    async with fake_cluster() as cluster:
        prefill = await cluster.add_prefill()
        decodes = [await cluster.add_decode("decode-0"), await cluster.add_decode("decode-1")]
        async with running_gateway(cluster) as gateway:
            await gateway.ready()
            await until(lambda: prefill.watches and all(d.hellos for d in decodes))
            await asyncio.sleep(0.1)
            prefill.hold.clear()
            requests = [asyncio.ensure_future(gateway.chat(stream=True)) for _ in range(2)]
            await until(lambda: prefill.num_running == 2)
            decodes[0].state = pb.WORKER_STATE_FAILED
            await asyncio.sleep(0.2)  # some pulses
            prefill.hold.set()

            assert [r.text for r in await asyncio.gather(*requests)] == [TWO_TOKENS] * 2
            assert not decodes[0].jobs
            await until(lambda: not prefill.live)


async def test_models_are_listed_from_the_registry():
    """For keys that read or generate."""
    async with decode_only() as (_, _, gateway):
        for key in (READ_KEY, GENERATE_KEY, ADMIN_KEY):
            response = await gateway.http.get("/v1/models", headers={"authorization": f"Bearer {key}"})
            assert [model["id"] for model in response.json()["data"]] == [MODEL]
        one = await gateway.http.get(f"/v1/models/{MODEL}")
        none = await gateway.http.get("/v1/models/org%2Fnope")

        assert (one.json()["id"], one.json()["max_model_len"]) == (MODEL, 2048)
        assert (none.status_code, none.json()["error"]["code"]) == (404, "model_not_found")


async def test_keys_are_made_listed_and_revoked_over_http():
    """And are in force here when the answer comes."""
    async with decode_only() as (_, _, gateway):
        admin = {"authorization": f"Bearer {ADMIN_KEY}"}
        body = {"name": "ci", "scopes": ["generate", "read"], "tenant": "acme", "expires_at": 4_000_000_000}
        made = await gateway.http.post("/v1/admin/api_keys", json=body, headers=admin)
        key = made.json()
        mine = {"authorization": f"Bearer {key['secret']}"}
        used = await gateway.http.get("/v1/models", headers=mine)
        listed = (await gateway.http.get("/v1/admin/api_keys", headers=admin)).json()
        revoked = await gateway.http.delete(f"/v1/admin/api_keys/{key['id']}", headers=admin)
        refused = await gateway.http.get("/v1/models", headers=mine)
        again = await gateway.http.delete(f"/v1/admin/api_keys/{key['id']}", headers=admin)

        assert made.status_code == 201
        assert key["tenant"] == "acme"
        assert key["scopes"] == ["generate", "read"]
        assert datetime.fromtimestamp(key["expires_at"], UTC).year == 2096
        assert used.status_code == 200
        assert key["id"] in [document["id"] for document in listed["data"]]
        assert all("secret" not in document for document in listed["data"])
        assert revoked.json()["revoked"] is True
        assert (refused.status_code, again.status_code) == (401, 404)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": "x", "scopes": []},
        {"name": "x", "scopes": ["root"]},
        {"name": "", "scopes": ["read"]},
        {"name": "x", "scopes": ["read"], "key_id": "mine"},
        {"name": "x", "scopes": ["read"], "expires_at": "tomorrow"},
        {"name": "x", "scopes": "admin"},
        {"name": "x", "scopes": ["read"], "priority": 2**40},
    ],
)
async def test_bad_keys_are_refused(body):
    """With 400, and without an echo of what was sent."""
    async with decode_only() as (cluster, _, gateway):
        num_keys = len(cluster.policy.keys)
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        response = await gateway.http.post("/v1/admin/api_keys", json=body, headers=headers)

        assert response.status_code == 400
        assert len(cluster.policy.keys) == num_keys


async def test_only_admins_administrate():
    """403 with another key, 401 with none."""
    async with decode_only() as (_, _, gateway):
        for key, status in ((GENERATE_KEY, 403), (READ_KEY, 403), ("not-a-key-at-all", 401)):
            headers = {"authorization": f"Bearer {key}"}
            response = await gateway.http.get("/v1/admin/api_keys", headers=headers)
            assert response.status_code == status
        assert (await gateway.http.post("/v1/chat/completions", headers={"authorization": ""})).status_code == 401
        read_only = {"authorization": f"Bearer {READ_KEY}"}
        assert (await gateway.http.post("/v1/chat/completions", json={}, headers=read_only)).status_code == 403


async def test_serving_goes_on_without_policy_and_registry():
    """Known keys and known workers keep working; only administration has to wait."""
    async with pair() as (cluster, prefill, _, gateway):
        await cluster.kill("policy")
        await cluster.kill("registry")
        responses = [await gateway.chat(stream=True) for _ in range(3)]
        admin = await gateway.http.get("/v1/admin/api_keys", headers={"authorization": f"Bearer {ADMIN_KEY}"})

        assert [r.text for r in responses] == [TWO_TOKENS] * 3
        assert admin.status_code == 503
        assert gateway.lifecycle.readiness().ready
        await until(lambda: not prefill.live)

        await cluster.start_policy()
        cluster.policy.add("a-brand-new-key", "generate")
        new = {"authorization": "Bearer a-brand-new-key"}
        async with asyncio.timeout(10):
            while (await gateway.http.get("/v1/models", headers=new)).status_code != 200:
                await asyncio.sleep(0.02)


async def test_a_revoked_key_stops_at_once_and_does_not_come_back():
    """An older snapshot, as from a restored backup, is refused and counted."""
    async with decode_only() as (cluster, _, gateway):
        record = cluster.policy.add("soon-revoked", "generate")
        headers = {"authorization": "Bearer soon-revoked"}
        async with asyncio.timeout(5):
            while (await gateway.http.get("/v1/models", headers=headers)).status_code != 200:
                await asyncio.sleep(0.005)
        cluster.policy.revoke(record.key_id)
        async with asyncio.timeout(0.25):
            while (await gateway.http.get("/v1/models", headers=headers)).status_code != 401:
                await asyncio.sleep(0.005)
        await cluster.kill("policy")
        cluster.policy = new_policy(cluster.root)
        cluster.policy.add("soon-revoked", "generate")  # revision 4: older than what the gateway has
        await cluster.start_policy()
        async with asyncio.timeout(5):
            while not await gateway.metric('inferflux_version_regression_total{source="policy"}'):
                await asyncio.sleep(0.02)

        assert (await gateway.http.get("/v1/models", headers=headers)).status_code == 401


async def test_a_registry_that_forgot_everything_disturbs_nothing():
    """A worker whose stream lives is used, whatever the registry says; when both lost it, it is gone."""
    async with decode_only() as (cluster, decode, gateway):
        cluster.registry.remove("decode-0")
        await asyncio.sleep(0.1)
        assert (await gateway.chat(stream=True)).text == TWO_TOKENS

        decode.cut()
        await until(lambda: not gateway.lifecycle.readiness().ready)
        assert (await gateway.chat()).json()["error"]["code"] == "no_worker"


async def test_before_policy_and_registry_are_heard_nothing_is_let_in():
    """Alive, not ready, and it says why."""
    async with fake_cluster() as cluster:
        await cluster.kill("policy")
        await cluster.kill("registry")
        async with running_gateway(cluster) as gateway:
            ready, live = await gateway.http.get("/readyz"), await gateway.http.get("/livez")
            health, chat = await gateway.http.get("/healthz"), await gateway.chat()

            assert (live.status_code, ready.status_code, health.status_code) == (200, 503, 200)
            assert ready.json()["reason"] == "policy: not heard yet; workers: registry not heard yet"
            assert (chat.status_code, chat.json()["error"]["code"]) == (503, "unavailable")


# --- the end of the gateway


async def test_a_drain_finishes_streams_and_takes_nothing_new():
    """SIGTERM: not ready at once, the stream ends well, the listener is closed."""
    proceed = asyncio.Event()

    async def slow(job):
        job.emit(head=SSE_HEAD, data=b'data: {"t": 1}\n\n')
        await proceed.wait()
        job.emit(data=b'data: {"t": 2}\n\ndata: [DONE]\n\n', end=end())

    async with decode_only() as (_, decode, gateway):
        decode.script = slow
        request = asyncio.ensure_future(gateway.chat(stream=True))
        await until(lambda: decode.jobs)
        gateway.lifecycle.begin_drain()
        await asyncio.sleep(0.05)  # asyncio's own server leaks a connection that comes in the moment it is closed
        async with asyncio.timeout(5):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
                    writer.close()
                except OSError:
                    break
                await asyncio.sleep(0.01)
        proceed.set()

        assert (await request).text == TWO_TOKENS


async def test_a_drain_that_takes_too_long_ends_streams_with_an_error():
    """No stream is cut without a word."""

    async def endless(job):
        job.emit(head=SSE_HEAD, data=b"data: 1\n\n")
        await asyncio.sleep(60)

    async with decode_only(drain_timeout_s=0.2) as (_, decode, gateway):
        decode.script = endless
        request = asyncio.ensure_future(gateway.chat(stream=True))
        await until(lambda: decode.jobs)
        await asyncio.sleep(0.05)
        gateway.lifecycle.begin_drain()
        error = event((await request).text)

        assert (error["code"], error["retryable"]) == ("draining", True)


async def test_a_whole_answer_that_is_huge_arrives_whole():
    """Nothing in the gateway truncates."""
    blob = json.dumps({"data": "x" * 8_000_000}).encode()

    async def big(job):
        job.emit(head=JSON_HEAD, data=blob[:4_000_000])
        job.emit(data=blob[4_000_000:], end=end())

    async with decode_only() as (_, decode, gateway):
        decode.script = big
        response = await gateway.http.post("/tokenize", json={"model": MODEL}, timeout=httpx.Timeout(30))

        assert response.content == blob
