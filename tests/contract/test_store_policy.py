"""What the policy service relies on from its store, on every Redis-protocol server found here."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from inferflux.clock import ManualClock
from inferflux.errors import ConfigError, NotFound, PolicyPersistFailed, Unavailable
from inferflux.policy.identity import Scope
from services.policy.book import KeyBook
from services.policy.history import draft, encode_revision
from services.policy.keeper import Keeper
from services.policy.keys import encode_key, new_key
from services.policy.pepper import Pepper
from services.policy.store import PolicyStore
from services.policy.vault import Vault
from tests.support.redis_server import RedisServer, redis_binaries

PEPPER = Pepper(b"p" * 32)
VAULT = Vault([b"v" * 32])
NAME = "ifx:{policy}:keys:"
NOW_MS = 1_700_000_000_000
SOON_S = 5.0


@pytest.fixture(params=sorted(redis_binaries()))
def server(request):
    with RedisServer(redis_binaries()[request.param]) as running:
        yield running


@pytest.fixture
async def store(server):
    async with PolicyStore(server.url, VAULT) as opened:
        yield opened


@pytest.fixture
async def replica(server):
    async with PolicyStore(server.url, VAULT) as opened:
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

    assert time.perf_counter() - started_at < SOON_S


async def test_only_our_keys_are_touched_and_no_secret_is_among_them(store, server):
    """All names have our prefix, and the AOF has hashes only."""
    await store.update(adding(1))
    await store.update(adding(2))
    await store.update(lambda book: book.revoke(key(1).key_id, NOW_MS))

    assert server.command("EXISTS", "ifx:{policy}:keys", "ifx:{policy}:revision", "ifx:{policy}:revoked") == ":3"
    assert server.command("DBSIZE") == ":4"
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
    foreign, empty = Vault([b"q" * 32]).seal(NAME + "key_y", "{}"), VAULT.seal(NAME + "key_z", "[]")
    moved = VAULT.seal(NAME + key(2).key_id, encode_key(key(2)))
    poison = "key_x", "garbage", "key_y", foreign, "key_z", empty, "key_w", moved
    server.command("HSET", "ifx:{policy}:keys", *poison)

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
    assert time.perf_counter() - started_at < SOON_S


async def test_a_server_that_hangs_is_unavailable_soon(store, server):
    """A stopped process keeps its connections open and answers nothing."""
    await store.update(adding(1))
    started_at = time.perf_counter()

    with server.paused(), pytest.raises(Unavailable):
        await store.update(adding(2))
    assert time.perf_counter() - started_at < SOON_S


async def test_a_value_of_the_wrong_type_is_unavailable_not_a_crash(store, server):
    """Someone else's data under our name."""
    server.command("SET", "ifx:{policy}:keys", "x")

    with pytest.raises(Unavailable):
        await read(store)


DOCUMENT = b'{"audit":{"sample":0.5}}'


def applying(document=DOCUMENT):
    return lambda book: book.apply(draft(document, "key_1", "canary-of-the-reason"), NOW_MS)


async def test_nothing_can_be_read_in_the_store(store, server):
    """Neither documents nor reasons nor names of keys, in memory or on disk."""
    await store.update(applying())
    await store.update(lambda book: book.add(new_key("s" * 9, PEPPER, name="canary", scopes=Scope, now_ms=1), NOW_MS))
    files = b"".join(f.read_bytes() for f in server.socket_path.parent.rglob("*.aof"))

    assert b"revisions" in files
    for text in (b"audit", b"canary", b"scopes"):
        assert text not in files


async def test_records_are_encrypted_anew_with_the_first_key_of_the_ring(server, store):
    """Keys, revisions and the seal; the book and its revision stay as they are; then the old key is not needed."""
    await store.update(adding(1))
    written = await store.update(applying())
    old, new = b"v" * 32, b"w" * 32
    async with PolicyStore(server.url, Vault([new, old])) as rotating:
        assert await read(rotating) == written
    async with PolicyStore(server.url, Vault([new])) as rotated:
        assert await read(rotated) == written
        assert await rotated.revision() == written.revision


async def test_a_change_that_failed_and_was_taken_all_the_same_is_taken_back(server, store, replica):
    """As soon as that is seen; a change that never got there leaves nothing to take back."""
    keeper, other = (Keeper(s, ManualClock(NOW_MS / 1000), []) for s in (store, replica))
    await keeper.refresh()
    first = await keeper.apply(lambda _: draft(b"{}", "a", ""), None)
    taken = await other.apply(lambda _: draft(DOCUMENT, "b", ""), None)
    keeper._abandoned.add(taken.revision)  # its own write, whose answer was lost
    server.kill()
    with pytest.raises(PolicyPersistFailed):
        await keeper.apply(lambda _: draft(DOCUMENT, "a", ""), None)
    server.start()
    await keeper.refresh()
    await other.refresh()

    live = keeper.book().history.live
    assert (live.document, live.author) == (first.document, "policy")
    assert str(taken.revision) in live.reason
    assert other.book() == keeper.book()


async def test_a_revocation_that_was_taken_out_is_noticed_and_one_that_was_put_in_is_not_damage(server, store):
    """A restored backup may know of more revocations than its seal."""
    await store.update(adding(1))
    await store.update(lambda book: book.revoke(key(1).key_id, NOW_MS))
    server.command("SADD", "ifx:{policy}:revoked", "key_2")
    assert (await read(store)).damage == ""
    server.command("SREM", "ifx:{policy}:revoked", key(1).key_id)

    assert "revocation" in (await store.update(lambda book: book)).damage


@pytest.mark.parametrize("attack", ["change", "cut", "swap", "seal", "foreign seal", "old"])
async def test_a_poisoned_policy_is_repaired_by_who_knows_it_and_used_by_nobody(server, store, replica, attack):
    """A service that has just started publishes nothing, rather than an older policy or none."""
    keeper = Keeper(store, ManualClock(NOW_MS / 1000), [])
    await keeper.apply(lambda _: draft(b"{}", "a", ""), None)
    first = str(keeper.book().history.live.revision)
    await keeper.apply(lambda _: draft(DOCUMENT, "a", ""), None)
    newest = str(keeper.book().history.live.revision)
    poison(server, attack, first, newest)
    fresh = Keeper(replica, ManualClock(NOW_MS / 1000), [])

    with pytest.raises(Unavailable, match="policy store"):
        await fresh.refresh()
    assert fresh.feed.revision == 0
    with pytest.raises(PolicyPersistFailed):
        await fresh.apply(lambda _: draft(b"{}", "a", ""), None)
    await keeper.change(lambda book: book)
    await fresh.refresh()
    assert fresh.book().history.live.document == DOCUMENT


def poison(server, attack, first, newest):
    revisions, seal = "ifx:{policy}:revisions", "ifx:{policy}:seal"
    old = VAULT.seal(f"{revisions}:{first}", encode_revision(replace(draft(b"{}", "a", ""), revision=int(first))))
    match attack:
        case "change":
            assert server.command("HSET", revisions, newest, "v1.0.x") == ":0"
        case "cut":
            assert server.command("HDEL", revisions, newest) == ":1"
        case "swap":
            assert server.command("HSET", revisions, newest, old) == ":0"
        case "seal":
            assert server.command("DEL", seal) == ":1"
        case "foreign seal":
            assert server.command("SET", seal, Vault([b"q" * 32]).seal(seal, f"{newest} {newest}")) == "+OK"
        case "old":
            assert server.command("HDEL", revisions, newest, first) == ":2"


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
        PolicyStore("http://:password@host", VAULT)

    assert "password" not in caught.value.message


async def _subscribe(store):
    async with store.subscribe():
        pass
