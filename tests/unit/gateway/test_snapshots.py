from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from inferflux.errors import Unavailable
from services.gateway.snapshots import Snapshot, backoff_s


@dataclass(frozen=True)
class Value:
    revision: int
    text: str = ""


def test_newer_values_are_used_and_older_ones_refused():
    """A revision never goes back."""
    seen: list[Value] = []
    snapshot = Snapshot[Value]("policy", seen.append)
    answers = [snapshot.offer(Value(revision)) for revision in (5, 7, 6, 7, 8)]

    assert answers == [True, True, False, True, True]
    assert [value.revision for value in seen] == [5, 7, 8]
    assert snapshot.revision == 8


def test_the_same_revision_again_changes_nothing():
    """A reconnect brings it once more."""
    snapshot = Snapshot[Value]("policy")
    snapshot.offer(Value(1, "first"))
    snapshot.offer(Value(1, "second"))

    assert snapshot.value == Value(1, "first")


def test_a_snapshot_of_nothing_is_a_value():
    """An empty cluster has been heard, too."""
    snapshot = Snapshot[Value]("registry")

    assert snapshot.value is None
    snapshot.offer(Value(0))
    assert snapshot.value == Value(0)


async def test_reached_waits_for_a_revision():
    """But not for ever."""
    snapshot = Snapshot[Value]("policy")
    waiting = asyncio.create_task(snapshot.reached(3, timeout_s=5))
    for revision in (1, 2, 3):
        await asyncio.sleep(0)
        snapshot.offer(Value(revision))

    assert await waiting
    assert await snapshot.reached(3, timeout_s=0)
    assert not await snapshot.reached(4, timeout_s=0.01)


@pytest.mark.looptime
async def test_follow_opens_the_stream_again_with_what_it_has():
    """Whether the stream ends, fails, or can't be opened."""
    asked: list[int] = []
    snapshot = Snapshot[Value]("policy")

    async def open_stream(revision: int) -> AsyncIterator[Value]:
        asked.append(revision)
        if len(asked) in (2, 3):
            raise Unavailable("not there")
        yield Value(10 * len(asked))
        if len(asked) == 4:
            raise Unavailable("gone")

    task = asyncio.create_task(snapshot.follow(open_stream))
    while len(asked) < 6:
        await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert asked[:6] == [0, 10, 10, 10, 40, 50]


def test_backoff_doubles_and_is_bounded():
    """Retries stay quick at first and gentle for ever."""
    assert 0.025 <= backoff_s(0) <= 0.05
    assert 0.1 <= backoff_s(2) <= 0.2
    assert 1.0 <= backoff_s(1000) <= 2.0
