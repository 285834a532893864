from __future__ import annotations

import asyncio

import pytest

from inferflux.worker.leases import SessionLeases

pytestmark = [pytest.mark.looptime]


async def test_a_session_is_lost_when_its_stream_was_gone_for_the_grace() -> None:
    lost: list[str] = []
    leases = SessionLeases(lost.append, grace_s=3)
    with leases.open("s"):
        await asyncio.sleep(100)

    await asyncio.sleep(2.9)
    assert lost == []
    await asyncio.sleep(0.2)
    assert lost == ["s"]


async def test_a_session_that_comes_back_in_time_is_kept() -> None:
    lost: list[str] = []
    leases = SessionLeases(lost.append, grace_s=3)
    with leases.open("s"):
        pass
    await asyncio.sleep(2)

    with leases.open("s"):
        await asyncio.sleep(10)
        assert lost == []


async def test_of_two_streams_the_last_one_counts() -> None:
    """A gateway reconnects before the worker notices that the old connection is broken."""
    lost: list[str] = []
    leases = SessionLeases(lost.append, grace_s=3)
    old = leases.open("s")
    old.__enter__()
    with leases.open("s"):
        old.__exit__(None, None, None)
        await asyncio.sleep(10)
        assert lost == []


async def test_a_session_without_a_stream_gets_the_grace_from_its_last_sign_of_life() -> None:
    lost: list[str] = []
    leases = SessionLeases(lost.append, grace_s=3)
    for _ in range(5):
        leases.touch("s")
        await asyncio.sleep(2)
    assert lost == []

    await asyncio.sleep(2)
    assert lost == ["s"]


async def test_closing_stops_all_timers() -> None:
    lost: list[str] = []
    leases = SessionLeases(lost.append, grace_s=3)
    leases.touch("s")

    leases.close()

    await asyncio.sleep(10)
    assert lost == []
