"""Connections between the gateway and its workers are cut, reset and slowed down while requests run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from inferflux.paths import Home
from tests.chaos.run import Chaos, Options
from tests.support.proxy import Direction, Proxy

CUT_S = 3.0
WORKERS = ("prefill-0", "decode-0")
pytestmark = [pytest.mark.timeout(180), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chaos() -> AsyncIterator[tuple[Chaos, dict[str, Proxy]]]:
    """A cluster whose gateway reaches one worker of each role through a proxy."""
    async with Chaos(Options(prefill=1, decode=2, gateways=1, seed=5)) as chaos, AsyncExitStack() as stack:
        home = Home(chaos.cluster.home)
        proxies = {name: await stack.enter_async_context(Proxy.before(home.socket(name))) for name in WORKERS}
        before = await asyncio.to_thread(chaos.cluster.kill, "gateway")  # the next one connects through the proxies
        await asyncio.to_thread(chaos.cluster.wait_restarted, before)
        await chaos.calibrate()
        assert all(proxy.num_connections for proxy in proxies.values())
        yield chaos, proxies


@pytest.mark.parametrize(
    ("worker", "directions"),
    [("decode-0", ("up", "down")), ("decode-0", ("up",)), ("decode-0", ("down",)), ("prefill-0", ("up", "down"))],
)
async def test_a_partition_loses_no_request(
    chaos: tuple[Chaos, dict[str, Proxy]], worker: str, directions: tuple[Direction, ...]
):
    """Nothing passes for seconds and nobody is told; every request still ends exactly, and nothing stays held."""
    harness, proxies = chaos
    proxy = proxies[worker]

    async def cut() -> list[str]:
        proxy.cut(*directions)
        await asyncio.sleep(CUT_S)
        held = dict(proxy.bytes_held)
        proxy.heal()
        return [f"{worker}: {held} bytes held in {CUT_S} s"] if any(held.values()) else []

    await check(harness, f"cut {worker} {'+'.join(directions)}", cut)


@pytest.mark.parametrize("worker", WORKERS)
async def test_a_reset_loses_no_request(chaos: tuple[Chaos, dict[str, Proxy]], worker: str):
    """All connections to a worker that lives break at once."""
    harness, proxies = chaos

    async def reset() -> list[str]:
        num = proxies[worker].num_connections
        proxies[worker].reset()
        return [f"{worker}: {num} connections reset"] if num else []

    await check(harness, f"reset {worker}", reset)


async def check(harness: Chaos, name: str, disturbance: Callable) -> None:
    record = await harness.disturb(name, disturbance)

    assert record.evidence, "the disturbance did not happen"
    assert record.violations == []
    await harness.until_connected()
