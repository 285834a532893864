from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferflux.errors import ArenaFull, ConfigError, KvStale, KvUnreachable
from inferflux.kv.arena import PAGE, TABLE, VERSION, Arena, ArenaReader, Layout
from inferflux.kv.digests import block_digest
from tests.support.children import forked

SLOT_BYTES = 5000
MIB = 1 << 20


@pytest.fixture
def arena() -> Iterator[Arena]:
    with closing(Arena.create(MIB)) as arena:
        arena.format(SLOT_BYTES)
        yield arena


@pytest.fixture
def sealed(arena: Arena) -> Arena:
    arena.seal()
    return arena


def in_new_process(code: str, fd: int) -> str:
    """Run `code` in a new interpreter that was passed `fd`, and return what it printed."""
    args = [sys.executable, "-c", f"import ctypes, fcntl, mmap, os\nfd = {fd}\n" + textwrap.dedent(code)]
    return subprocess.run(args, pass_fds=[fd], capture_output=True, text=True, check=True, timeout=30).stdout.strip()


# -- layout ---------------------------------------------------------------------------------------------------------


@given(num_bytes=st.integers(0, 64 * MIB), slot_bytes=st.integers(1, 4 * MIB))
def test_the_layout_fills_the_arena_and_no_more(num_bytes: int, slot_bytes: int) -> None:
    """As many slots as fit; one more would not."""
    try:
        layout = Layout.fit(num_bytes, slot_bytes)
    except ArenaFull:
        assert Layout(slot_bytes, 1).end > num_bytes
        return

    assert layout.end <= num_bytes
    assert Layout(slot_bytes, layout.num_slots + 1).end > num_bytes
    assert layout.data_at >= PAGE + layout.num_slots * TABLE.itemsize


def test_slots_are_aligned_to_pages_and_do_not_overlap(arena: Arena) -> None:
    """A slot's bytes are its own, and vector copies start on a page."""
    addresses = [arena.slot(i).ctypes.data for i in range(arena.num_slots)]

    assert all(address % PAGE == 0 for address in addresses)
    assert all(arena.slot(i).nbytes == SLOT_BYTES for i in range(arena.num_slots))
    assert min(b - a for a, b in pairwise(addresses)) >= SLOT_BYTES


def test_memory_is_there_before_the_first_request() -> None:
    """Every page is allocated and mapped at start: no page faults on a request's path, no surprise when memory ends."""
    with closing(Arena.create(4 * MIB)) as arena:
        assert os.fstat(arena.fd).st_blocks * 512 == 4 * MIB
        assert _resident_bytes(arena.fd) == 4 * MIB


def _resident_bytes(fd: int) -> int:
    inode = str(os.fstat(fd).st_ino)
    lines = Path("/proc/self/smaps").read_text(encoding="ascii").splitlines()
    start = next(i for i, line in enumerate(lines) if "inferflux-arena" in line and inode in line.split())
    return 1024 * next(int(line.split()[1]) for line in lines[start:] if line.startswith("Rss:"))


def test_memory_that_is_not_there_is_a_clear_error_at_start() -> None:
    """One line for the operator, no signal, and nothing left open."""

    def poor(test: Connection) -> None:
        fds = _num_fds()
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))
        for num_bytes in (2 * MIB, 0, -1):
            with pytest.raises(ConfigError, match=f"arena of {num_bytes} bytes"):
                Arena.create(num_bytes)
        Arena.create(MIB).close()
        assert _num_fds() == fds

    with forked(poor):
        pass


def _num_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_an_arena_is_empty_before_it_is_formatted() -> None:
    """The frontend may ask while the engine still loads its model."""
    with closing(Arena.create(MIB)) as arena:
        assert (arena.is_formatted, arena.num_slots, arena.slot_bytes, arena.num_free) == (False, 0, 0, 0)
        assert arena.published() == []
        with pytest.raises(KvUnreachable):
            arena.slot(0)


def test_an_arena_is_formatted_once(arena: Arena) -> None:
    """A second format would move slots under their readers."""
    with pytest.raises(ValueError, match="already"):
        arena.format(SLOT_BYTES)


@pytest.mark.parametrize("slot_bytes", [0, -1, MIB])
def test_an_arena_without_room_for_one_slot_is_refused(slot_bytes: int) -> None:
    """Better no arena than one that is always full."""
    with closing(Arena.create(MIB)) as arena, pytest.raises(ArenaFull):
        arena.format(slot_bytes)


# -- slots ----------------------------------------------------------------------------------------------------------


def test_a_slot_goes_round_its_life(arena: Arena) -> None:
    """Free, owned, published, free; the generation tells that it was free in between."""
    (slot,) = arena.allocate(1)
    arena.slot(slot)[:] = 7
    digest = block_digest([arena.slot(slot)])
    arena.set_digest(slot, digest)
    arena.publish([slot], now_ns=42)

    assert arena.published() == [(slot, 42)]
    assert arena.digest(slot) == digest
    assert (arena.num_free, arena.generation(slot)) == (arena.num_slots - 1, 0)

    arena.free([slot])

    assert arena.published() == []
    assert (arena.num_free, arena.generation(slot)) == (arena.num_slots, 1)


def test_a_full_arena_refuses_and_takes_nothing(arena: Arena) -> None:
    """A prompt gets all its slots or none."""
    arena.allocate(arena.num_slots - 2)

    with pytest.raises(ArenaFull, match="3 slots wanted, 2 of"):
        arena.allocate(3)
    assert arena.num_free == 2


def test_freed_slots_are_used_again_as_late_as_possible(arena: Arena) -> None:
    """A late reader finds its bytes untouched for one more round of the arena."""
    first = arena.allocate(3)
    arena.free(first)
    rest = arena.allocate(arena.num_slots - 3)

    assert set(rest).isdisjoint(first)
    assert sorted(arena.allocate(3)) == sorted(first)


def test_unpublished_slots_may_be_freed_by_the_allocator(arena: Arena) -> None:
    """An aborted prefill leaves nothing behind."""
    arena.free(arena.allocate(5))

    assert arena.num_free == arena.num_slots


def test_a_slot_is_freed_once(arena: Arena) -> None:
    """A second free could hit the slot's next owner; it fails and changes nothing."""
    slots = arena.allocate(2)
    arena.free(slots[:1])

    for wrong in (slots, [slots[1], slots[1]]):
        with pytest.raises(ValueError, match="not all in use"):
            arena.free(wrong)
    assert arena.num_free == arena.num_slots - 1
    assert arena.generations(slots) == (1, 0)


def test_only_owned_slots_are_published(arena: Arena) -> None:
    """Neither free nor published slots can be handed over."""
    (slot,) = arena.allocate(1)
    arena.publish([slot])

    for wrong in (slot, slot + 1):
        with pytest.raises(ValueError, match="not all owned"):
            arena.publish([wrong])


@pytest.mark.parametrize("slot", [-1, 10**6])
def test_slots_outside_the_arena_do_not_exist(arena: Arena, slot: int) -> None:
    """Least of all counted from the end."""
    for call in (arena.slot, arena.generation, arena.digest):
        with pytest.raises(IndexError):
            call(slot)
    for many in (arena.free, arena.publish):
        with pytest.raises(IndexError):
            many([slot])


def test_no_slots_are_no_trouble(arena: Arena) -> None:
    """A prompt without whole blocks needs none."""
    assert arena.allocate(0) == ()
    arena.publish(())
    arena.free(())
    assert arena.num_free == arena.num_slots


def test_views_outlive_the_arena() -> None:
    """Closing while a copy runs must not crash the process."""
    arena = Arena.create(MIB)
    arena.format(SLOT_BYTES)
    view = arena.slot(3)
    view[:] = 9
    arena.close()
    arena.close()

    assert view.sum() == 9 * SLOT_BYTES
    assert not arena.is_formatted


# -- processes ------------------------------------------------------------------------------------------------------


def test_a_forked_engine_formats_writes_and_goes_on_writing_after_the_seal() -> None:
    """The engine attaches by descriptor number before the seal; the frontend sees all of it without a copy."""

    def engine(frontend: Connection) -> None:
        mine = Arena.attach(arena.fd)
        frontend.send(mine.format(SLOT_BYTES))
        assert frontend.recv() == "sealed"
        slots = mine.allocate(2)
        for slot in slots:
            mine.slot(slot)[:] = slot + 1
            mine.set_digest(slot, block_digest([mine.slot(slot)]))
        mine.publish(slots)

    with closing(Arena.create(MIB)) as arena:
        with forked(engine) as child:
            assert child.recv() == arena.num_slots
            arena.seal()
            child.send("sealed")

        assert [slot for slot, _ in arena.published()] == [0, 1]
        assert all(arena.digest(slot) == block_digest([arena.slot(slot)]) for slot in (0, 1))
        arena.free((0, 1))
        assert arena.num_free == arena.num_slots


def test_frees_of_one_process_feed_the_allocations_of_another() -> None:
    """Two real processes, no locks: thousands of hand-overs, every block whole, nothing lost."""
    rounds, per_round = 500, 7

    def engine(frontend: Connection) -> None:
        mine = Arena.attach(arena.fd)
        for n in range(rounds):
            slots = _allocate_when_free(mine, per_round)
            for slot in slots:
                mine.slot(slot)[:] = (n + slot) % 256
                mine.set_digest(slot, block_digest([mine.slot(slot)]))
            mine.publish(slots)
            frontend.send(slots)

    with closing(Arena.create(40 * PAGE)) as arena:
        arena.format(SLOT_BYTES)
        with forked(engine) as child:
            for n in range(rounds):
                slots = child.recv()
                assert arena.are_published(slots)
                assert all((arena.slot(slot) == (n + slot) % 256).all() for slot in slots)
                assert all(arena.digest(slot) == block_digest([arena.slot(slot)]) for slot in slots)
                arena.free(slots)

        assert arena.num_free == arena.num_slots
        assert sum(arena.generations(range(arena.num_slots))) == rounds * per_round


def _allocate_when_free(arena: Arena, n: int) -> tuple[int, ...]:
    deadline = time.monotonic() + 20
    while arena.num_free < n and time.monotonic() < deadline:
        os.sched_yield()
    return arena.allocate(n)


def test_an_arena_has_no_name() -> None:
    """Nobody can open it by guessing, and the kernel takes it back with its last user, killed or not."""
    with closing(Arena.create(MIB)) as arena:
        assert os.fstat(arena.fd).st_nlink == 0
        assert not os.get_inheritable(arena.fd)


# -- the seal -------------------------------------------------------------------------------------------------------


def test_another_process_cannot_get_at_a_sealed_arena_for_writing(sealed: Arena) -> None:
    """Whatever a reader tries with the descriptor it was given, the kernel says no."""
    out = in_new_process(
        """
        size = os.fstat(fd).st_size
        libc = ctypes.CDLL(None, use_errno=True)
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        reader = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
        view = (ctypes.c_char * size).from_buffer_copy(reader)
        base = next(int(l.split("-")[0], 16) for l in open("/proc/self/maps") if "inferflux-arena" in l)
        attempts = {
            "map": lambda: mmap.mmap(fd, size),
            "map again": lambda: mmap.mmap(again, size),
            "write": lambda: os.pwrite(fd, b"x", 0),
            "grow": lambda: os.ftruncate(fd, size + 4096),
            "shrink": lambda: os.ftruncate(fd, 0),
            "punch": lambda: libc.fallocate(fd, 3, 0, ctypes.c_long(4096)) and fail(),
            "protect": lambda: libc.mprotect(ctypes.c_void_p(base), 4096, 3) and fail(),
            "unseal": lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0),
        }
        def fail():
            raise OSError(ctypes.get_errno(), "")
        for name, attempt in attempts.items():
            try:
                attempt()
                print(name, "WORKED")
            except (PermissionError, BlockingIOError):
                print(name, "refused")
        """,
        sealed.fd,
    )

    names = ("map", "map again", "write", "grow", "shrink", "punch", "protect", "unseal")
    assert out.splitlines() == [f"{name} refused" for name in names]


def test_nobody_attaches_after_the_seal(sealed: Arena) -> None:
    """Not even the worker itself; so the engine must be there before."""
    with pytest.raises(PermissionError):
        Arena.attach(sealed.fd)
    sealed.seal()  # again: no error
    assert sealed.is_sealed


def test_a_private_copy_of_a_reader_does_not_reach_the_arena(sealed: Arena) -> None:
    """Copy-on-write mappings stay possible and harmless."""
    in_new_process("m = mmap.mmap(fd, 0, mmap.MAP_PRIVATE); m[8192:8200] = b'x' * 8", sealed.fd)

    assert not sealed.slot(0)[:8].any()


# -- readers --------------------------------------------------------------------------------------------------------


def test_a_reader_sees_what_is_written_later_but_cannot_write(sealed: Arena) -> None:
    """One mapping serves a worker's whole life."""
    with closing(ArenaReader.open(sealed.fd)) as reader:
        sealed.slot(2)[:] = 5

        assert (reader.num_slots, reader.slot_bytes) == (sealed.num_slots, SLOT_BYTES)
        assert (reader.slot(2) == 5).all()
        assert not reader.slot(2).flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            reader.slot(2)[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            reader.slot(2).flags.writeable = True


def test_a_reader_notices_a_slot_that_was_freed(sealed: Arena) -> None:
    """Stale blocks are found before they are copied, and told from torn ones."""
    slots = sealed.allocate(3)
    sealed.publish(slots)
    generations = sealed.generations(slots)
    with closing(ArenaReader.open(sealed.fd)) as reader:
        reader.check(slots, generations)
        sealed.free(slots[1:2])

        with pytest.raises(KvStale, match=f"slot {slots[1]}"):
            reader.check(slots, generations)
        with pytest.raises(KvStale):
            reader.check((sealed.num_slots,), (0,))


def test_a_torn_copy_has_another_digest(sealed: Arena) -> None:
    """Whoever hashes the copy, not the slot, sees exactly what it would use."""
    (slot,) = sealed.allocate(1)
    sealed.slot(slot)[:] = 1
    digest = block_digest([sealed.slot(slot)])
    with closing(ArenaReader.open(sealed.fd)) as reader:
        copy = np.empty(SLOT_BYTES, np.uint8)
        np.copyto(copy[: SLOT_BYTES // 2], reader.slot(slot)[: SLOT_BYTES // 2])
        sealed.slot(slot)[:] = 2  # the next owner
        np.copyto(copy[SLOT_BYTES // 2 :], reader.slot(slot)[SLOT_BYTES // 2 :])

        assert block_digest([copy]) != digest


def test_an_unsealed_arena_is_not_read(arena: Arena) -> None:
    """Its owner could cut it short under the reader, which would kill the reader (SIGBUS)."""
    with pytest.raises(KvUnreachable, match="sealed"):
        ArenaReader.open(arena.fd)


def test_an_unformatted_arena_is_not_read() -> None:
    """A worker serves its arena only once its engine runs."""
    with closing(Arena.create(MIB)) as arena:
        arena.seal()
        with pytest.raises(KvUnreachable, match="formatted"):
            ArenaReader.open(arena.fd)


def test_something_else_is_not_read() -> None:
    """Pipes and files are no arenas."""
    read_fd, write_fd = os.pipe()
    try:
        with pytest.raises(KvUnreachable):
            ArenaReader.open(read_fd)
    finally:
        os.close(read_fd)
        os.close(write_fd)


@pytest.mark.parametrize(
    ("field", "value"), [("version", VERSION + 1), ("slot_bytes", 2**40), ("slot_bytes", 0), ("num_slots", 10**9)]
)
def test_a_header_that_lies_is_refused(arena: Arena, field: str, value: int) -> None:
    """The size that counts is the kernel's, not the header's."""
    arena._header[field] = value
    arena.seal()

    with pytest.raises(KvUnreachable):
        ArenaReader.open(arena.fd)


def test_a_header_that_changes_later_does_not_move_the_views(sealed: Arena) -> None:
    """It was read once, when the reader opened."""
    with closing(ArenaReader.open(sealed.fd)) as reader:
        sealed._header["num_slots"] = 10**9

        assert reader.num_slots < 10**9
        with pytest.raises(IndexError):
            reader.slot(10**8)
