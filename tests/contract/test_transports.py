"""What every KV transport promises to its readers: one suite, over both, with the arena in another process."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from inferflux.errors import KvDigestMismatch, KvError, KvStale, KvUnreachable
from inferflux.kv import nixl
from inferflux.kv.arena import Bytes
from inferflux.kv.digests import block_digest
from inferflux.kv.transport import Reader, Readers, copy_blocks
from inferflux.types import Transport
from tests.support.arena_owner import SLOT_BYTES, ArenaOwner, arena_owner

# Of what a dead or stopped owner may cost its readers.
DEADLINE_S = nixl.STALL_S + 3


@pytest.fixture(autouse=True)
def over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the path that hosts without RDMA have; alone on one host UCX would let the kernel copy."""
    monkeypatch.setenv("UCX_TLS", "tcp,self")


@pytest.fixture
def owner() -> Iterator[ArenaOwner]:
    with tempfile.TemporaryDirectory(prefix="ifx-") as directory, arena_owner(Path(directory)) as owner:
        yield owner


@pytest.fixture
def readers() -> Iterator[Readers]:
    readers = Readers()
    yield readers
    readers.close()


@pytest.fixture(params=list(Transport))
def transport(request: pytest.FixtureRequest) -> Transport:
    return request.param


@pytest.fixture
def reader(owner: ArenaOwner, readers: Readers, transport: Transport) -> Reader:
    return readers.get(owner.path(transport))


class Blocks:
    """Where an engine would put what it reads."""

    def __init__(self, num: int) -> None:
        self.bytes = np.zeros((num, SLOT_BYTES), np.uint8)
        self.num_put = 0

    def put(self, i: int, block: Bytes) -> bytes:
        self.bytes[i] = block
        self.num_put += 1
        return block_digest([self.bytes[i]])


def copied(reader: Reader, owner: ArenaOwner, index: slice = slice(None)) -> Blocks:
    """Copy some of the owner's blocks as a decode worker does."""
    blocks = Blocks(len(owner.slots[index]))
    copy_blocks(reader, owner.slots[index], owner.generations[index], owner.digests[index], blocks.put)
    return blocks


@pytest.mark.parametrize(
    "index",
    [slice(None), slice(3, 4), slice(0, 0), slice(0, None, 2), slice(None, None, -1)],
    ids=["all", "one", "none", "every second", "backwards"],
)
def test_blocks_arrive_whole_and_in_order(reader: Reader, owner: ArenaOwner, index: slice) -> None:
    """Also when they do not follow each other in the arena, and when they fill many windows."""
    blocks = copied(reader, owner, index)

    assert blocks.num_put == len(owner.slots[index])
    assert [block_digest([block]) for block in blocks.bytes] == list(owner.digests[index])


def test_a_reader_knows_the_arenas_shape(reader: Reader, owner: ArenaOwner) -> None:
    assert reader.slot_bytes == SLOT_BYTES
    assert reader.num_slots >= len(owner.slots)


def test_a_corrupted_block_is_refused(reader: Reader, owner: ArenaOwner) -> None:
    """One bit is enough; the path stays usable."""
    owner.tell("corrupt", owner.slots[150])

    with pytest.raises(KvDigestMismatch):
        copied(reader, owner)

    assert copied(reader, owner, slice(0, 150)).num_put == 150


def test_a_freed_slot_is_refused(reader: Reader, owner: ArenaOwner) -> None:
    """Its generation says so, even while its bytes are still what they were."""
    owner.tell("free", owner.slots[7])

    with pytest.raises(KvStale):
        copied(reader, owner, slice(5, 10))

    assert copied(reader, owner, slice(8, 20)).num_put == 12


def test_a_slot_that_is_freed_while_it_is_read_is_refused(reader: Reader, owner: ArenaOwner) -> None:
    """Generations are looked at before and after: the ticket was not live all the time."""
    blocks = Blocks(len(owner.slots))

    def put(i: int, block: Bytes) -> bytes:
        if i == 100:
            owner.tell("free", owner.slots[0])
        return blocks.put(i, block)

    with pytest.raises(KvStale):
        copy_blocks(reader, owner.slots, owner.generations, owner.digests, put)


def test_a_slot_that_changes_while_others_are_read_is_refused(reader: Reader, owner: ArenaOwner) -> None:
    """What counts is what was copied, not what was there when the reading began."""
    blocks = Blocks(len(owner.slots))

    def put(i: int, block: Bytes) -> bytes:
        if i == 0:
            owner.tell("refill", owner.slots[199])
        return blocks.put(i, block)

    with pytest.raises(KvDigestMismatch):
        copy_blocks(reader, owner.slots, owner.generations, owner.digests, put)


@pytest.mark.parametrize("slot", [-1, 1 << 20])
def test_slots_outside_the_arena_are_refused(reader: Reader, slot: int) -> None:
    """A ticket of another arena must not make us read beyond this one."""
    with pytest.raises(KvStale):
        reader.check((slot,), (0,))


def test_two_threads_read_at_once(reader: Reader, owner: ArenaOwner) -> None:
    """The simulated engine has two; neither sees the other's blocks."""
    results: list[Blocks] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(copied(reader, owner, slice(n, None, 2)))) for n in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)

    assert sum(blocks.num_put for blocks in results) == len(owner.slots)


def test_an_owner_killed_in_the_middle_costs_an_error_at_most(
    owner: ArenaOwner, readers: Readers, transport: Transport
) -> None:
    """Mapped memory outlives its owner; a connection does not, and its reader hears of it at once."""
    reader, blocks = readers.get(owner.path(transport)), Blocks(len(owner.slots))

    def put(i: int, block: Bytes) -> bytes:
        if i == 5:
            owner.process.kill()
            owner.process.wait()
        return blocks.put(i, block)

    started_at = time.monotonic()
    if transport is Transport.SHM:
        copy_blocks(reader, owner.slots, owner.generations, owner.digests, put)
        assert blocks.num_put == len(owner.slots)
    else:
        with pytest.raises(KvUnreachable):
            copy_blocks(reader, owner.slots, owner.generations, owner.digests, put)
    assert time.monotonic() - started_at < DEADLINE_S


def test_a_stopped_owner_costs_no_more_than_the_deadline(owner: ArenaOwner, readers: Readers) -> None:
    """It holds its connections and answers nothing."""
    path = owner.path(Transport.NIXL)
    reader = readers.get(path)
    copied(reader, owner, slice(0, 1))
    os.kill(owner.process.pid, signal.SIGSTOP)
    started_at = time.monotonic()
    with pytest.raises(KvUnreachable):
        copied(reader, owner)
    assert time.monotonic() - started_at < DEADLINE_S

    readers.drop(path)
    os.kill(owner.process.pid, signal.SIGKILL)  # going on it may end anyway: see ADR 8


def test_failures_leak_nothing(owner: ArenaOwner, readers: Readers, transport: Transport) -> None:
    """Opening, failing and dropping over and over leaves no descriptors and no registered memory behind."""
    path = owner.path(transport)
    owner.tell("corrupt", owner.slots[3])

    def fail() -> None:
        with pytest.raises(KvDigestMismatch):
            copied(readers.get(path), owner)
        readers.drop(path)

    fail()
    num_fds, resident = _num_fds(), _resident_bytes()
    for _ in range(10):
        fail()

    assert _num_fds() <= num_fds
    assert _resident_bytes() - resident < 2 * 2 * nixl.WINDOW_BYTES


def test_a_new_start_of_the_owner_is_read_anew(readers: Readers, transport: Transport) -> None:
    """The reader of the dead one is closed, so that nothing of it stays."""
    with tempfile.TemporaryDirectory(prefix="ifx-") as directory:
        with arena_owner(Path(directory)) as first:
            old = readers.get(first.path(transport))
            assert readers.get(first.path(transport)) is old
        readers.drop(first.path(transport))
        with arena_owner(Path(directory)) as second:
            new = readers.get(second.path(transport))

            assert new is not old
            assert copied(new, second).num_put == len(second.slots)
            with pytest.raises(KvError):
                copied(old, first)


def test_arenas_that_nobody_reads_any_more_are_let_go(
    readers: Readers, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers whose ids never come back would hold memory and connections for ever."""
    monkeypatch.setattr("inferflux.kv.transport.UNUSED_S", 0.0)
    with tempfile.TemporaryDirectory(prefix="ifx-") as directory, arena_owner(Path(directory)) as owner:
        path = owner.path(transport)
        gone = readers.get(path)
        assert readers.get(path) is gone

        readers.get(replace(path, worker_id="prefill-1"))
        with pytest.raises(KvError):
            copied(gone, owner)


def test_an_owner_that_only_listens_uses_no_cpu(owner: ArenaOwner, readers: Readers) -> None:
    """NIXL's own threads would turn a core into heat; a busy owner polls a few thousand times a second at most."""
    copied(readers.get(owner.path(Transport.NIXL)), owner)
    before = _cpu_s(owner.process.pid)
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        copied(readers.get(owner.path(Transport.NIXL)), owner, slice(0, 1))
        threading.Event().wait(0.2)

    assert _cpu_s(owner.process.pid) - before < 0.6


def _num_fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
