from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from inferflux.errors import DeadlineExceeded
from services.gateway.asgi import ClientGone
from services.gateway.lifeline import Lifeline

pytestmark = pytest.mark.looptime


class Client:
    """The receiving side of a connection whose client leaves after a while."""

    def __init__(self, leaves_after_s: float) -> None:
        self._leaves_after_s = leaves_after_s
        self.num_noise = 1

    async def receive(self):
        if self.num_noise:
            self.num_noise -= 1
            return {"type": "http.request", "body": b"", "more_body": False}
        await asyncio.sleep(self._leaves_after_s)
        return {"type": "http.disconnect"}


def lifeline(leaves_after_s: float = 1000, deadline_s: float = 1000) -> Lifeline:
    return Lifeline(Client(leaves_after_s).receive, asyncio.get_running_loop().time() + deadline_s)


@asynccontextmanager
async def cleaning_up() -> AsyncIterator[None]:
    """Take 5 s for it."""
    try:
        yield
    finally:
        await asyncio.sleep(5)


async def test_work_that_ends_in_time_is_left_alone(looptime):
    """And nothing stays behind."""
    async with lifeline():
        await asyncio.sleep(5)

    assert looptime == 5


async def test_a_client_that_leaves_ends_the_block_at_once(looptime):
    """In whatever it waits, after its clean-up."""
    with pytest.raises(ClientGone):
        async with lifeline(leaves_after_s=3), cleaning_up():
            await asyncio.sleep(100)

    assert looptime == 3 + 5


async def test_the_deadline_ends_the_block(looptime):
    """With the error that becomes a 504."""
    with pytest.raises(DeadlineExceeded):
        async with lifeline(deadline_s=7):
            await asyncio.sleep(100)

    assert looptime == 7


async def test_the_first_end_counts():
    """A client that leaves during the clean-up after the deadline changes nothing."""
    with pytest.raises(DeadlineExceeded):
        async with lifeline(leaves_after_s=2, deadline_s=1), cleaning_up():
            await asyncio.sleep(100)


async def test_an_error_of_the_block_is_its_own():
    """The lifeline does not hide it."""
    with pytest.raises(KeyError):
        async with lifeline():
            raise KeyError


async def test_a_cancellation_from_outside_stays_one():
    """Such as the server's, at the end of a drain."""

    async def serve() -> None:
        async with lifeline():
            await asyncio.sleep(100)

    task = asyncio.create_task(serve())
    await asyncio.sleep(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_task_works_on_after_the_end():
    """The cancellation is used up: the error can be written to the client."""
    with pytest.raises(DeadlineExceeded):
        async with lifeline(deadline_s=1):
            await asyncio.sleep(100)
    await asyncio.sleep(1)

    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
