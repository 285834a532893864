"""The rule of the inquest, case by case; its clock is set by hand, its timers are the loop's."""

from __future__ import annotations

import asyncio

import pytest

from inferflux.clock import ManualClock
from inferflux.errors import PoisonRequest
from services.gateway import poison
from services.gateway.call import Call
from services.gateway.news import News
from services.gateway.poison import Inquest
from tests.unit.gateway.calls import new_call


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def inquest(clock: ManualClock) -> Inquest:
    return Inquest(clock, News())


def die(inquest: Inquest, clock: ManualClock, start: str, *calls: Call, after_s: float = 10.0) -> None:
    clock.advance(after_s)
    inquest.died(start, calls)


async def is_guilty(inquest: Inquest, call: Call) -> bool:
    try:
        async with asyncio.timeout(5):
            await inquest.settle(call)
    except PoisonRequest:
        return True
    return False


async def test_the_only_one_under_two_deaths_is_guilty(inquest, clock):
    """Those who were under one of them are not, and what they lost with it is forgiven."""
    guilty, first, second = new_call(b"guilty"), new_call(b"1"), new_call(b"2")
    die(inquest, clock, "a", guilty, first)
    second.losses.counted.append("b")
    die(inquest, clock, "b", guilty, second)

    assert await is_guilty(inquest, guilty)
    assert not await is_guilty(inquest, first)
    assert not await is_guilty(inquest, second)
    assert not second.losses.counted
    assert first.losses.deaths == second.losses.deaths == set()


async def test_what_was_found_guilty_is_not_let_in_again(inquest, clock):
    """The same body of the same tenant, for a while; nothing else."""
    guilty = new_call(b"guilty", "acme")
    for start in ("a", "b"):
        die(inquest, clock, start, guilty)
    assert await is_guilty(inquest, guilty)

    with pytest.raises(PoisonRequest):
        inquest.admit(new_call(b"guilty", "acme"))
    inquest.admit(new_call(b"guilty", "other"))
    inquest.admit(new_call(b"innocent", "acme"))
    clock.advance(poison.QUARANTINE_S)
    inquest.admit(new_call(b"guilty", "acme"))


async def test_several_under_the_same_two_deaths_are_tried_one_by_one(inquest, clock):
    """None is guilty yet; the next death decides."""
    one, other = new_call(b"1"), new_call(b"2")
    for start in ("a", "b"):
        die(inquest, clock, start, one, other)

    assert not await is_guilty(inquest, one)
    assert inquest.is_on_trial(one)
    assert inquest.is_on_trial(other)
    die(inquest, clock, "c", one)
    assert await is_guilty(inquest, one)
    assert not inquest.is_on_trial(other)


async def test_who_got_further_in_between_is_innocent(inquest, clock):
    """However many workers die under it."""
    call = new_call()
    for start in ("a", "b", "c"):
        die(inquest, clock, start, call)
        inquest.clear(call)

    assert not await is_guilty(inquest, call)


async def test_deaths_at_the_same_time_accuse_nobody_once(inquest, clock):
    """A whole pool that dies is no request's doing; a third death right after its two is."""
    call = new_call()
    die(inquest, clock, "a", call)
    die(inquest, clock, "b", call, after_s=0.1)

    assert not await is_guilty(inquest, call)
    assert call.losses.pardoned == {"b"}
    die(inquest, clock, "c", call)
    assert await is_guilty(inquest, call)


async def test_a_worker_that_comes_back_had_not_died(inquest, clock):
    """Only its connection was lost."""
    call = new_call()
    for start in ("a", "b"):
        die(inquest, clock, start, call)
    inquest.came_back("a")

    assert not await is_guilty(inquest, call)
    assert call.losses.deaths == {"b"}


async def test_who_has_nothing_yet_gives_way_to_who_has(inquest, clock):
    """Until those got further, or for a second; and pauses in any case."""
    fresh, streaming = new_call(), new_call(num_events=5)
    die(inquest, clock, "a", fresh, streaming)

    assert (inquest.gives_way(fresh), inquest.gives_way(streaming)) == (True, False)
    clock.advance(poison.PAUSE_S + 0.01)
    assert inquest.gives_way(fresh)
    inquest.clear(streaming)
    assert not inquest.gives_way(fresh)


async def test_who_runs_for_a_while_is_cleared(inquest, clock, monkeypatch):
    """A request that is not streamed shows no progress but this."""
    monkeypatch.setattr(poison, "PROBATION_S", 0.01)
    call = new_call()
    die(inquest, clock, "a", call)
    inquest.watch(call)
    async with asyncio.timeout(5):
        while call.losses.deaths:
            await inquest.news.next()

    die(inquest, clock, "b", call)
    assert not await is_guilty(inquest, call)


async def test_the_dead_are_not_remembered_for_ever(inquest, clock):
    """Nor are requests that are over."""
    for i in range(poison.MAX_DEATHS + 10):
        die(inquest, clock, f"start-{i}", new_call())

    assert len(inquest._deaths) == poison.MAX_DEATHS
    assert not any(map(len, inquest._deaths.values()))


async def test_on_trial_everybody_pauses(inquest, clock):
    """So that the next death is an event of its own, whoever is mid-stream."""
    call = new_call(num_events=5)
    die(inquest, clock, "a", call)
    assert not inquest.gives_way(call)
    die(inquest, clock, "b", call, after_s=0.1)
    assert inquest.gives_way(call)
    clock.advance(poison.PAUSE_S + 0.01)

    assert not inquest.gives_way(call)
