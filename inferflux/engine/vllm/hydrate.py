"""The reading half of the connector: which slots go into which blocks, and the thread that copies them.

Decode reads what a ticket names, prefill the beginning of a prompt that an arena has already. Each rank fills its own
part of the blocks and says what became of it in the output of the next step.

A block whose digest does not match is never used: the request is reported as failed and vLLM computes its prompt.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults, KVConnectorWorkerMetadata

from inferflux.engine.vllm import transfer
from inferflux.errors import KvError, KvUnreachable
from inferflux.kv.transport import Readers, copy_blocks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.request import Request

    from inferflux.engine.base import KvSource
    from inferflux.kv.arena import Bytes
    from inferflux.kv.blocks import Part


@dataclass(frozen=True, slots=True)
class Load:
    """Blocks to fill from `source.slots[first : first + len(block_ids)]`."""

    request_id: str
    block_ids: tuple[int, ...]
    source: KvSource
    first: int


@dataclass
class RankReports(KVConnectorWorkerMetadata):
    """Loads that ended on some ranks, by request, and tokens by expert: from the worker side to the scheduler side."""

    reports: list[tuple[str, transfer.Report]] = field(default_factory=list)
    expert_tokens: list[int] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> RankReports:
        """Add those of another rank."""
        if not isinstance(other, RankReports):
            return self
        tokens = map(sum, zip_longest(self.expert_tokens, other.expert_tokens, fillvalue=0))
        return RankReports(self.reports + other.reports, list(tokens))


class LoadPlanner:
    """Scheduler side: offers each request's source once, and reports on it when all ranks have loaded it."""

    def __init__(self, block_size: int, reports_fd: int, num_ranks: int) -> None:
        self._block_size = block_size
        self._reports_fd = reports_fd
        self._num_ranks = num_ranks
        self._reports: dict[str, list[transfer.Report]] = {}
        self._pending: list[Load] = []
        self._tried: dict[str, int] = {}

    def offer(self, request: Request, num_computed_tokens: int) -> int:
        """Tokens that the request's source covers beyond what is cached here."""
        source = transfer.source_from_params(request.kv_transfer_params)
        if source is None or request.request_id in self._tried:
            return 0
        num_tokens = min(source.num_tokens, request.num_prompt_tokens) - num_computed_tokens
        if num_tokens <= 0:
            self._tried[request.request_id] = 0
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
        self._tried[request.request_id] = num_external_tokens

    def take(self) -> list[Load]:
        """Loads planned since the last call."""
        pending, self._pending = self._pending, []
        return pending

    def fail(self, request_ids: Iterable[str]) -> None:
        """Hear whose loads failed: their tokens are computed."""
        self._tried.update(dict.fromkeys(request_ids, transfer.FAILED))

    def hear(self, reports: RankReports) -> None:
        """Hear what became of loads on single ranks."""
        for request_id, report in reports.reports:
            heard = self._reports.setdefault(request_id, [])
            heard.append(report)
            if len(heard) == self._num_ranks:
                transfer.Report.merge(self._reports.pop(request_id)).send(self._reports_fd)
        transfer.ExpertReport.send_all(reports.expert_tokens, self._reports_fd)

    def forget(self, request_id: str) -> int:
        """Forget a request that is over; returns how many tokens its source brought, or FAILED."""
        return self._tried.pop(request_id, 0)


class Hydrator:
    """Worker side: copies this rank's part of slots into blocks on a thread of its own, while the engine steps on."""

    def __init__(self) -> None:
        self._readers = Readers()
        self._lock = threading.Lock()
        self._results = KVConnectorTransferResults()
        self._reports = RankReports()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hydrate")

    def start(self, load: Load, part: Part, layers: list[Bytes]) -> None:
        """Begin a load. `layers`: byte views `[blocks, block bytes]` of the paged cache, which has `part` of each."""
        self._thread.submit(self._run, load, part, layers)

    def take_results(self) -> KVConnectorTransferResults:
        """Loads that ended since the last call."""
        with self._lock:
            results, self._results = self._results, KVConnectorTransferResults()
        return results

    def take_reports(self) -> RankReports:
        """What became of the loads that ended since the last call."""
        with self._lock:
            reports, self._reports = self._reports, RankReports()
        return reports

    def close(self) -> None:
        """End the thread; loads that have not begun never will."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._readers.close()

    def _run(self, load: Load, part: Part, layers: list[Bytes]) -> None:
        report = self._copy(load, part, layers)
        with self._lock:
            self._results.finished_recving.add(load.request_id)
            if report.result != "committed":
                self._results.failed_recving.add(load.request_id)
            self._reports.reports.append((load.request_id, report))

    def _copy(self, load: Load, part: Part, layers: list[Bytes]) -> transfer.Report:
        start = time.perf_counter()
        try:
            self._read(load, part, layers)
        except KvError as error:
            if isinstance(error, KvUnreachable):
                self._readers.drop(load.source.path)
            return transfer.Report(load.source.ticket_id, "recomputed", error.kv_reason)
        except Exception:  # noqa: BLE001 - whatever went wrong, the prompt can be computed here
            return transfer.Report(load.source.ticket_id, "recomputed", "unreachable")
        num_bytes = len(load.block_ids) * part.num_bytes
        return transfer.Report(load.source.ticket_id, "committed", "", num_bytes, time.perf_counter() - start)

    def _read(self, load: Load, part: Part, layers: list[Bytes]) -> None:
        source, wanted = load.source, slice(load.first, load.first + len(load.block_ids))
        copy_blocks(
            self._readers.get(source.path),
            source.slots[wanted],
            source.generations[wanted],
            source.digests[wanted],
            lambda i, slot: part.copy_in(slot, [layer[load.block_ids[i]] for layer in layers]),
        )
