"""Which decode worker can read from which prefill worker, how, and how fast: tried before requests go that way.

Each pair is tried once, when both have come: a decode worker opens its path and reads some of the arena. What failed is
tried again now and then, and no request is sent that way meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from inferflux.errors import InferfluxError, KvError, KvIncompatible
from inferflux.rpc.client import translated_errors
from inferflux.types import Role
from inferflux.v1 import worker_admin_service_pb2 as pb
from services.gateway.link import Link
from services.gateway.news import News
from services.gateway.views import Worker

PROBE_TIMEOUT_S = 15.0
RETRY_S = 5.0
Joined = tuple[Worker, Link]
Pair = tuple[Joined, Joined]
"""A decode worker and the prefill worker that it reads from."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Path:
    """One pair. `state`: ok, or the reason why nothing could be read. `is_broken`: the way itself is to blame."""

    decode: str
    prefill: str
    transport: str = ""
    gbps: float = 0.0
    state: str = "ok"
    is_broken: bool = False


class Matrix:
    """Asks decode workers to read from prefill workers. `joined`: the workers that are ready now; `news`: of them."""

    def __init__(self, joined: Callable[[], Iterable[Joined]], news: News) -> None:
        self._joined = joined
        self._news = news
        self._paths: dict[tuple[str, str], Path] = {}  # by the starts of both
        self._unreadable: dict[str, frozenset[str]] = {}

    async def measure(self) -> list[Path]:
        """Try every pair of one model now."""
        return await self._try(self._pairs())

    async def scout(self) -> None:
        """Try pairs as they come, and those again that failed, until cancelled."""
        while True:
            while new := [pair for pair in self._pairs() if _starts(pair) not in self._paths]:
                await self._try(new)
            with suppress(TimeoutError):
                async with asyncio.timeout(RETRY_S if self._broken() else None):
                    await self._news.next()
                    continue
            await self._try([pair for pair in self._pairs() if _starts(pair) in self._broken()])

    def unreadable_by(self, owner: Worker) -> frozenset[str]:
        """Decode workers that have no way to a prefill worker's blocks, as far as it was tried."""
        return self._unreadable.get(owner.worker_id, frozenset())

    def _broken(self) -> set[tuple[str, str]]:
        return {starts for starts, path in self._paths.items() if path.is_broken}

    def _pairs(self) -> list[Pair]:
        joined = list(self._joined())
        readers = [(worker, link) for worker, link in joined if worker.role is Role.DECODE]
        owners = [(worker, link) for worker, link in joined if worker.role is Role.PREFILL]
        return [(reader, owner) for reader in readers for owner in owners if reader[0].model == owner[0].model]

    async def _try(self, pairs: Sequence[Pair]) -> list[Path]:
        """Probe pairs; a decode worker's one after the other, so that each has its memory."""
        rows: dict[str, list[Pair]] = {}
        for pair in pairs:
            rows.setdefault(pair[0][0].worker_id, []).append(pair)
        results = await asyncio.gather(*(self._row(row) for row in rows.values()))
        self._tidy()
        return [path for row in results for path in row]

    def _tidy(self) -> None:
        """Forget those who left, and note for each prefill worker who can't read from it."""
        present = {_starts(pair) for pair in self._pairs()}
        self._paths = {starts: path for starts, path in self._paths.items() if starts in present}
        broken = [path for path in self._paths.values() if path.is_broken]
        self._unreadable = {p.prefill: frozenset(q.decode for q in broken if q.prefill == p.prefill) for p in broken}

    async def _row(self, pairs: Sequence[Pair]) -> list[Path]:
        row = []
        for pair in pairs:
            path = self._paths[_starts(pair)] = await _probe(pair)
            if path.is_broken:
                _log.warning("no path", extra={"decode": path.decode, "prefill": path.prefill, "reason": path.state})
            row.append(path)
        return row


def _starts(pair: Pair) -> tuple[str, str]:
    (_, reader), (_, owner) = pair
    return reader.incarnation, owner.incarnation


async def _probe(pair: Pair) -> Path:
    (reader, link), (owner, owner_link) = pair
    names = (reader.worker_id, owner.worker_id)
    if owner.fingerprint != reader.fingerprint:
        return Path(*names, state=KvIncompatible.reason)
    request = pb.ProbePathRequest(worker_id=owner.worker_id, incarnation=owner_link.incarnation, address=owner.address)
    try:
        with translated_errors():
            probe = await link.admin.ProbePath(request, timeout=PROBE_TIMEOUT_S)
    except InferfluxError as e:
        return Path(*names, state=e.reason, is_broken=isinstance(e, KvError))
    elapsed_s = max(probe.elapsed.ToTimedelta().total_seconds(), 1e-6)
    return Path(*names, probe.transport, round(probe.num_bytes / elapsed_s / 1e9, 3))
