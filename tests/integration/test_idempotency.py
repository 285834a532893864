"""Requests with an Idempotency-Key: one execution, however often and through whatever connection they are sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.support.fake_cluster import (
    ADMIN_KEY,
    MODEL,
    FakeClient,
    FakeDecode,
    Job,
    end,
    failed,
    fake_cluster,
    head,
    running_gateway,
    two_tokens,
    until,
)

NAMED = {"idempotency-key": "order-66"}


@asynccontextmanager
async def decode_only(**settings) -> AsyncIterator[tuple[FakeDecode, FakeClient]]:
    async with fake_cluster() as cluster:
        decode = await cluster.add_decode()
        async with running_gateway(cluster, **settings) as gateway:
            await gateway.ready()
            yield decode, gateway


async def post(gateway: FakeClient, **fields) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]} | fields
    return await gateway.http.post("/v1/chat/completions", json=body, headers=NAMED)


@pytest.mark.parametrize("stream", [False, True])
async def test_parallel_twins_are_one_execution(stream: bool):
    async with decode_only() as (decode, gateway):
        hits = await gateway.metric("inferflux_idempotent_hits_total")
        answers = await asyncio.gather(*(post(gateway, stream=stream) for _ in range(32)))

        assert len(decode.jobs) == 1
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
        assert len({answer.headers["x-request-id"] for answer in answers}) == 1
        assert sum("idempotent-replayed" in answer.headers for answer in answers) == 31
        assert await gateway.metric("inferflux_idempotent_hits_total") == hits + 31


async def test_a_retry_gets_the_answer_of_before():
    async with decode_only() as (decode, gateway):
        first, again = await post(gateway, stream=True), await post(gateway, stream=True)

        assert again.text == first.text
        assert len(decode.jobs) == 1


async def test_keys_belong_to_one_request():
    """Another body under the same key is a mistake, and says so; without a key there are no twins."""
    async with decode_only() as (decode, gateway):
        await post(gateway)
        other, without = await post(gateway, temperature=0), await gateway.chat()

        assert other.status_code == 422
        assert other.json()["error"]["code"] == "idempotency_key_reused"
        assert without.status_code == 200
        assert len(decode.jobs) == 2


async def test_a_bad_key_is_refused():
    async with decode_only() as (decode, gateway):
        body = {"model": MODEL, "messages": []}
        answer = await gateway.http.post("/v1/chat/completions", json=body, headers={"idempotency-key": "a b"})

        assert answer.status_code == 400
        assert "idempotency-key" in answer.json()["error"]["message"]
        assert not decode.jobs


async def test_a_failure_is_tried_again():
    """Who retries wants an answer, not the same failure."""

    async def fail(job: Job) -> None:
        job.emit(end=failed("INTERNAL", 500))

    async with decode_only() as (decode, gateway):
        decode.script = fail
        first = await post(gateway)
        decode.script = two_tokens
        again = await post(gateway)

        assert (first.status_code, again.status_code) == (500, 200)
        assert len(decode.jobs) == 2


async def test_an_execution_outlives_the_connection_that_began_it():
    """The client comes back in time: the same execution answers."""
    may_end = asyncio.Event()

    async def slow(job: Job) -> None:
        job.emit(head=head(200), data=b'{"text": ')
        await may_end.wait()
        job.emit(data=b'"one"}', end=end())

    async with decode_only() as (decode, gateway):
        decode.script = slow
        lost = asyncio.ensure_future(post(gateway))
        await until(lambda: decode.jobs)
        lost.cancel()
        await asyncio.gather(lost, return_exceptions=True)
        back = asyncio.ensure_future(post(gateway))
        await asyncio.sleep(0)
        may_end.set()

        assert (await back).json() == {"text": "one"}
        assert len(decode.jobs) == 1
        assert not decode.cancels


async def test_an_answer_is_for_one_key_and_for_nobody_else():
    """Another key of the tenant may be another person's: its request is one of its own."""
    async with decode_only() as (decode, gateway):
        first = await post(gateway)
        again = await post(gateway)
        headers = {**NAMED, "authorization": f"Bearer {ADMIN_KEY}"}
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        other = await gateway.http.post("/v1/chat/completions", json=body, headers=headers)
        nobody = await gateway.http.post(
            "/v1/chat/completions", json=body, headers={**NAMED, "authorization": "Bearer wrong"}
        )

        assert again.content == first.content
        assert other.status_code == 200
        assert nobody.status_code == 401
        assert len(decode.jobs) == 2


async def test_answers_are_kept_within_a_limit():
    async with decode_only(idempotency_max_bytes=10) as (decode, gateway):
        await post(gateway)
        await post(gateway)

        assert len(decode.jobs) == 2
