"""The arena: host memory of one prefill worker, cut into slots of one KV block each.

A memfd has no name: nothing outlives its last user, nobody can guess it, and a reader that holds it can finish after
the producer's death. The worker's frontend creates the arena, pre-faulted, before its engine process is forked; the
engine attaches by file descriptor number and formats it once it knows the size of a block; then the frontend seals it,
and from there on the kernel refuses every new writable mapping, write and resize. Readers get the descriptor from
inferflux.kv.shm.

    0      header  magic, version, num_slots, slot_bytes, num_pieces
    4096   table   per slot: state, generation, published_ns, digest, block_hash
    ...    data    slots, each at a multiple of 4096

A slot has one owner at any time, and only its owner changes it: the allocator (engine process) FREE -> OWNED ->
PUBLISHED, then the releaser (frontend) PUBLISHED -> FREE; the allocator may also take OWNED back to FREE. So each
transition is one aligned store, without locks; the message that tells the next owner (pipe or socket) orders it.
Freeing bumps the slot's generation and zeroes no data, and the allocator goes round the arena, so that a freed slot is
overwritten as late as possible. A slot whose block may be found again by other requests has its block hash in the
table, from its releaser, until it is freed.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, cast

import numpy as np
import numpy.typing as npt

from inferflux.errors import ArenaFull, ConfigError, KvStale, KvUnreachable
from inferflux.kv.digests import BLOCK_HASH_BYTES, DIGEST_BYTES

PAGE = 4096
VERSION = 3
MAGIC = int.from_bytes(b"IFXARENA", "little")

FREE, OWNED, PUBLISHED = 0, 1, 2

# linux/fcntl.h and linux/mman.h; Python 3.11 does not name them.
F_SEAL_FUTURE_WRITE = 0x10
MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23

# Without these a writer could pull the memory from under a reader (SIGBUS) or let others write.
READER_SEALS = F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
SEALS = READER_SEALS | fcntl.F_SEAL_SEAL

HEADER = np.dtype(
    [("magic", "<u8"), ("version", "<u4"), ("num_slots", "<u4"), ("slot_bytes", "<u8"), ("num_pieces", "<u4")]
)
TABLE = np.dtype(
    [
        ("state", "<u4"),
        ("generation", "<u4"),
        ("published_ns", "<u8"),
        ("digest", "u1", DIGEST_BYTES),
        ("block_hash", "<u8", BLOCK_HASH_BYTES // 8),
    ]
)

Bytes = npt.NDArray[np.uint8]
Slots = Sequence[int]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie in a formatted arena."""

    slot_bytes: int
    num_slots: int

    @property
    def stride(self) -> int:
        return _page_up(self.slot_bytes)

    @property
    def data_at(self) -> int:
        return PAGE + _page_up(self.num_slots * TABLE.itemsize)

    @property
    def end(self) -> int:
        return self.data_at + self.num_slots * self.stride

    @classmethod
    def fit(cls, num_bytes: int, slot_bytes: int) -> Layout:
        """Put as many slots as possible into `num_bytes`. Raises ArenaFull when not even one fits."""
        num_slots = (num_bytes - PAGE) // (_page_up(max(slot_bytes, 1)) + TABLE.itemsize)
        while num_slots > 0 and cls(slot_bytes, num_slots).end > num_bytes:
            num_slots -= 1  # at most once: the table's last page
        if slot_bytes <= 0 or num_slots <= 0:
            raise ArenaFull(f"an arena of {num_bytes} bytes can't hold one slot of {slot_bytes} bytes")
        return cls(slot_bytes, num_slots)


class _Mapping:
    """What writers and readers share: a mapped arena and views of it."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._bytes: Bytes = np.frombuffer(memory, np.uint8)
        self._header = np.frombuffer(memory, HEADER, count=1)
        self._parts: tuple[Layout, npt.NDArray[np.void], Bytes] | None = None

    def close(self) -> None:
        """Let go of the memory; slots that someone still views stay mapped until they are dropped. Idempotent."""
        self._bytes = np.empty(0, np.uint8)
        self._header = np.zeros(1, HEADER)
        self._parts = None

    @property
    def memory(self) -> Bytes:
        """View all of it: header, table and data."""
        return self._bytes

    @property
    def is_formatted(self) -> bool:
        return int(self._header["magic"][0]) == MAGIC

    @property
    def num_slots(self) -> int:
        """0 before the arena is formatted."""
        return self._layout.num_slots if self.is_formatted else 0

    @property
    def slot_bytes(self) -> int:
        """0 before the arena is formatted."""
        return self._layout.slot_bytes if self.is_formatted else 0

    @property
    def num_pieces(self) -> int:
        """Digests at the end of each slot (see inferflux.kv.blocks); 0 where slots are not made of pieces."""
        return int(self._header["num_pieces"][0])

    def slot(self, i: int) -> Bytes:
        """View slot `i`, without a copy; writable only where the arena was created or attached."""
        self._index((i,))
        return cast("Bytes", self._data[i])

    def digest(self, i: int) -> bytes:
        """Return what `set_digest` kept for slot `i`. Readers go by their ticket's digests instead."""
        self._index((i,))
        return cast("bytes", self._table["digest"][i].tobytes())

    def generation(self, i: int) -> int:
        """How often slot `i` was freed: the same number before and after a read means nobody took it in between."""
        return self.generations((i,))[0]

    def generations(self, slots: Slots) -> tuple[int, ...]:
        """Return the generation of each slot."""
        return tuple(self._table["generation"][self._index(slots)].tolist())

    @property
    def _layout(self) -> Layout:
        return self._open()[0]

    @property
    def _table(self) -> npt.NDArray[np.void]:
        return self._open()[1]

    @property
    def _data(self) -> Bytes:
        return self._open()[2]

    def _open(self) -> tuple[Layout, npt.NDArray[np.void], Bytes]:
        """Read the header once: what another process writes into it later must not move our views."""
        if self._parts is None:
            layout = self._read_layout()
            table = self._bytes[PAGE : PAGE + layout.num_slots * TABLE.itemsize].view(TABLE)
            data = self._bytes[layout.data_at : layout.end].reshape(layout.num_slots, layout.stride)
            self._parts = layout, table, data[:, : layout.slot_bytes]
        return self._parts

    def _read_layout(self) -> Layout:
        if not self.is_formatted:
            raise KvUnreachable("the arena is not formatted")
        header = self._header[0]
        if header["version"] != VERSION:
            raise KvUnreachable(f"the arena has version {header['version']}, not {VERSION}")
        layout = Layout(int(header["slot_bytes"]), int(header["num_slots"]))
        if layout.slot_bytes <= 0 or layout.end > self._bytes.size:
            raise KvUnreachable(f"the arena's header does not fit its {self._bytes.size} bytes")
        return layout

    def _index(self, slots: Slots) -> npt.NDArray[np.intp]:
        index = np.asarray(slots, np.intp)
        if index.size and (index.min() < 0 or index.max() >= self._layout.num_slots):
            raise IndexError(f"slots {min(slots)}..{max(slots)} are not all in 0..{self._layout.num_slots - 1}")
        return index


class Arena(_Mapping):
    """The writers' side. One process allocates and publishes, one frees what was published; see the module's head."""

    def __init__(self, fd: int, memory: mmap.mmap, *, owns_fd: bool) -> None:
        super().__init__(memory)
        self.fd = fd
        self._owns_fd = owns_fd
        self._cursor = 0

    @classmethod
    def create(cls, num_bytes: int) -> Self:
        """Reserve and fault in `num_bytes` (rounded up to pages). The first touch of memory costs seconds per GiB.

        Raises ConfigError when the system does not give that much.
        """
        fd = os.memfd_create("inferflux-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, _page_up(num_bytes))
            return cls(fd, _map_writable(fd), owns_fd=True)
        except (OSError, ValueError) as e:  # ValueError: mmap of nothing
            os.close(fd)
            raise ConfigError(f"no memory for a KV arena of {num_bytes} bytes: {e}") from e

    @classmethod
    def attach(cls, fd: int) -> Self:
        """Map an arena that a parent process created. Only works before `seal`; borrows `fd`."""
        return cls(fd, _map_writable(fd), owns_fd=False)

    def format(self, slot_bytes: int, num_pieces: int = 0) -> int:
        """Cut the arena into slots and return how many. Call once. Raises ArenaFull when not one fits."""
        if self.is_formatted:
            raise ValueError("the arena is formatted already")
        layout = Layout.fit(self._bytes.size, slot_bytes)
        self._header["version"] = VERSION
        self._header["num_slots"] = layout.num_slots
        self._header["slot_bytes"] = layout.slot_bytes
        self._header["num_pieces"] = num_pieces
        self._header["magic"] = MAGIC  # last: it makes the rest valid
        return layout.num_slots

    def seal(self) -> None:
        """Refuse new writable mappings, writes and resizes for ever; mappings that exist stay writable. Idempotent."""
        if not self.is_sealed:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)

    @property
    def is_sealed(self) -> bool:
        return _has_seals(self.fd, SEALS)

    @property
    def num_free(self) -> int:
        """0 before the arena is formatted."""
        return int(np.count_nonzero(self._table["state"] == FREE)) if self.is_formatted else 0

    @property
    def num_owned(self) -> int:
        """Slots that the allocator is filling. 0 before the arena is formatted."""
        return int(np.count_nonzero(self._table["state"] == OWNED)) if self.is_formatted else 0

    def allocate(self, n: int) -> tuple[int, ...]:
        """Take `n` free slots. Raises ArenaFull, taking none, when there are fewer."""
        free = np.flatnonzero(self._table["state"] == FREE)
        if n > free.size:
            raise ArenaFull(f"{n} slots wanted, {free.size} of {self.num_slots} are free")
        first = np.searchsorted(free, self._cursor)
        taken = free.take(np.arange(first, first + n), mode="wrap")
        self._table["state"][taken] = OWNED
        self._cursor = int(taken[-1]) + 1 if n else self._cursor
        return tuple(taken.tolist())

    def set_digest(self, i: int, digest: bytes) -> None:
        """Keep the digest of slot `i`, before `publish`, for whoever writes the ticket and doesn't read the bytes."""
        self._index((i,))
        self._table["digest"][i] = np.frombuffer(digest, np.uint8)

    def publish(self, slots: Slots, now_ns: int | None = None) -> None:
        """Hand slots, whose bytes are complete, to the releaser. `now_ns`: on the clock of time.monotonic_ns."""
        index = self._index(slots)
        if np.any(self._table["state"][index] != OWNED):
            raise ValueError(f"slots {list(slots)} are not all owned by the allocator")
        # CLOCK_MONOTONIC is one clock for all processes of a host, so the releaser may compare it with its own.
        self._table["published_ns"][index] = time.monotonic_ns() if now_ns is None else now_ns
        self._table["state"][index] = PUBLISHED

    def free(self, slots: Slots) -> None:
        """Give slots back. Raises ValueError, changing nothing, when one is free already or named twice."""
        index = self._index(slots)
        if np.unique(index).size != index.size or np.any(self._table["state"][index] == FREE):
            raise ValueError(f"slots {list(slots)} are not all in use, each named once")
        self._table["block_hash"][index] = 0
        self._table["generation"][index] += np.uint32(1)
        self._table["state"][index] = FREE

    def set_block_hash(self, i: int, block_hash: bytes) -> None:
        """Let other workers find slot `i`, which is published and held by the caller; zeros hide it."""
        self._index((i,))
        self._table["block_hash"][i] = np.frombuffer(block_hash, "<u8")

    def are_published(self, slots: Slots) -> bool:
        """Whether every one of `slots` is published, each named once."""
        index = self._index(slots)
        return np.unique(index).size == index.size and bool(np.all(self._table["state"][index] == PUBLISHED))

    def published(self) -> list[tuple[int, int]]:
        """All published slots with the time of their publication in ns of the monotonic clock."""
        if not self.is_formatted:
            return []
        index = np.flatnonzero(self._table["state"] == PUBLISHED)
        return list(zip(index.tolist(), self._table["published_ns"][index].tolist(), strict=True))

    def close(self) -> None:
        """Let go of the memory, as above, and of the descriptor, if it was created here. Idempotent."""
        super().close()
        if self._owns_fd:
            self._owns_fd = False
            os.close(self.fd)


class ArenaReader(_Mapping):
    """A reader's side: read-only for good, and alive as long as someone holds it, whatever becomes of the producer."""

    @classmethod
    def open(cls, fd: int, *, populate: bool = True) -> Self:
        """Map a sealed, formatted arena read-only; `fd` stays the caller's.

        Raises KvUnreachable when it is not one. `populate` faults in the page tables, about 0.15 s per GiB; whoever
        only reads the table can do without.
        """
        if not _has_seals(fd, READER_SEALS):
            raise KvUnreachable("the descriptor is not a sealed arena")
        memory = mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, mmap.PROT_READ)
        reader = cls(memory)
        reader._open()
        if populate:
            _populate(memory, MADV_POPULATE_READ)
        return reader

    def read(self, slots: Slots, take: Callable[[int, Bytes], None]) -> None:
        """Call `take(i, block)` for each of `slots`, in order; the views are the arena's own pages."""
        for i, slot in enumerate(slots):
            take(i, self.slot(slot))

    def check(self, slots: Slots, generations: Sequence[int]) -> None:
        """Raise KvStale unless each slot still has the generation it was published with."""
        if slots and not (min(slots) >= 0 and max(slots) < self.num_slots):
            raise KvStale(f"slots {min(slots)}..{max(slots)} are not all in an arena of {self.num_slots}")
        for slot, want, have in zip(slots, generations, self.generations(slots), strict=True):
            if have != want:
                raise KvStale(f"slot {slot} has generation {have}, the ticket says {want}")

    def find(self, block_hash: bytes) -> int | None:
        """Return a published slot with this block hash, as the table says now."""
        table = self._table
        is_it = (table["block_hash"] == np.frombuffer(block_hash, "<u8")).all(axis=1)
        found = np.flatnonzero(is_it & (table["state"] == PUBLISHED))
        return int(found[0]) if found.size else None


def _map_writable(fd: int) -> mmap.mmap:
    memory = mmap.mmap(fd, os.fstat(fd).st_size)
    _populate(memory, MADV_POPULATE_WRITE)
    return memory


def _populate(memory: mmap.mmap, advice: int, chunk: int = 16 << 20) -> None:
    """Fault pages in now, not on a request's path; in pieces, since madvise holds the GIL. Before Linux 5.14: touch."""
    for start in range(0, len(memory), chunk):
        length = min(chunk, len(memory) - start)
        try:
            memory.madvise(advice, start, length)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            _touch(memory, start, length, write=advice == MADV_POPULATE_WRITE)


def _touch(memory: mmap.mmap, start: int, length: int, *, write: bool) -> None:
    pages = np.frombuffer(memory, np.uint8, length, start)[::PAGE]
    if write:
        np.bitwise_or(pages, 0, out=pages)  # keeps what is there: a second writer touches a live arena
    else:
        pages.max()


def _has_seals(fd: int, seals: int) -> bool:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & seals == seals
    except OSError:  # not a memfd
        return False


def _page_up(num_bytes: int) -> int:
    return -(-num_bytes // PAGE) * PAGE
