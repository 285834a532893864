from __future__ import annotations

import asyncio

import pytest

from inferflux.lifecycle import Lifecycle
from inferflux.worker.drain import Drain

pytestmark = [pytest.mark.looptime]


async def never() -> None:
    await asyncio.Event().wait()


async def took_s(drain: Drain) -> float:
    loop = asyncio.get_running_loop()
    began_at = loop.time()
    async with asyncio.timeout(1000):
        await drain.wait(never)
    return loop.time() - began_at


async def test_a_signal_gives_the_usual_budget() -> None:
    lifecycle = Lifecycle("decode", "decode-0")
    lifecycle.begin_drain()

    assert await took_s(Drain(lifecycle, 60)) == 60


@pytest.mark.parametrize(("budget_s", "wanted_s"), [(None, 60), (90, 90), (5, 5), (0, 0)])
async def test_who_drains_may_say_how_long_it_may_take(budget_s: float | None, wanted_s: float) -> None:
    lifecycle = Lifecycle("decode", "decode-0")
    drain = Drain(lifecycle, 60)

    drain.begin(budget_s)

    assert lifecycle.draining.is_set()
    assert drain.time_left_s == wanted_s
    assert await took_s(drain) == wanted_s


async def test_a_later_call_shortens_a_wait_that_runs_and_never_lengthens_it() -> None:
    drain = Drain(Lifecycle("decode", "decode-0"), 60)
    drain.begin(50)
    waiting = asyncio.create_task(took_s(drain))
    await asyncio.sleep(10)

    drain.begin(70)
    drain.begin(None)
    assert drain.time_left_s == 40
    drain.begin(20)

    assert await waiting == 30


async def test_no_budget_is_no_limit() -> None:
    drain = Drain(Lifecycle("decode", "decode-0"), 0)
    drain.begin()

    assert drain.time_left_s is None
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(500):
            await drain.wait(never)


async def test_a_drain_is_over_when_nothing_is_left_to_do() -> None:
    drain = Drain(Lifecycle("decode", "decode-0"), 60)
    done = []

    async def step() -> None:
        done.append(asyncio.get_running_loop().time())

    await drain.wait(step, step)

    assert len(done) == 2
