"""Limits on the way of real requests: two gateways, the real counting service and a real store; workers by script."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest

from inferflux.clock import SystemClock
from inferflux.policy.limits import Kind
from services.policy.limits_servicer import LimitsServicer
from services.policy.limits_store import LimitsStore
from tests.support.fake_cluster import (
    GENERATE_KEY,
    MODEL,
    SSE_HEAD,
    FakeClient,
    FakeCluster,
    FakeDecode,
    Job,
    end,
    failed,
    fake_cluster,
    running_gateway,
    two_tokens,
    until,
)
from tests.support.redis_server import RedisServer

USAGE = 5  # tokens of each answer, by the fake worker
PROMPT = 25  # tokens that the body below is taken to have, at most


@dataclass
class Scene:
    """What the tests look at."""

    cluster: FakeCluster
    decode: FakeDecode
    gateways: list[FakeClient]
    store: LimitsStore

    async def used(self, kind: Kind) -> int:
        usages = await self.store.usage(SystemClock().time())
        return sum(usage.used for usage in usages if usage.name.kind is kind)

    async def until_used(self, kind: Kind, amount: int) -> None:
        """Wait until the store has heard what there is to hear."""
        async with asyncio.timeout(10):
            while await self.used(kind) != amount:
                await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def redis():
    with RedisServer() as server:
        yield server


@pytest.fixture
def fresh(redis):
    redis.command("FLUSHALL")
    return redis


@asynccontextmanager
async def scene(redis, limits, num_gateways=1):
    """Start everything, with the limits in force."""
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(LimitsStore(redis.url))
        cluster = await stack.enter_async_context(fake_cluster(LimitsServicer(store, SystemClock())))
        cluster.policy.apply({"limits": limits})
        decode = await cluster.add_decode()
        gateways = []
        for number in range(num_gateways):
            running = running_gateway(cluster, instance_id=f"gateway-{number}")
            gateways.append(await stack.enter_async_context(running))
        for gateway in gateways:
            await gateway.ready()
        yield Scene(cluster, decode, gateways, store)


def tenant(section, **amounts):
    return {section: {"tenants": {"default": amounts}}}


async def test_answers_of_a_limited_key_say_what_is_left(fresh):
    """Requests and tokens, with names and times as clients of OpenAI's API read them."""
    rates = {"requests_per_minute": 10, "tokens_per_minute": 1000}
    async with scene(fresh, {"rate_limit": {"defaults": {"key": rates}}}) as it:
        (gateway,) = it.gateways
        answer = await gateway.chat(max_tokens=2)

    assert answer.status_code == 200
    said = {name: value for name, value in answer.headers.items() if name.startswith("x-ratelimit")}
    assert said["x-ratelimit-limit-requests"] == "10"
    assert said["x-ratelimit-remaining-requests"] == "9"
    assert said["x-ratelimit-reset-requests"].startswith(("1m0", "59", "1m1"))
    assert said["x-ratelimit-limit-tokens"] == "1000"
    assert 1000 - PROMPT - 2 <= int(said["x-ratelimit-remaining-tokens"]) < 1000
    assert len(said) == 6


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_a_refused_request_is_told_why_and_until_when(fresh, path):
    """In the body of its dialect; no worker hears of it."""
    async with scene(fresh, {"rate_limit": {"defaults": {"key": {"requests_per_minute": 1}}}}) as it:
        (gateway,) = it.gateways
        body = {"model": MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}
        await gateway.http.post(path, json=body)
        answer = await gateway.http.post(path, json=body)

    assert answer.status_code == 429
    assert 58 <= int(answer.headers["retry-after"]) <= 61
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    error = answer.json()["error"]
    assert error["type"] == "rate_limit_error"
    assert "requests_per_minute of key key_" in error["message"]
    if path == "/v1/chat/completions":
        assert (error["code"], error["param"]) == ("rate_limited", "requests_per_minute")
    assert len(it.decode.jobs) == 1


async def test_two_gateways_share_one_budget_to_the_last_request(fresh):
    """Parallel requests never cost more than the budget and one request; what is booked is what they did cost."""
    budget = 400
    limits = tenant("budgets", tokens_per_day=budget) | {"when_store_is_away": "fail_closed"}  # never an exception
    async with scene(fresh, limits, num_gateways=2) as it:
        for _ in range(4):
            answers = await asyncio.gather(*(it.gateways[n % 2].chat(max_tokens=2) for n in range(40)))
            assert {answer.status_code for answer in answers} <= {200, 429}
        accepted = len(it.decode.jobs)
        await it.until_used(Kind.TOKENS_PER_DAY, USAGE * accepted)
        assert USAGE * accepted <= budget + USAGE
        assert accepted > 10
        while (await it.gateways[0].chat(max_tokens=2)).status_code == 200:  # all of it is to be had
            await it.until_used(Kind.TOKENS_PER_DAY, USAGE * len(it.decode.jobs))
        refused = await it.gateways[1].chat(max_tokens=2)

    assert budget - PROMPT - 2 <= USAGE * len(it.decode.jobs) <= budget + USAGE
    assert refused.json()["error"]["code"] == "budget_exhausted"


async def test_requests_that_run_are_limited_over_gateways(fresh):
    """A place is free as soon as its request is over, however it ends."""
    held = asyncio.Event()

    async def waiting(job: Job) -> None:
        job.emit(head=SSE_HEAD, data=b'data: {"t": 1}\n\n')
        await held.wait()
        job.emit(data=b"data: [DONE]\n\n", end=end())

    limits = {"rate_limit": {"defaults": {"tenant": {"concurrent_requests": 3}}}}
    async with scene(fresh, limits, num_gateways=2) as it:
        it.decode.script = waiting
        running = [asyncio.create_task(it.gateways[n % 2].chat(stream=True)) for n in range(3)]
        await until(lambda: len(it.decode.jobs) == 3)
        refused = [await gateway.chat() for gateway in it.gateways]
        running[0].cancel()
        it.decode.script = two_tokens
        async with asyncio.timeout(10):
            while (await it.gateways[1].chat()).status_code != 200:
                await asyncio.sleep(0.05)
        held.set()
        answers = await asyncio.gather(*running[1:])
        await it.until_used(Kind.CONCURRENT_REQUESTS, 0)

    assert {answer.json()["error"]["code"] for answer in refused} == {"concurrency_limited"}
    assert {answer.status_code for answer in answers} == {200}


async def test_clients_that_leave_pay_for_what_was_computed(fresh):
    """A storm of aborts is no way around a budget: the prompt and the tokens that came are billed."""

    async def endless(job: Job) -> None:
        job.emit(head=SSE_HEAD, data=b'data: {"t": 1}\n\n')
        while True:
            job.emit(data=b"data: {}\n\n", choices=[{"index": 0, "token_ids": [1, 2]}])
            await asyncio.sleep(0.005)

    async with scene(fresh, tenant("budgets", tokens_per_day=1500)) as it:
        it.decode.script = endless
        (gateway,) = it.gateways
        refused = 0
        for _ in range(60):
            try:
                answer = await asyncio.wait_for(gateway.chat(stream=True, max_tokens=100), 0.1)
                refused += answer.status_code == 429
            except TimeoutError:
                pass
        await it.until_used(Kind.CONCURRENT_REQUESTS, 0)
        used = await it.used(Kind.TOKENS_PER_DAY)

    assert refused
    assert 1500 - 2 * (100 + PROMPT) <= used <= 1500


async def test_our_failures_cost_nothing(fresh):
    """What nobody got is given back, the request itself included."""

    async def failing(job: Job) -> None:
        job.emit(end=failed("INTERNAL", 500))

    limits = tenant("rate_limit", requests_per_minute=100) | tenant("budgets", tokens_per_day=1000)
    async with scene(fresh, limits) as it:
        it.decode.script = failing
        (gateway,) = it.gateways
        assert (await gateway.chat(max_tokens=2)).status_code == 500
        await it.until_used(Kind.TOKENS_PER_DAY, 0)
        await it.until_used(Kind.REQUESTS_PER_MINUTE, 0)


async def test_copies_of_a_request_are_counted_once(fresh):
    """One Idempotency-Key, one execution, one bill."""
    async with scene(fresh, tenant("rate_limit", requests_per_minute=100, tokens_per_minute=1000)) as it:
        (gateway,) = it.gateways
        body = {"model": MODEL, "max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}
        send = [
            gateway.http.post("/v1/chat/completions", json=body, headers={"idempotency-key": "k"}) for _ in range(5)
        ]
        answers = await asyncio.gather(*send)
        await it.until_used(Kind.TOKENS_PER_MINUTE, USAGE)
        await it.until_used(Kind.REQUESTS_PER_MINUTE, 1)

    assert {answer.status_code for answer in answers} == {200}


async def test_other_tenants_and_keys_without_limits_pay_nothing(fresh):
    """No call, no header."""
    limits = {"rate_limit": {"tenants": {"acme": {"requests_per_minute": 1}}}}
    async with scene(fresh, limits) as it:
        it.cluster.policy.add("test-key-of-acme", "generate", tenant="acme")
        (gateway,) = it.gateways
        theirs = {"authorization": "Bearer test-key-of-acme"}
        answers = [await gateway.chat() for _ in range(3)]
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}

        async def ask() -> httpx.Response:
            return await gateway.http.post("/v1/chat/completions", json=body, headers=theirs)

        async with asyncio.timeout(10):
            while (first := await ask()).status_code == 401:
                await asyncio.sleep(0.01)
        second = await ask()

    assert {answer.status_code for answer in answers} == {200}
    assert not any("ratelimit" in name for answer in answers for name in answer.headers)
    assert (first.status_code, second.status_code) == (200, 429)


async def test_a_request_that_never_fits_is_a_bad_request(fresh):
    """A pause would not help it."""
    async with scene(fresh, tenant("rate_limit", tokens_per_minute=100)) as it:
        answer = await it.gateways[0].chat(max_tokens=500)

    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "request_exceeds_limit"
    assert "this request needs up to 5" in answer.json()["error"]["message"]


async def test_without_the_store_gateways_let_through_their_share_and_book_it_later(fresh):
    """Redis hangs, then the policy service dies: the first request waits a moment, the others don't."""
    async with scene(fresh, tenant("budgets", tokens_per_day=100_000)) as it:
        (gateway,) = it.gateways
        assert (await gateway.chat(max_tokens=2)).status_code == 200
        with fresh.paused():
            await asyncio.sleep(1.2)  # the share of before is over
            answers = [await gateway.chat(max_tokens=2) for _ in range(20)]
            await it.cluster.kill("policy")
            answers += [await gateway.chat(max_tokens=2) for _ in range(20)]
            slow = sorted(answer.elapsed.total_seconds() for answer in answers)
        assert {answer.status_code for answer in answers} == {200}
        assert slow[-2] < 0.25
        await it.cluster.start_policy()
        await it.until_used(Kind.TOKENS_PER_DAY, 41 * USAGE)


async def test_a_policy_that_fails_closed_refuses_while_nobody_counts(fresh):
    """503, and an end of it when the store is back."""
    limits = tenant("budgets", tokens_per_day=100_000) | {"when_store_is_away": "fail_closed"}
    async with scene(fresh, limits) as it:
        (gateway,) = it.gateways
        await it.cluster.kill("policy")
        answer = await gateway.chat(max_tokens=2)
        await it.cluster.start_policy()
        async with asyncio.timeout(10):
            while (await gateway.chat(max_tokens=2)).status_code != 200:
                await asyncio.sleep(0.05)

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "limits_unavailable")
    assert "retry-after" in answer.headers
    assert GENERATE_KEY not in answer.text
