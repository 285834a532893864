"""Decode's half of the connector: which slots go into which blocks, and the thread that copies them.

A block whose digest does not match is never used: the request is reported as failed and vLLM computes its prompt.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from inferflux.engine.vllm import transfer
from inferflux.errors import KvDigestMismatch, KvError
from inferflux.kv import shm

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.request import Request

    from inferflux.engine.base import KvSource
    from inferflux.kv.arena import ArenaReader, Bytes

FETCH_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Load:
    """Blocks to fill from `source.slots[first : first + len(block_ids)]`."""

    request_id: str
    block_ids: tuple[int, ...]
    source: KvSource
    first: int


class LoadPlanner:
    """Scheduler side: offers each request's source once."""

    def __init__(self, block_size: int, reports_fd: int) -> None:
        self._block_size = block_size
        self._reports_fd = reports_fd
        self._pending: list[Load] = []
        self._tried: set[str] = set()

    def offer(self, request: Request, num_computed_tokens: int) -> int:
        """Tokens that the request's source covers beyond what is cached here."""
        source = transfer.source_from_params(request.kv_transfer_params)
        if source is None or request.request_id in self._tried:
            return 0
        num_tokens = min(source.num_tokens, request.num_prompt_tokens) - num_computed_tokens
        if num_tokens <= 0:
            self._tried.add(request.request_id)
            transfer.Report(source.ticket_id, "unneeded").send(self._reports_fd)
        return max(num_tokens, 0)

    def accept(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Plan the load into the blocks that vLLM has just reserved."""
        source = transfer.source_from_params(request.kv_transfer_params)
        if source is None or num_external_tokens == 0:
            return
        end = min(source.num_tokens, request.num_prompt_tokens)
        first = (end - num_external_tokens) // self._block_size
        last = -(-end // self._block_size)
        block_ids = tuple(blocks.get_block_ids()[0][first:last])
        self._pending.append(Load(request.request_id, block_ids, source, first))
        self._tried.add(request.request_id)

    def take(self) -> list[Load]:
        """Loads planned since the last call."""
        pending, self._pending = self._pending, []
        return pending

    def forget(self, request_id: str) -> None:
        """Forget a request that is over."""
        self._tried.discard(request_id)


class Hydrator:
    """Worker side: copies slots into blocks on a thread of its own, while the engine steps on."""

    def __init__(self, reports_fd: int) -> None:
        self._reports_fd = reports_fd
        self._readers: dict[str, tuple[str, ArenaReader]] = {}
        self._lock = threading.Lock()
        self._results = KVConnectorTransferResults()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hydrate")

    def start(self, load: Load, layers: list[Bytes]) -> None:
        """Begin a load. `layers`: byte views `[blocks, block bytes]` of the paged cache."""
        self._thread.submit(self._run, load, layers)

    def take_results(self) -> KVConnectorTransferResults:
        """Loads that ended since the last call."""
        with self._lock:
            results, self._results = self._results, KVConnectorTransferResults()
        return results

    def close(self) -> None:
        """End the thread; loads that have not begun never will."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _run(self, load: Load, layers: list[Bytes]) -> None:
        report = self._copy(load, layers)
        with self._lock:
            self._results.finished_recving.add(load.request_id)
            if report.result != "committed":
                self._results.failed_recving.add(load.request_id)
        report.send(self._reports_fd)

    def _copy(self, load: Load, layers: list[Bytes]) -> transfer.Report:
        start = time.perf_counter()
        try:
            reader = self._reader(load.source)
            reader.check(load.source.slots, load.source.generations)
            for i, block_id in enumerate(load.block_ids, load.first):
                copy_in(reader, load.source, i, [layer[block_id] for layer in layers])
        except KvError as error:
            return transfer.Report(load.source.ticket_id, "recomputed", error.kv_reason)
        except Exception:  # noqa: BLE001 - whatever went wrong, the prompt can be computed here
            return transfer.Report(load.source.ticket_id, "recomputed", "unreachable")
        num_bytes = len(load.block_ids) * load.source.slot_bytes
        return transfer.Report(load.source.ticket_id, "committed", "", num_bytes, time.perf_counter() - start)

    def _reader(self, source: KvSource) -> ArenaReader:
        """The mapped arena of the source's worker; mapped once per incarnation."""
        incarnation, reader = self._readers.get(source.socket_path, (None, None))
        if reader is None or incarnation != source.incarnation:
            reader = shm.fetch(source.socket_path, source.incarnation, FETCH_TIMEOUT_S)
            self._readers[source.socket_path] = (source.incarnation, reader)
        return reader


def copy_in(reader: ArenaReader, source: KvSource, index: int, block: list[Bytes]) -> None:
    """Fill one block, layer by layer, from slot `index` of the source.

    Copies first, then digests what was copied: a slot that changes under the copy can't go unnoticed.
    """
    slot, hasher, offset = reader.slot(source.slots[index]), xxhash.xxh3_128(), 0
    for part in block:
        np.copyto(part, slot[offset : offset + part.nbytes])
        hasher.update(part.data)
        offset += part.nbytes
    if hasher.digest() != source.digests[index]:
        raise KvDigestMismatch(f"ticket {source.ticket_id}: block {index} does not have its digest")
