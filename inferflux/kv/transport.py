"""How a process reads blocks of another worker's arena: one interface, two ways.

    shm    same host: the arena's own pages, mapped once; blocks are used in place (inferflux.kv.shm)
    nixl   any host: one-sided reads by RDMA or TCP into a registered buffer (inferflux.kv.nixl)

Whichever it is, a block counts only when the copy of it has the ticket's digest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from inferflux.errors import KvDigestMismatch, KvError, KvUnreachable
from inferflux.kv import nixl, shm
from inferflux.kv.arena import Bytes, Slots
from inferflux.types import ArenaPath, Transport

OPEN_TIMEOUT_S = 2.0
UNUSED_S = 600.0
Take = Callable[[int, Bytes], None]


class Reader(Protocol):
    """The blocks of one arena, as one process reads them. Safe across threads; everything here may block."""

    @property
    def num_slots(self) -> int: ...

    @property
    def slot_bytes(self) -> int: ...

    def check(self, slots: Slots, generations: Sequence[int]) -> None:
        """Raise KvStale unless each slot still has the generation it was published with."""

    def read(self, slots: Slots, take: Take) -> None:
        """Call `take(i, block)` for each of `slots` in order; the view is valid during the call only.

        Raises KvUnreachable when the owner is gone or silent.
        """

    def close(self) -> None:
        """Let go of the arena. Idempotent."""


def copy_blocks(
    reader: Reader,
    slots: Slots,
    generations: Sequence[int],
    digests: Sequence[bytes],
    put: Callable[[int, Bytes], bytes],
) -> None:
    """Let `put(i, block)` copy each block and return the digest of its copy.

    Copies first, then digests what was copied: a slot that changes under the copy can't go unnoticed. Raises KvStale,
    KvDigestMismatch or KvUnreachable; what was put until then must not be used.
    """

    def take(i: int, block: Bytes) -> None:
        if put(i, block) != digests[i]:
            raise KvDigestMismatch(f"slot {slots[i]} is not what was published")

    reader.check(slots, generations)
    reader.read(slots, take)
    reader.check(slots, generations)


class Readers:
    """The arenas that this process reads, each opened once per start of its worker. Safe across threads."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, Transport], tuple[str, Reader]] = {}
        self._used_at: dict[tuple[str, Transport], float] = {}
        self._lock = threading.Lock()

    def get(self, path: ArenaPath) -> Reader:
        """Return the path's reader; one of an earlier start of the same worker is closed.

        Raises KvUnreachable, or KvStale when the worker has started anew.
        """
        key = (path.worker_id or path.socket_path, path.transport)
        with self._lock:
            incarnation, reader = self._open.get(key, ("", None))
            self._used_at[key] = time.monotonic()
            if reader is None or incarnation != path.incarnation:
                self._close(key)
                self._close_unused()
                reader = open_reader(path)
                self._open[key] = path.incarnation, reader
            return reader

    def drop(self, path: ArenaPath) -> None:
        """Close a path that failed; the next `get` opens it anew."""
        with self._lock:
            self._close((path.worker_id or path.socket_path, path.transport))

    def close(self) -> None:
        """Close all. Idempotent."""
        with self._lock:
            for key in list(self._open):
                self._close(key)

    def _close_unused(self) -> None:
        """Let go of workers that are gone for good; looked at whenever one comes."""
        before = time.monotonic() - UNUSED_S
        for key in [key for key in self._open if self._used_at[key] < before]:
            self._close(key)
            del self._used_at[key]

    def _close(self, key: tuple[str, Transport]) -> None:
        _, reader = self._open.pop(key, ("", None))
        if reader is not None:
            with suppress(KvError):
                reader.close()


def open_reader(path: ArenaPath) -> Reader:
    """Open an arena for reading. Raises KvUnreachable, or KvStale when its worker has started anew."""
    if path.transport is Transport.SHM:
        return shm.fetch(path.socket_path, path.incarnation, OPEN_TIMEOUT_S)
    if path.peer is None:
        raise KvUnreachable(f"no handshake with worker {path.worker_id}")
    return nixl.NixlReader(path.peer)
