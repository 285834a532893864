"""What the policy service relies on from its store, on every Redis-protocol server found here."""

from __future__ import annotations

import asyncio
import time

import pytest

from inferflux.clock import ManualClock
from inferflux.errors import ConfigError, NotFound, Unavailable
from inferflux.policy.identity import Scope
from services.policy.book import KeyBook
from services.policy.keeper import Keeper
from services.policy.keys import new_key
from services.policy.pepper import Pepper
from services.policy.store import PolicyStore
from tests.support.redis_server import RedisServer, redis_binaries

PEPPER = Pepper(b"p" * 32)
NOW_MS = 1_700_000_000_000


@pytest.fixture(params=sorted(redis_binaries()))
def server(request):
    with RedisServer(redis_binaries()[request.param]) as running:
        yield running


@pytest.fixture
async def store(server):
    async with PolicyStore(server.url, PEPPER) as opened:
        yield opened


@pytest.fixture
async def replica(server):
    async with PolicyStore(server.url, PEPPER) as opened:
        yield opened


def key(number=1):
    return new_key(f"ifx_secret-{number}", PEPPER, name="n", scopes=[Scope.READ], now_ms=NOW_MS)


def adding(number):
    return lambda book: book.add(key(number), NOW_MS)


async def read(store):
    return await store.update(lambda book: book)


async def test_an_empty_store_reads_as_the_empty_book(store):
    """Revision 0 means that nobody ever wrote."""
    assert await store.revision() == 0
    assert await read(store) == KeyBook()


async def test_what_one_replica_writes_the_other_reads(store, replica):
    """Keys, revocations and the revision make the round trip."""
    await store.update(adding(1))
    await store.update(adding(2))
    written = await store.update(lambda book: book.revoke(key(1).key_id, NOW_MS))

    assert await read(replica) == written
    assert await replica.revision() == written.revision
    assert written.keys.keys() == {key(2).key_id}


async def test_concurrent_writes_of_replicas_are_all_kept(store, replica):
    """A write that raced with another is made again on top of it."""
    await asyncio.gather(*(s.update(adding(2 * n + i)) for n in range(10) for i, s in enumerate((store, replica))))

    book = await read(store)
    assert len(book.keys) == 20
    assert book.revision >= NOW_MS + 19


async def test_an_edit_that_raises_writes_nothing(store):
    """Its exception comes through as it is."""
    before = await store.update(adding(1))

    with pytest.raises(NotFound):
        await store.update(lambda book: book.revoke("key_nobody", NOW_MS))
    assert await read(store) == before


async def test_a_subscriber_hears_of_a_write_of_another_replica_at_once(store, replica):
    """Well below the wait's own timeout."""
    async with store.subscribe() as wait:
        await wait(1.0)  # the confirmation of the subscription
        started_at = time.perf_counter()
        waiting = asyncio.ensure_future(wait(10.0))
        await replica.update(adding(1))
        await waiting

    assert time.perf_counter() - started_at < 2.0


async def test_only_our_keys_are_touched_and_no_secret_is_among_them(store, server):
    """All names have our prefix, and the AOF has hashes only."""
    await store.update(adding(1))
    await store.update(adding(2))
    await store.update(lambda book: book.revoke(key(1).key_id, NOW_MS))

    assert server.command("EXISTS", "ifx:{policy}:keys", "ifx:{policy}:revision", "ifx:{policy}:revoked") == ":3"
    assert server.command("DBSIZE") == ":3"
    assert b"ifx_secret" not in b"".join(f.read_bytes() for f in server.socket_path.parent.rglob("*.aof"))


async def test_a_book_survives_a_kill_of_the_server(store, server):
    """What was acknowledged is on disk; the same client reconnects."""
    written = await store.update(adding(1))
    server.restart()

    with pytest.raises(Unavailable):  # the broken connection is noticed once
        await read(store)
    assert await read(store) == written


async def test_poisoned_records_are_ignored_and_good_ones_kept(store, server):
    """Garbage, another pepper's record and a record under another id are no keys."""
    written = await store.update(adding(1))
    foreign = Pepper(b"q" * 32).seal("{}")
    server.command("HSET", "ifx:{policy}:keys", "key_x", "garbage", "key_y", foreign, "key_z", PEPPER.seal("[]"))

    assert await read(store) == written


@pytest.mark.parametrize("text", ["x", "", "-5", "1e9", "9" * 19, "9" * 5000])
async def test_a_revision_that_is_none_of_ours_counts_as_missing(store, server, text):
    """The next write repairs it."""
    server.command("SET", "ifx:{policy}:revision", text)

    assert await store.revision() == 0
    assert (await store.update(adding(1))).revision == NOW_MS
    assert await store.revision() == NOW_MS


async def test_a_server_that_is_gone_is_unavailable(store, server):
    """At once, for reads, writes and subscriptions."""
    server.kill()
    started_at = time.perf_counter()

    for attempt in (store.revision(), store.update(adding(1)), _subscribe(store)):
        with pytest.raises(Unavailable):
            await attempt
    assert time.perf_counter() - started_at < 1.0


async def test_a_server_that_hangs_is_unavailable_within_two_seconds(store, server):
    """A stopped process keeps its connections open and answers nothing."""
    await store.update(adding(1))
    started_at = time.perf_counter()

    with server.paused(), pytest.raises(Unavailable):
        await store.update(adding(2))
    assert time.perf_counter() - started_at < 2.0


async def test_a_value_of_the_wrong_type_is_unavailable_not_a_crash(store, server):
    """Someone else's data under our name."""
    server.command("SET", "ifx:{policy}:keys", "x")

    with pytest.raises(Unavailable):
        await read(store)


async def test_the_first_write_of_a_service_registers_its_initial_keys_too(store):
    """Whether an operator's call or the service's own loop reaches the store first."""
    keeper = Keeper(store, ManualClock(NOW_MS / 1000), [key(1)])
    await keeper.change(adding(2))

    assert (await read(store)).keys.keys() == {key(1).key_id, key(2).key_id}


async def test_a_replica_takes_over_what_others_wrote_and_repairs_what_was_lost(store, replica, server):
    """In memory, in the store and in what watchers see, always upwards."""
    ours, theirs = (Keeper(s, ManualClock(NOW_MS / 1000), []) for s in (store, replica))
    await ours.change(adding(1))
    await theirs.change(adding(2))
    await ours.refresh()
    assert ours.book() == theirs.book()

    server.command("FLUSHALL")
    await theirs.change(lambda book: book.revoke(key(1).key_id, NOW_MS))
    server.command("FLUSHALL")
    await ours.refresh()
    await theirs.refresh()
    await ours.refresh()
    assert ours.book() == theirs.book() == await read(store)
    assert ours.book().keys.keys() == {key(2).key_id}
    assert ours.feed.revision == ours.book().revision


def test_a_bad_url_is_a_configuration_error():
    """And is not repeated: it may hold a password."""
    with pytest.raises(ConfigError) as caught:
        PolicyStore("http://:password@host", PEPPER)

    assert "password" not in caught.value.message


async def _subscribe(store):
    async with store.subscribe():
        pass
