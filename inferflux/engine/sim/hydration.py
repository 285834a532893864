"""Reading another worker's blocks into the paged cache, in threads, off the engine's critical path."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from inferflux import failpoints
from inferflux.engine.base import Claim, KvSource
from inferflux.engine.sim.kv import KvCache
from inferflux.errors import KvError, KvIncompatible, KvUnreachable
from inferflux.kv.arena import Bytes
from inferflux.kv.digests import block_digest
from inferflux.kv.transport import Readers, copy_blocks
from inferflux.types import KvReport

NUM_THREADS = 2


class Hydrator:
    """Copies blocks and checks the copies: what lies in the arena may change between a check and a copy."""

    def __init__(self, kv: KvCache, block_size: int, slot_bytes: int) -> None:
        self._kv = kv
        self._block_size = block_size
        self._slot_bytes = slot_bytes
        self._threads = ThreadPoolExecutor(NUM_THREADS, "hydrate")
        self._readers = Readers()

    def load(self, source: KvSource, num_tokens: int, blocks: Sequence[int], first: int) -> asyncio.Future[KvReport]:
        """Copy all blocks of a prompt from `first` on into `blocks`, which stay in use until the future is done.

        Its result says how it went; KvErrors are reported, not raised.
        """
        work = partial(self._load, source, num_tokens, tuple(blocks), first)
        if source.claim is None:
            return asyncio.get_running_loop().run_in_executor(self._threads, work)
        return asyncio.ensure_future(self._load_claimed(source, source.claim, work))

    def close(self) -> None:
        """Wait for the copies that run and forget all arenas. Idempotent."""
        self._threads.shutdown(wait=True)
        self._readers.close()

    async def _load_claimed(self, source: KvSource, claim: Claim, work: Callable[[], KvReport]) -> KvReport:
        try:
            await claim()
        except KvError as e:
            return KvReport(source.ticket_id, "recomputed", e.kv_reason)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _load(self, source: KvSource, num_tokens: int, blocks: tuple[int, ...], first: int) -> KvReport:
        started_at = time.perf_counter()
        try:
            num_bytes = self._copy(source, num_tokens, blocks, first)
        except KvError as e:
            if isinstance(e, KvUnreachable):
                self._readers.drop(source.path)
            return KvReport(source.ticket_id, "recomputed", e.kv_reason)
        return KvReport(source.ticket_id, "committed", "", num_bytes, time.perf_counter() - started_at)

    def _copy(self, source: KvSource, num_tokens: int, blocks: tuple[int, ...], first: int) -> int:
        num_blocks = -(-num_tokens // self._block_size)
        counts = {len(source.slots), len(source.digests), len(source.generations)}
        if (source.num_tokens, source.slot_bytes, counts) != (num_tokens, self._slot_bytes, {num_blocks}):
            raise KvIncompatible(f"ticket {source.ticket_id} does not describe {num_blocks} blocks of this engine")
        reader = self._readers.get(source.path)
        if reader.slot_bytes != self._slot_bytes:
            raise KvIncompatible(f"the arena has slots of {reader.slot_bytes} bytes, not {self._slot_bytes}")

        def put(i: int, block: Bytes) -> bytes:
            target = self._kv.block(blocks[first + i])
            target[:] = block
            if failpoints.ON:
                failpoints.hit("xfer.read", target)
            return block_digest((target,))

        copy_blocks(reader, source.slots[first:], source.generations[first:], source.digests[first:], put)
        return (num_blocks - first) * self._slot_bytes
