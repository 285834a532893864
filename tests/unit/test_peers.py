"""Looking for prefixes in the arenas of other workers on this host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from inferflux.errors import KvStale, KvUnreachable
from inferflux.kv import shm
from inferflux.kv.arena import PAGE, Arena
from inferflux.kv.digests import block_digest, block_hashes, prefix_root
from inferflux.kv.peers import Peers
from inferflux.kv.prefixes import Place, PrefixStore
from inferflux.kv.shm import ArenaServer
from inferflux.types import ModelFingerprint

SIZE = 4
ROOT = prefix_root(ModelFingerprint("ab" * 32, "float32", "sim/1", SIZE), "salt")
TOKENS = list(range(1, 14))
HASHES = block_hashes(ROOT, TOKENS, SIZE)


@asynccontextmanager
async def worker(
    directory: Path, name: str, incarnation: str = "one", slot_bytes: int = PAGE
) -> AsyncIterator[PrefixStore]:
    """An arena that is served, with the store of its owner."""
    arena, path = Arena.create(32 * PAGE), directory / f"{name}.arena.sock"
    arena.format(slot_bytes)
    store = PrefixStore(arena, Place(str(path), incarnation))
    arena.seal()
    server = ArenaServer(arena, path, incarnation)
    await server.start()
    try:
        yield store
    finally:
        await server.close()
        arena.close()


def publish(store: PrefixStore, num_tokens: int = len(TOKENS)) -> tuple[int, ...]:
    """Leave a prompt's blocks in an arena."""
    arena = store._arena
    opening = store.open(HASHES[: num_tokens // SIZE], num_tokens, SIZE)
    slots = arena.allocate(opening.num_new)
    for slot in slots:
        arena.slot(slot)[:] = slot
        arena.set_digest(slot, block_digest([arena.slot(slot)]))
    arena.publish(slots)
    store.settle(opening)
    store.adopt(slots, opening.hashes)
    store.release(slots)
    return slots


@pytest.fixture
async def peers(tmp_path: Path) -> AsyncIterator[Peers]:
    peers = Peers(tmp_path / "me.arena.sock", PAGE)
    yield peers
    peers.close()


async def test_a_run_says_where_and_what_it_is(tmp_path: Path, peers: Peers) -> None:
    """Enough to read it and to check what was read."""
    async with worker(tmp_path, "other") as store:
        await asyncio.to_thread(peers.refresh)
        assert peers.find(HASHES, 0) is None
        slots = publish(store)[:3]
        run = peers.find(HASHES, 0)

        assert run is not None
        assert run == store.run(Place(str(tmp_path / "other.arena.sock"), "one"), slots)
        reader = await asyncio.to_thread(shm.fetch, run.place.socket_path, run.place.incarnation, 1.0)
        reader.check(run.slots, run.generations)
        assert [block_digest([reader.slot(slot)]) for slot in run.slots] == list(run.digests)


async def test_only_more_than_what_is_here_is_worth_reading(tmp_path: Path, peers: Peers) -> None:
    """And the longest run of all arenas."""
    async with worker(tmp_path, "short") as short, worker(tmp_path, "long") as long:
        await asyncio.to_thread(peers.refresh)
        publish(short, 2 * SIZE)
        publish(long, 3 * SIZE)

        assert [run and len(run.slots) for run in (peers.find(HASHES, n) for n in range(4))] == [3, 3, 3, None]
        assert peers.find(HASHES[:1], 1) is None


async def test_evicted_blocks_are_not_found_and_stale_for_those_who_found_them(tmp_path: Path, peers: Peers) -> None:
    """Between a look and a read anything may happen."""
    async with worker(tmp_path, "other") as store:
        await asyncio.to_thread(peers.refresh)
        publish(store)
        run = peers.find(HASHES, 0)
        assert run is not None
        store.open((), store._arena.num_slots * SIZE, SIZE)

        assert peers.find(HASHES, 0) is None
        reader = await asyncio.to_thread(shm.fetch, run.place.socket_path, run.place.incarnation, 1.0)
        with pytest.raises(KvStale):
            reader.check(run.slots, run.generations)


async def test_arenas_come_restart_and_go(tmp_path: Path, peers: Peers) -> None:
    """Also ones whose socket is left behind, and ones that hold blocks of another size."""
    async with AsyncExitStack() as stack:
        other = AsyncExitStack()
        await stack.enter_async_context(worker(tmp_path, "me"))
        await stack.enter_async_context(worker(tmp_path, "another-model", slot_bytes=PAGE // 2))
        await other.enter_async_context(worker(tmp_path, "other"))
        (tmp_path / "left-behind.arena.sock").touch()
        await asyncio.to_thread(peers.refresh)
        assert peers.num_arenas == 1

        await other.aclose()
        publish(await stack.enter_async_context(worker(tmp_path, "other", "two")))
        await asyncio.to_thread(peers.refresh)
        run = peers.find(HASHES, 0)
        assert run is not None
        assert run.place.incarnation == "two"
    await asyncio.to_thread(peers.refresh)
    assert peers.num_arenas == 0


async def test_a_server_says_who_it_is(tmp_path: Path) -> None:
    """So that one can ask for its arena; nobody there is unreachable."""
    async with worker(tmp_path, "other", "seven"):
        assert await asyncio.to_thread(shm.identify, tmp_path / "other.arena.sock", 1.0) == "seven"
    with pytest.raises(KvUnreachable):
        await asyncio.to_thread(shm.identify, tmp_path / "other.arena.sock", 1.0)
