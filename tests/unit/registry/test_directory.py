"""The directory without its Redis: leases, settling, revisions."""

from __future__ import annotations

import asyncio

import pytest

from inferflux.clock import ManualClock
from inferflux.errors import Conflict, InvalidRequest, Unavailable
from inferflux.types import State
from services.registry.directory import TICK_S, Directory
from services.registry.store import RegistryStore
from tests.unit.registry.records import model, worker

LEASE_S = 3.0


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
async def directory(clock):
    """One whose Redis has never been there."""
    async with RegistryStore("unix:///nonexistent/redis.sock") as store:
        yield Directory(store, clock, "owner", LEASE_S)


async def newest(directory, at_least=0):
    async for news in directory.feed.watch(at_least):
        return news
    return None


def run(directory, clock, seconds):
    for _ in range(int(seconds / TICK_S)):
        clock.advance(TICK_S)
        directory.tick()


async def test_an_empty_registry_says_so_at_once(directory):
    """A gateway that has nothing need not wait."""
    _, content = await newest(directory)

    assert (content.workers, content.models) == ((), ())


async def test_a_registration_makes_worker_and_model_known(directory):
    """In one new version, without Redis."""
    before = directory.feed.revision
    directory.register(worker(), model())

    revision, content = await newest(directory)
    assert revision > before
    assert content.workers == (worker(),)
    assert [(known.name, known.is_default) for known in content.models] == [("tiny", True)]


async def test_a_renewal_without_news_is_no_new_version(directory, clock):
    """An idle cluster is silent."""
    directory.register(worker(), model())
    revision = directory.feed.revision
    for _ in range(10):
        run(directory, clock, seconds=1)
        directory.register(worker(), model())

    assert directory.feed.revision == revision


async def test_a_state_change_and_a_lost_lease_are_new_versions(directory, clock):
    """The model stays known when its last worker is gone."""
    directory.register(worker(), model())
    directory.register(worker(state=State.DRAINING), model())
    _, content = await newest(directory)
    assert content.workers[0].state == State.DRAINING

    run(directory, clock, seconds=LEASE_S)
    _, content = await newest(directory)
    assert content.workers == ()
    assert [known.name for known in content.models] == ["tiny"]


async def test_a_deregistered_worker_is_out_at_once(directory):
    """Without waiting for its lease."""
    directory.register(worker(incarnation="001-a"), model())
    directory.deregister("decode-0", "001-a")

    assert (await newest(directory))[1].workers == ()
    with pytest.raises(Conflict):
        directory.register(worker(incarnation="001-a"), model())


async def test_a_gateway_with_a_snapshot_waits_until_the_registry_knows_its_workers(directory, clock):
    """One lease after its start; then it gets above the gateway's revision, however high that is."""
    ahead = directory.feed.revision + 10_000_000
    waiting = asyncio.ensure_future(_overtake_and_watch(directory, ahead))
    directory.register(worker(), model())
    run(directory, clock, seconds=LEASE_S - TICK_S)
    await asyncio.sleep(0)
    assert not waiting.done()

    for name in ("decode-0", "decode-1"):
        directory.register(worker(name), model())
    run(directory, clock, seconds=TICK_S)
    revision, content = await waiting
    assert revision > ahead
    assert [known.worker_id for known in content.workers] == ["decode-0", "decode-1"]


async def test_revisions_grow_when_the_clock_does_not(directory):
    """Two changes within a millisecond are two versions."""
    seen = []
    for number in range(5):
        directory.register(worker(f"decode-{number}"), model())
        seen.append(directory.feed.revision)

    assert seen == sorted(set(seen))


async def test_an_absurd_revision_is_refused(directory):
    """It would leave no room for the next one."""
    before = directory.feed.revision
    with pytest.raises(InvalidRequest):
        await directory.overtake(2**64 - 1)

    assert directory.feed.revision == before


async def test_a_served_model_cannot_be_deleted(directory):
    """Its workers would make it known again within a second."""
    directory.register(worker(), model())

    with pytest.raises(Conflict, match="decode-0"):
        await directory.delete_model("tiny")


async def test_operators_changes_need_the_store(directory):
    """Refused as unavailable, nothing half done."""
    with pytest.raises(Unavailable):
        await directory.put_model(model())
    assert (await newest(directory))[1].models == ()


async def _overtake_and_watch(directory, revision):
    await directory.overtake(revision)
    return await newest(directory, revision)
