"""The script that counts limits, on every Redis-protocol server found here, against the algorithm without a store."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferflux.errors import Unavailable
from inferflux.policy.counting import Ask, Booking, Counters, Exchange, Refusal
from inferflux.policy.limits import Kind, Name, Scope
from services.policy.limits_store import LimitsStore
from tests.support.redis_server import RedisServer, redis_binaries

NOW_S = 1_700_000_000.25
NAMES = [Name(Scope.KEY, "key_1", kind) for kind in Kind]
SLOTS = {
    Kind.REQUESTS_PER_MINUTE: 1_700_000_001,
    Kind.TOKENS_PER_MINUTE: 1_699_999_990,
    Kind.TOKENS_PER_DAY: 19_675,
    Kind.TOKENS_PER_MONTH: 24_286,
}
RUNNING = Name(Scope.KEY, "key_1", Kind.CONCURRENT_REQUESTS)
DAILY = Name(Scope.TENANT, "acme", Kind.TOKENS_PER_DAY)
MINUTELY = Name(Scope.KEY, "key_1", Kind.REQUESTS_PER_MINUTE)

amounts = st.integers(-30, 30)
bookings = st.builds(
    lambda name, amount: Booking(name, SLOTS.get(name.kind, 0), amount), st.sampled_from(NAMES), amounts
)
asks = st.builds(Ask, st.sampled_from(NAMES), st.integers(1, 60), st.integers(0, 20), st.integers(0, 40))
steps = st.tuples(
    st.integers(0, 160).map(lambda quarters: quarters / 4),
    st.sampled_from(["gateway-0", "gateway-1"]),
    st.sampled_from(["", "a", "b"]),
    st.lists(bookings, max_size=3),
    st.lists(asks, max_size=3, unique_by=lambda ask: ask.name),
)


@pytest.fixture(scope="module", params=sorted(redis_binaries()))
def server(request):
    with RedisServer(redis_binaries()[request.param]) as running:
        yield running


@pytest.fixture
async def store(server):
    server.command("FLUSHALL")
    async with LimitsStore(server.url) as opened:
        yield opened


def ask(name=DAILY, most=100, need=1, want=0):
    return Ask(name, most, need, want)


async def exchange(store, *asks, now_s=NOW_S, tenant="acme", holder="gateway-0", batch_id="", bookings=()):
    return await store.exchange(now_s, Exchange(tenant, holder, batch_id, bookings, asks))


@given(st.lists(steps, max_size=6))
@settings(
    max_examples=60,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_the_script_does_what_the_algorithm_says(server, steps):
    """Whatever is booked and asked, at whatever time: the same shares, refusals and waiting times."""

    async def play():
        server.command("FLUSHALL")
        twin, now_s = Counters(), NOW_S
        async with LimitsStore(server.url) as store:
            for pause_s, holder, batch_id, booked, asked in steps:
                now_s += pause_s
                step = Exchange("acme", holder, batch_id, booked, asked)
                expected = twin.exchange(now_s, step)
                assert rounded(await store.exchange(now_s, step)) == rounded(expected)

    asyncio.run(play())


def rounded(answer):
    if isinstance(answer, Refusal):
        return answer.index, round(answer.wait_s, 2), answer.used, round(answer.reset_s, 2)
    return [(share.used, share.extra, share.slot, share.extra_slot, round(share.reset_s, 2)) for share in answer]


async def test_parallel_requests_never_get_more_than_there_is(store):
    """A hundred at once, from two gateways, on three limits: what fits is given, to the last one, and nothing else."""
    limits = [ask(most=40), ask(MINUTELY, most=1000), ask(RUNNING, most=1000)]
    answers = await asyncio.gather(*(exchange(store, *limits, holder=f"gateway-{n % 2}") for n in range(100)))

    refused = [answer for answer in answers if isinstance(answer, Refusal)]
    assert len(refused) == 60
    assert {answer.index for answer in refused} == {0}
    usage = {usage.name: usage.used for usage in await store.usage(NOW_S, "acme")}
    assert usage == {DAILY: 40, MINUTELY: 40, RUNNING: 40}


async def test_a_refusal_takes_nothing_of_the_other_limits(store):
    """All or nothing, also when the last of them is the one that refuses."""
    await exchange(store, ask(need=100))
    refusal = await exchange(store, ask(MINUTELY), ask())

    assert (refusal.index, refusal.used) == (1, 100)
    assert [usage.name for usage in await store.usage(NOW_S)] == [DAILY]


async def test_a_batch_that_comes_twice_counts_once(store):
    """Its sender can't know whether the first one arrived."""
    booking = Booking(DAILY, 19_675, 7)
    for batch_id in ("a", "a", "b"):
        await exchange(store, batch_id=batch_id, bookings=[booking])

    (usage,) = await store.usage(NOW_S)
    assert usage.used == 14


async def test_requests_of_a_gateway_that_is_gone_stop_counting(store):
    """Concurrency is not lost for ever with a crash."""
    await exchange(store, ask(RUNNING, most=1))
    assert isinstance(await exchange(store, ask(RUNNING, most=1), holder="gateway-1", now_s=NOW_S + 10), Refusal)

    assert not isinstance(await exchange(store, ask(RUNNING, most=1), holder="gateway-1", now_s=NOW_S + 17), Refusal)


async def test_every_key_is_ours_and_expires(store, server):
    """The store does not grow with the keys of the past."""
    await exchange(store, ask(), ask(MINUTELY), ask(RUNNING), batch_id="a")

    names = [f"ifx:{{limits.acme}}:{name}" for name in ("batch:a", "tenant:acme:tokens_per_day")]
    names += [f"ifx:{{limits.acme}}:key:key_1:{kind}" for kind in ("requests_per_minute", "concurrent_requests")]
    assert server.command("EXISTS", *names) == ":4"
    assert server.command("DBSIZE") == ":4"


async def test_what_a_budget_had_is_put_back_when_the_store_has_lost_it(store, server):
    """By a service that has seen it; what was given back before is not charged again."""
    await exchange(store, ask(need=60))
    server.command("FLUSHALL")
    assert isinstance(await exchange(store, ask(need=50)), Refusal)

    await exchange(store, batch_id="a", bookings=[Booking(DAILY, 19_675, -60)])
    (share,) = await exchange(store, ask(need=50))
    assert share.used == 50


async def test_garbage_in_an_entry_counts_for_nothing(store, server):
    """And is not what ends the service."""
    server.command("HSET", "ifx:{limits.acme}:tenant:acme:tokens_per_day", "19675", "garbage", "x", "-5 9e99")

    (share,) = await exchange(store, ask(need=5))
    assert share.used == 5


async def test_a_counter_of_the_wrong_type_is_unavailable(store, server):
    """Someone else's data under our name."""
    server.command("SET", "ifx:{limits.acme}:tenant:acme:tokens_per_day", "1")

    with pytest.raises(Unavailable):
        await exchange(store, ask())


async def test_a_server_that_hangs_is_unavailable_in_time(store, server):
    """A stopped process keeps its connections open and answers nothing."""
    await exchange(store, ask())

    with server.paused(), pytest.raises(Unavailable):
        await exchange(store, ask())
