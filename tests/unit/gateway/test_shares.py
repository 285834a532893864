"""Gateways that share limits: never over, nothing lost, and what happens while nobody counts for all of them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferflux.clock import ManualClock
from inferflux.errors import (
    BudgetExhausted,
    ConcurrencyLimited,
    LimitExceeded,
    LimitsUnavailable,
    RateLimited,
    RequestExceedsLimit,
    Unavailable,
)
from inferflux.policy.counting import Counters
from inferflux.policy.limits import Kind, Limit, LimitsSection, Name, Scope, compile_limits
from inferflux.process import Tasks
from services.gateway import shares as shares_module
from services.gateway.purse import Need
from services.gateway.reservations import headers, settle
from services.gateway.shares import Shares

TENANT = "acme"
MOST = 100
OPEN = compile_limits(LimitsSection(away_share=0.25))
CLOSED = compile_limits(LimitsSection(when_store_is_away="fail_closed"))
DAILY = Limit(Name(Scope.TENANT, TENANT, Kind.TOKENS_PER_DAY), MOST)
MINUTELY = Limit(Name(Scope.KEY, "key_1", Kind.TOKENS_PER_MINUTE), MOST)
RUNNING = Limit(Name(Scope.KEY, "key_1", Kind.CONCURRENT_REQUESTS), 4)


class Store:
    """The counters of all gateways, in this process.

    `is_away`: it can't be reached. `is_stuck`: it does not answer. `is_forgetful`: its answers are lost.
    """

    def __init__(self):
        self.clock = ManualClock(1_700_000_000.0)
        self.counters = Counters()
        self.num_exchanges = 0
        self.is_away = False
        self.is_stuck = False
        self.is_forgetful = False

    async def exchange(self, message):
        self.num_exchanges += 1
        await asyncio.sleep(0)
        while self.is_stuck:
            await asyncio.sleep(0.001)
        if self.is_away:
            raise Unavailable("away")
        answer = self.counters.exchange(self.clock.time(), message)
        if self.is_forgetful:
            raise Unavailable("the answer was lost")
        return answer

    def used(self, limit):
        return self.counters.used(limit.name, self.clock.time())


class Gateway:
    """One gateway's shares, and the requests it has let through."""

    def __init__(self, store, number, tasks):
        self.shares = Shares(store.exchange, f"gateway-{number}", store.clock, tasks)
        self.held = []

    async def take(self, *needs, limits=OPEN):
        needs = [Need(limit, amount) for limit, amount in needs]
        pieces = await self.shares.take(TENANT, needs, limits)
        self.held.append((needs, pieces))

    def settle(self, *amounts):
        """End the oldest request; `amounts` per limit, or else what was reserved."""
        needs, pieces = self.held.pop(0)
        actual = {need.limit: need.amount for need in needs} | dict(amounts)
        settle(self.shares.account(TENANT), needs, pieces, actual)

    async def tick(self):
        self.shares.tick()
        await idle(self.shares)

    @property
    def num_reserved(self):
        return sum(need.amount for needs, _ in self.held for need in needs)


async def idle(*many):
    """Wait until no exchange is on its way."""
    async with asyncio.timeout(10):
        while any(desk.task for shares in many for desk in shares._desks.values()):
            await asyncio.sleep(0)


@asynccontextmanager
async def gateways(number=2):
    store = Store()
    async with Tasks() as tasks:
        yield store, *(Gateway(store, n, tasks) for n in range(number))


async def tries(gateway, *needs, limits=OPEN):
    try:
        await gateway.take(*needs, limits=limits)
    except LimitExceeded:
        return False
    return True


steps = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(0, 1), st.integers(1, 30), st.integers(1, 6)),
        st.tuples(st.just("settle"), st.integers(0, 1), st.floats(0, 1), st.just(0)),
        st.tuples(st.just("wait"), st.just(0), st.floats(0.05, 3), st.just(0)),
    ),
    max_size=30,
)


@given(steps)
@settings(max_examples=80)
def test_a_budget_is_never_exceeded_and_what_is_counted_is_what_was_spent(steps):
    """Parallel requests of two gateways on one budget; in the end the store has the sum of what they cost."""

    async def play():
        async with gateways() as (store, *many):
            spent = 0
            for action, number, amount, parallel in steps:
                gateway = many[number]
                if action == "take":
                    await asyncio.gather(*(tries(gateway, (DAILY, amount)) for _ in range(parallel)))
                elif action == "settle" and gateway.held:
                    cost = int(amount * gateway.held[0][0][0].amount)
                    gateway.settle((DAILY, cost))
                    spent += cost
                elif action == "wait":
                    store.clock.advance(amount)
                    for each in many:
                        await each.tick()
                assert spent + sum(gateway.num_reserved for gateway in many) <= store.used(DAILY) + _unbooked(many)
                assert spent + sum(gateway.num_reserved for gateway in many) <= MOST
            for gateway in many:
                while gateway.held:
                    spent += gateway.held[0][0][0].amount
                    gateway.settle()
            store.clock.advance(1.5)
            for gateway in many:
                await gateway.tick()
            assert store.used(DAILY) == spent

    asyncio.run(play())


def _unbooked(many):
    """What gateways owe the store."""
    accounts = [gateway.shares.account(TENANT) for gateway in many]
    return sum(max(0, amount) for account in accounts for amount in account.outbox.values())


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 20), st.floats(0, 8)), max_size=60))
@settings(max_examples=50)
def test_no_sixty_seconds_have_more_than_a_minute_s_limit(steps):
    """Wherever the window is put."""

    async def play():
        async with gateways() as (store, *many):
            spends = []
            for number, amount, pause_s in steps:
                store.clock.advance(pause_s)
                await many[number].tick()
                if await tries(many[number], (MINUTELY, amount)):
                    spends.append((store.clock.time(), amount))
            for end_s, _ in spends:
                assert sum(amount for at, amount in spends if end_s - 60 < at <= end_s) <= MOST

    asyncio.run(play())


async def test_parallel_requests_of_two_gateways_get_what_there_is_and_no_more():
    """To the last request, without any of them waiting long."""
    async with gateways() as (store, one, two):
        answers = await asyncio.gather(*(tries((one, two)[n % 2], (DAILY, 1)) for n in range(3 * MOST)))

        assert MOST * 7 // 8 <= sum(answers) <= MOST
        store.clock.advance(1.1)
        await one.tick()
        await two.tick()
        while await tries(one, (DAILY, 1)):  # what the other one's share was is to be had again
            pass
        assert len(one.held) + len(two.held) == MOST == store.used(DAILY)


async def test_most_requests_need_no_call():
    """A share lasts for many."""
    plenty = Limit(Name(Scope.KEY, "key_1", Kind.REQUESTS_PER_MINUTE), 100_000)
    async with gateways(1) as (store, gateway):
        for _ in range(200):
            await gateway.take((plenty, 1))
            store.clock.advance(0.01)
        await idle(gateway.shares)

    assert store.num_exchanges < 30


async def test_a_refusal_names_the_limit_and_when_to_come_back():
    """And is remembered for a moment, so that who does not wait costs the store nothing."""
    async with gateways(1) as (store, gateway):
        await gateway.take((MINUTELY, MOST))
        for _ in range(50):
            with pytest.raises(RateLimited, match="tokens_per_minute of key key_1: 100 of 100 are used") as caught:
                await gateway.take((MINUTELY, 7))

    assert caught.value.retry_after_s == 60.0
    assert store.num_exchanges == 2


async def test_each_kind_of_limit_has_its_error():
    """Clients tell a pause from an empty purse."""
    async with gateways(1) as (_, gateway):
        await gateway.take((DAILY, MOST), (RUNNING, 1))
        with pytest.raises(BudgetExhausted):
            await gateway.take((DAILY, 1))
        for _ in range(3):
            await gateway.take((RUNNING, 1))
        with pytest.raises(ConcurrencyLimited):
            await gateway.take((RUNNING, 1))


async def test_a_request_larger_than_a_limit_is_told_so():
    """It would wait for ever."""
    async with gateways(1) as (store, gateway):
        with pytest.raises(RequestExceedsLimit, match="this request needs up to 101"):
            await gateway.take((DAILY, MOST + 1))

    assert store.num_exchanges == 0


async def test_a_place_that_is_given_back_is_to_be_had_again_at_once():
    """On this gateway without a call, on another one when it has been booked."""
    async with gateways() as (store, one, two):
        for _ in range(4):
            await one.take((RUNNING, 1))
        assert not await tries(two, (RUNNING, 1))
        num_before = store.num_exchanges
        one.settle()
        assert await tries(one, (RUNNING, 1))
        assert store.num_exchanges == num_before

        one.settle()
        store.clock.advance(1.5)
        await one.tick()
        assert await tries(two, (RUNNING, 1))


async def test_requests_that_run_long_keep_their_places():
    """The store forgets gateways that say nothing; this one says something."""
    async with gateways() as (store, one, two):
        for _ in range(4):
            await one.take((RUNNING, 1))
        for _ in range(10):
            store.clock.advance(6)
            await one.tick()
        assert not await tries(two, (RUNNING, 1))


async def test_what_was_spent_beyond_the_guess_is_counted_too():
    """And those that come after it pay."""
    async with gateways(1) as (store, gateway):
        await gateway.take((DAILY, 10))
        gateway.settle((DAILY, 95))
        await gateway.tick()

        assert store.used(DAILY) == 95
        assert not await tries(gateway, (DAILY, 6))


async def test_while_the_store_is_away_a_gateway_lets_through_its_own_share():
    """A quarter of the limit here, and the store hears of it when it is back."""
    async with gateways(1) as (store, gateway):
        store.is_away = True
        assert [await tries(gateway, (DAILY, 5)) for _ in range(7)] == [True] * 5 + [False] * 2
        assert not gateway.shares.is_up
        store.is_away = False
        store.clock.advance(1)
        await gateway.tick()
        await gateway.tick()

        assert gateway.shares.is_up
        assert store.used(DAILY) == 25
        while gateway.held:
            gateway.settle((DAILY, 1))
        await gateway.tick()
        assert store.used(DAILY) == 5


async def test_while_the_store_is_away_places_are_counted_here():
    """And are given back here."""
    async with gateways(1) as (store, gateway):
        store.is_away = True
        assert [await tries(gateway, (RUNNING, 1)) for _ in range(2)] == [True, False]
        gateway.settle()
        assert await tries(gateway, (RUNNING, 1))


async def test_a_policy_may_refuse_what_nobody_counts():
    """Then it is a failure of ours, not a limit of theirs."""
    async with gateways(1) as (store, gateway):
        store.is_away = True
        with pytest.raises(LimitsUnavailable):
            await gateway.take((DAILY, 1), limits=CLOSED)


async def test_a_store_that_hangs_delays_one_moment_and_then_nobody(monkeypatch):
    """And the share that it gave in the end is not lost."""
    monkeypatch.setattr(shares_module, "PATIENCE_S", 0.01)
    async with gateways(1) as (store, gateway):
        store.is_stuck = True
        await gateway.take((DAILY, 1))
        monkeypatch.setattr(shares_module, "PATIENCE_S", 3600.0)  # who still waits would wait for this test's end
        for _ in range(20):
            await gateway.take((DAILY, 1))
        store.is_stuck = False
        await idle(gateway.shares)
        store.clock.advance(1.5)
        await gateway.tick()

        assert store.used(DAILY) == 21


async def test_a_client_that_leaves_while_it_is_counted_takes_nothing_with_it():
    """What was meant for it goes back."""
    async with gateways(1) as (store, gateway):
        store.is_stuck = True
        waiting = asyncio.create_task(gateway.take((DAILY, 50), (RUNNING, 1)))
        await asyncio.sleep(0.005)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        store.is_stuck = False
        await idle(gateway.shares)
        for _ in range(2):
            store.clock.advance(1.5)
            await gateway.tick()

        assert store.used(DAILY) == 0
        assert store.used(RUNNING) == 0


async def test_an_answer_that_was_lost_is_not_counted_twice():
    """The same bookings go out again under the same name."""
    async with gateways(1) as (store, gateway):
        await gateway.take((DAILY, 40))
        gateway.settle((DAILY, 90))
        store.is_forgetful = True
        await gateway.tick()
        assert store.used(DAILY) == 90
        store.is_forgetful = False
        store.clock.advance(1)
        await gateway.tick()
        assert store.used(DAILY) == 90


async def test_a_gateway_that_stops_gives_back_its_shares():
    """At the end of a drain."""
    async with gateways(1) as (store, gateway):
        for _ in range(4):
            await gateway.take((DAILY, 2))
        assert store.used(DAILY) > 8
        await gateway.shares.close()

        assert store.used(DAILY) == 8


async def test_answers_say_what_is_left():
    """Of the tightest limit, in the headers that clients know."""
    async with gateways(1) as (_, gateway):
        loose = Limit(Name(Scope.TENANT, TENANT, Kind.TOKENS_PER_MINUTE), 10 * MOST)
        await gateway.take((MINUTELY, 30), (loose, 30))
        lines = dict(headers(gateway.shares.account(TENANT), [MINUTELY, loose]))

    assert lines[b"x-ratelimit-limit-tokens"] == b"100"
    assert lines[b"x-ratelimit-remaining-tokens"] == b"70"
    assert lines[b"x-ratelimit-reset-tokens"] == b"1m0s"
