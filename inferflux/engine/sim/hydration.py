"""Reading another worker's blocks into the paged cache, in threads, off the engine's critical path."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from inferflux.engine.base import KvSource
from inferflux.engine.sim.kv import KvCache
from inferflux.errors import KvDigestMismatch, KvError, KvIncompatible
from inferflux.kv import shm
from inferflux.kv.arena import ArenaReader
from inferflux.kv.digests import block_digest
from inferflux.types import KvReport

FETCH_TIMEOUT_S = 1.0
NUM_THREADS = 2


class Hydrator:
    """Copies blocks and checks the copies: what lies in the arena may change between a check and a copy."""

    def __init__(self, kv: KvCache, block_size: int, slot_bytes: int) -> None:
        self._kv = kv
        self._block_size = block_size
        self._slot_bytes = slot_bytes
        self._threads = ThreadPoolExecutor(NUM_THREADS, "hydrate")
        self._readers: dict[str, tuple[str, ArenaReader]] = {}

    def load(self, source: KvSource, num_tokens: int, blocks: Sequence[int], first: int) -> asyncio.Future[KvReport]:
        """Copy all blocks of a prompt from `first` on into `blocks`, which stay in use until the future is done.

        Its result says how it went; KvErrors are reported, not raised.
        """
        work = partial(self._load, source, num_tokens, tuple(blocks), first)
        return asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Wait for the copies that run and forget all arenas. Idempotent."""
        self._threads.shutdown(wait=True)
        self._readers.clear()

    def _load(self, source: KvSource, num_tokens: int, blocks: tuple[int, ...], first: int) -> KvReport:
        started_at = time.perf_counter()
        try:
            num_bytes = self._copy(source, num_tokens, blocks, first)
        except KvError as e:
            return KvReport(source.ticket_id, "recomputed", e.kv_reason)
        return KvReport(source.ticket_id, "committed", "", num_bytes, time.perf_counter() - started_at)

    def _copy(self, source: KvSource, num_tokens: int, blocks: tuple[int, ...], first: int) -> int:
        num_blocks = -(-num_tokens // self._block_size)
        counts = {len(source.slots), len(source.digests), len(source.generations)}
        if (source.num_tokens, source.slot_bytes, counts) != (num_tokens, self._slot_bytes, {num_blocks}):
            raise KvIncompatible(f"ticket {source.ticket_id} does not describe {num_blocks} blocks of this engine")
        reader = self._reader(source)
        reader.check(source.slots, source.generations)
        for i in range(first, num_blocks):
            self._copy_block(reader, source, i, blocks[i])
        return (num_blocks - first) * self._slot_bytes

    def _copy_block(self, reader: ArenaReader, source: KvSource, i: int, block: int) -> None:
        target = self._kv.block(block)
        target[:] = reader.slot(source.slots[i])
        if block_digest((target,)) != source.digests[i]:
            raise KvDigestMismatch(f"block {i} of ticket {source.ticket_id} is not what was published")

    def _reader(self, source: KvSource) -> ArenaReader:
        """The arena's mapping, kept as long as the producer does not start anew."""
        incarnation, reader = self._readers.get(source.socket_path, ("", None))
        if reader is None or incarnation != source.incarnation:
            reader = shm.fetch(source.socket_path, source.incarnation, FETCH_TIMEOUT_S)
            self._readers[source.socket_path] = source.incarnation, reader
        if reader.slot_bytes != self._slot_bytes:
            raise KvIncompatible(f"the arena has slots of {reader.slot_bytes} bytes, not {self._slot_bytes}")
        return reader
