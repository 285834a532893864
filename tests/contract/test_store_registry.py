"""What the registry relies on from its store, on every Redis-protocol server found here."""

from __future__ import annotations

import asyncio
import time

import pytest

from inferflux.errors import ConfigError, Internal, NotFound, Unavailable
from inferflux.models.manifest import Manifest
from services.registry.models import ModelBook
from services.registry.releases import Release, Version
from services.registry.roster import Roster
from services.registry.store import RegistryStore
from tests.support.redis_server import RedisServer, redis_binaries
from tests.unit.registry.records import model, worker

NOW_MS = 1_700_000_000_000


@pytest.fixture(params=sorted(redis_binaries()))
def server(request):
    with RedisServer(redis_binaries()[request.param]) as running:
        yield running


@pytest.fixture
async def store(server):
    async with RegistryStore(server.url) as opened:
        yield opened


@pytest.fixture
async def replica(server):
    async with RegistryStore(server.url) as opened:
        yield opened


def putting(name, **changes):
    return lambda book: book.put(model(name, **changes), NOW_MS)


async def read_models(store):
    return await store.update(lambda book: book)


async def test_an_empty_store_reads_as_empty(store):
    """Revision 0 means that nobody ever wrote."""
    assert await read_models(store) == ModelBook()
    assert await store.read() == (0, {})


async def test_models_that_one_replica_writes_the_other_reads(store, replica):
    """Records, deletions and the revision make the round trip."""
    await store.update(putting("a", capabilities=("chat",)))
    await store.update(putting("b"))
    written = await store.update(lambda book: book.delete("a", NOW_MS))

    assert await read_models(replica) == written
    assert (await replica.read())[0] == written.revision
    assert written.models.keys() == {"b"}


async def test_concurrent_writes_of_replicas_are_all_kept(store, replica):
    """A write that raced with another is made again on top of it."""
    await asyncio.gather(*(s.update(putting(f"m{n}-{i}")) for n in range(10) for i, s in enumerate((store, replica))))

    assert len((await read_models(store)).models) == 20


async def test_an_edit_that_raises_writes_nothing(store):
    """Its exception comes through as it is."""
    with pytest.raises(NotFound):
        await store.update(lambda book: book.delete("nobody", NOW_MS))
    assert await read_models(store) == ModelBook()


async def test_each_replica_has_one_roster(store, replica):
    """A newer one replaces the older; a forgotten one is gone."""
    roster = Roster(2, (worker(),), {"decode-1": "000-a"})
    await store.write_roster("one", Roster(1, (), {}), announce=False)
    await store.write_roster("one", roster, announce=False)
    await replica.write_roster("two", Roster(1, (), {}), announce=False)
    await store.forget("two")

    assert await replica.read() == (0, {"one": roster})


async def test_announced_rosters_and_models_wake_the_others(store, replica):
    """Well below the wait's own timeout."""
    started_at = time.perf_counter()
    async with store.subscribe() as wait:
        await wait(1.0)  # the confirmation of the subscription
        for write in (replica.write_roster("two", Roster(1, (), {}), announce=True), replica.update(putting("a"))):
            waiting = asyncio.ensure_future(wait(10.0))
            await write
            await waiting

    assert time.perf_counter() - started_at < 5.0


async def test_only_our_keys_are_touched(store, server):
    """All names have our prefix."""
    await store.update(putting("a"))
    await store.write_roster("one", Roster(1, (), {}), announce=True)

    assert server.command("EXISTS", *(f"ifx:{{registry}}:{name}" for name in ("models", "revision", "rosters"))) == ":3"
    assert server.command("DBSIZE") == ":3"


async def test_garbage_is_ignored(store, server):
    """Records and rosters that cannot be read are none."""
    written = await store.update(putting("a"))
    server.command("HSET", "ifx:{registry}:models", "b", "garbage", "c", "{}", "d", '{"name": "e", "capabilities": []}')
    server.command("HSET", "ifx:{registry}:rosters", "x", "garbage")

    assert await read_models(store) == written
    assert await store.read() == (written.revision, {})


async def test_a_server_that_is_gone_hangs_or_holds_other_types_is_unavailable(store, server):
    """Each within the time that one answer may take."""
    started_at = time.perf_counter()
    await store.write_roster("one", Roster(1, (), {}), announce=False)
    with server.paused(), pytest.raises(Unavailable):
        await store.read()
    server.command("SET", "ifx:{registry}:models", "x")
    with pytest.raises(Unavailable):
        await read_models(store)
    server.kill()
    for attempt in (store.read(), store.update(putting("a")), store.forget("one"), _subscribe(store)):
        with pytest.raises(Unavailable):
            await attempt

    assert time.perf_counter() - started_at < 5.0


def pushing(number):
    manifest = Manifest(name="m", version=number)
    return lambda release: release.push(Version.make("ab" * 32, "", manifest.dump(), b"s")[1], NOW_MS)


async def test_releases_and_revoked_keys_are_shared(store, replica):
    """Concurrent pushes are all kept; whatever changes the rules raises their revision."""
    assert await store.rules("m") == (Release(), frozenset(), 0)
    await asyncio.gather(
        *(s.edit_release("m", pushing(2 * n + i)) for n in range(1, 6) for i, s in ((0, store), (1, replica)))
    )
    promoted = await store.edit_release("m", lambda release: release.promote(5, NOW_MS))
    await replica.revoke_key("cd" * 32)
    release, revoked, revision = await replica.rules("m")

    assert release == promoted == await replica.release("m")
    assert [v.version for v in release.versions] == list(range(2, 12))
    assert (release.floor, revoked, revision) == (5, frozenset({"cd" * 32}), 12)
    await store.edit_release("m", lambda release: release.promote(5, NOW_MS))
    assert (await store.rules("m"))[2] == revision


async def test_a_broken_release_is_not_taken_for_none(store, server):
    """The floor would be gone with it."""
    server.command("HSET", "ifx:{registry}:releases", "m", "garbage")
    for attempt in (store.release("m"), store.rules("m"), store.edit_release("m", pushing(1))):
        with pytest.raises(Internal, match="'m'"):
            await attempt


def test_a_bad_url_is_a_configuration_error():
    """And is not repeated: it may hold a password."""
    with pytest.raises(ConfigError) as caught:
        RegistryStore("http://:password@host")

    assert "password" not in caught.value.message


async def _subscribe(store):
    async with store.subscribe():
        pass
